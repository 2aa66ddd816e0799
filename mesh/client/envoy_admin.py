"""Reads the statistics of Envoy's clusters from its admin socket."""

import asyncio
import re
from urllib.parse import quote, unquote

import aiohttp

from mesh.envoy.bootstrap import KEY_STATS
from mesh.envoy.interfaces import ClusterFigures, EnvoyFigures, KeyCalls
from mesh.envoy.plan import STAT_NAMES, Carrier

_FILTER = rf"^cluster\.{STAT_NAMES}_.*\.upstream_rq_(total|active|completed|time)$|^{KEY_STATS}_"
_LINE = re.compile(
    r"^cluster\.(?P<name>[a-z0-9_]+)\.upstream_rq_(?P<kind>total|active|completed|time): (?P<value>.*)$", re.MULTILINE
)
_KEY_LINE = re.compile(
    rf"^{KEY_STATS}_(?P<carrier>[a-z]+)\.calls\.by\.copy\.code\.(?P<code>[^.]+)\.key\.(?P<key>.+): (?P<value>\d+)$",
    re.MULTILINE,
)
_MEDIAN = re.compile(r"P50\((?P<recent>[0-9.e+]+|nan),")
_TIMEOUT_S = 5.0
_POLL_S = 0.1


class EnvoyAdmin:
    """Implements mesh.envoy.interfaces.EnvoyStats. `address`: `unix:PATH`."""

    def __init__(self, address: str) -> None:
        self._path = address.removeprefix("unix:")
        self._session: aiohttp.ClientSession | None = None

    async def figures(self) -> EnvoyFigures | None:
        try:
            async with self._opened().get(f"http://envoy/stats?usedonly&filter={quote(_FILTER)}") as answer:
                text = await answer.text()
                return EnvoyFigures(parse_figures(text), parse_key_calls(text))
        except (aiohttp.ClientError, OSError, TimeoutError):
            return None

    async def idle(self) -> None:
        """Return when no call is in flight to a copy, or Envoy does not answer."""
        while (known := await self.figures()) and any(each.active for each in known.clusters.values()):  # noqa: ASYNC110 - another process
            await asyncio.sleep(_POLL_S)

    async def stop_listening(self) -> None:
        try:
            async with self._opened().post("http://envoy/drain_listeners"):
                pass
        except (aiohttp.ClientError, OSError, TimeoutError):
            pass

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(path=self._path), timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S)
            )
        return self._session


def parse_figures(text: str) -> dict[str, ClusterFigures]:
    """Return the figures by cluster. Latencies are in milliseconds in Envoy's text, `P50(RECENT,ALL)` among them."""
    values: dict[str, dict[str, float]] = {}
    for line in _LINE.finditer(text):
        known = values.setdefault(line["name"], {})
        if line["kind"] != "time":
            known[line["kind"]] = float(line["value"])
        elif (median := _MEDIAN.search(line["value"])) is not None and median["recent"] != "nan":
            known["time"] = float(median["recent"]) / 1000
    return {
        name: ClusterFigures(
            int(known.get("total", 0)),
            int(known.get("active", 0)),
            int(known.get("completed", 0)),
            known.get("time", 0.0),
        )
        for name, known in values.items()
    }


def parse_key_calls(text: str) -> dict[KeyCalls, int]:
    """Return the calls that copies have answered by key, protocol and status."""
    return {
        KeyCalls(unquote(line["key"]), Carrier(line["carrier"]), line["code"]): int(line["value"])
        for line in _KEY_LINE.finditer(text)
    }
