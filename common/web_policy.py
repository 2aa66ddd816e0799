"""Which browser pages may use an HTTP server: the rules of Host, Origin and CORS, as pure functions of a request's headers.

A page of any site can make a browser send requests to this machine, and a name that its owner points at this machine makes them look like
requests of the page's own site. Their headers differ from those of programs: a browser states the page's site in Origin, and the name that it
connected to in Host.
"""

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

_ANY = "*"
_EXPOSED = "X-Request-Id, Retry-After, Retry-After-Ms"
_PREFLIGHT_S = "600"


@dataclass(frozen=True, slots=True)
class WebPolicy:
    """`hosts`: names of this server in lower case. `is_local`: only programs of this machine reach it. `origins` may call from a browser."""

    hosts: frozenset[str]
    origins: frozenset[str]
    is_local: bool

    @classmethod
    def of_listener(cls, host: str, names: Iterable[str], origins: Iterable[str]) -> "WebPolicy":
        """Return the policy of a listener at `host`, whose other names are `names`."""
        return cls(
            frozenset(_plain(name) for name in (host, *names) if name),
            frozenset(origin.rstrip("/").lower() for origin in origins),
            _is_loopback(host),
        )

    def refusal(self, method: str, headers: Mapping[str, str]) -> str:
        """Return why a request must be refused, or an empty text. A GET counts, too, because some of them load a model."""
        if method == "OPTIONS":
            return ""
        host, origin = headers.get("Host", ""), headers.get("Origin")
        if origin is None:
            if headers.get("Sec-Fetch-Site", "none") in ("cross-site", "same-site"):
                return "the request comes from a web page of another site"
            if self.is_local and not self._is_own(host):
                return f"host {host[:100]!r} is not a name of this server; add it to allowed_hosts to use it"
            return ""
        if self.allows(origin) or (_netloc(origin) == host.lower() and self._is_own(host)):
            return ""
        return f"origin {origin[:100]!r} may not call this server; add it to cors_origins to let its pages do so"

    def allows(self, origin: str) -> bool:
        """Return whether an origin is configured."""
        return _ANY in self.origins or origin.rstrip("/").lower() in self.origins

    def response_headers(self, origin: str | None) -> Mapping[str, str]:
        """Return the CORS headers of a response to a page of `origin`; empty if it is not configured."""
        if origin is None or not self.allows(origin):
            return {}
        return {"Access-Control-Allow-Origin": origin, "Access-Control-Expose-Headers": _EXPOSED, "Vary": "Origin"}

    def preflight_headers(self, method: str, headers: Mapping[str, str]) -> Mapping[str, str]:
        """Return the headers of the response to a preflight request of a configured origin; empty for any other request."""
        origin = headers.get("Origin")
        asked = headers.get("Access-Control-Request-Method")
        if method != "OPTIONS" or origin is None or asked is None or not self.allows(origin):
            return {}
        return {
            **self.response_headers(origin),
            "Access-Control-Allow-Methods": "GET, POST, PUT, DELETE",
            "Access-Control-Allow-Headers": headers.get("Access-Control-Request-Headers", ""),
            "Access-Control-Max-Age": _PREFLIGHT_S,
        }

    def _is_own(self, host: str) -> bool:
        """Return whether a Host header names this server. An address does: only a name can be pointed at another machine."""
        name = _plain(_hostname(host))
        return (
            name in self.hosts
            or name == "localhost"
            or name.endswith(".localhost")
            or _ANY in self.hosts
            or _is_address(name)
        )


def _hostname(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _plain(name: str) -> str:
    return name.strip("[]").rstrip(".").lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    name = _plain(host)
    return name == "localhost" or (_is_address(name) and ipaddress.ip_address(name).is_loopback)
