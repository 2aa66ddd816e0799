"""Replays the recorded steps of a ModelMesh against pods, and compares the answers.

A step is a gRPC call, a look at etcd or at a runtime, a list of metrics, a pause, or another step that is repeated `until` its answer holds a text.
Times and the names of pods differ from run to run and are masked. A recorded record of etcd, set of keys or list of metrics is matched by
a superset, an error's text by a longer one, and a number of writes by a smaller one.
"""

import asyncio
import base64
import importlib
import json
import re
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from google.protobuf import json_format

PREFIX = "/mm/repertory/"
_ROOT_METHODS = {"mmesh.ModelMesh": "wire.mmesh.model_mesh_pb2"}
_UNTIL_S = 10.0
_EARLIEST_TIME_MS = 1_500_000_000_000

Step = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Pods:
    """Where everything listens. `runtimes` are the directories of tests.support.modelmesh_runtime."""

    grpc: tuple[str, ...]
    runtimes: tuple[Path, ...]
    metrics_url: str
    etcd: str


async def replay(scenarios: dict[str, list[Step]], pods: Pods) -> list[str]:
    """Return the steps that were answered otherwise, as `scenario number: wanted …, got …`."""
    player = _Player(pods)
    different = []
    for scenario, rows in scenarios.items():
        for number, row in enumerate(rows, 1):
            got = masked(await player.play(row["step"]))
            answers = [got, _as_begun(got)] if _loads_at_once(row["step"]) else [got]
            if _has_answer(row, got) and not any(
                matches(row["step"], wanted, answer) for wanted in row["answers"] for answer in answers
            ):
                different.append(f"{scenario} {number}: wanted {row['answers']}, got {got}")
    await player.close()
    return different


def _has_answer(row: Step, got: object) -> bool:
    return row["answers"] != [None] or got is not None or "etcd" in row["step"]


def _loads_at_once(step: Step) -> bool:
    """Whether a step registers a model whose load takes no time, so that the load may end before the answer or after it."""
    path = step.get("request", {}).get("modelInfo", {}).get("path")
    return path is not None and "load=" not in path


def _as_begun(answer: object) -> object:
    """Return the answer as it would be if a load that has ended had only begun."""
    return json.loads(json.dumps(answer).replace('"LOADED"', '"LOADING"'))


class _Player:
    def __init__(self, pods: Pods) -> None:
        self._pods = pods
        options = (("grpc.enable_retries", 0),)
        self._channels = [grpc.aio.insecure_channel(address, options) for address in pods.grpc]

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()

    async def play(self, step: Step) -> object:
        if "sleep" in step:
            await asyncio.sleep(step["sleep"])
            return None
        if "until" in step:
            return await self._until(step)
        if "etcd" in step:
            return await asyncio.to_thread(self._etcd, step)
        if "runtime" in step:
            return await self._runtime(step)
        if "metrics" in step:
            return await asyncio.to_thread(self._metrics, step["metrics"])
        return await self._call(step)

    async def _until(self, step: Step) -> object:
        give_up_s = time.monotonic() + step.get("within", _UNTIL_S)
        while True:
            answer = await self.play(step["step"])
            if step["until"] in json.dumps(answer):
                return answer
            if time.monotonic() > give_up_s:
                return {"never": step["until"], "last": answer}
            await asyncio.sleep(0.1)

    async def _call(self, step: Step) -> object:
        channel = self._channels[step.get("pod", 0) % len(self._channels)]
        service, _, method = step["call"].partition("/")
        metadata = tuple(
            (key, value.encode() if key.endswith("-bin") else value) for key, value in step.get("metadata", ())
        )
        output = None
        if "request" in step:
            module = importlib.import_module(_ROOT_METHODS[step.get("as", service)])
            described = module.DESCRIPTOR.services_by_name["ModelMesh"].methods_by_name[step.get("as_method", method)]
            message = json_format.ParseDict(step["request"], getattr(module, described.input_type.name)())
            data, output = message.SerializeToString(), getattr(module, described.output_type.name)
        else:
            data = step.get("bytes", "").encode() * step.get("times", 1)
        try:
            answer = await channel.unary_unary(f"/{step['call']}")(
                data, metadata=metadata, timeout=step.get("timeout", 30)
            )
        except grpc.aio.AioRpcError as error:
            return {"code": error.code().name, "details": error.details() or ""}
        if output is not None:
            return {"answer": json_format.MessageToDict(output.FromString(answer))}
        return {"answer": answer.decode(errors="replace")[:200]}

    async def _runtime(self, step: Step) -> list[str]:
        order = b"purge\n" if step.get("order", {}).get("purge") else b"\n"
        chosen = self._pods.runtimes if step["runtime"] == "all" else (self._pods.runtimes[step["runtime"]],)
        names: list[str] = []
        for directory in chosen:
            reader, writer = await asyncio.open_unix_connection(str(directory / "control.sock"))
            writer.write(order)
            names += json.loads(await reader.readline())
            writer.close()
        return sorted(names)

    def _metrics(self, prefix: str) -> list[str]:
        with urllib.request.urlopen(self._pods.metrics_url, timeout=10) as response:
            lines = response.read().decode().splitlines()
        return sorted({" ".join(line.split()[2:4]) for line in lines if line.startswith(f"# TYPE {prefix}")})

    def _etcd(self, step: Step) -> object:
        key = PREFIX + step.get("key", "")
        if step["etcd"] == "put":
            value = step["value"] if isinstance(step["value"], str) else json.dumps(step["value"])
            self._ask_etcd("put", {"key": _encoded(key), "value": _encoded(value)})
            return None
        if step["etcd"] == "keys":
            end = key[:-1] + chr(ord(key[-1]) + 1)
            rows = self._ask_etcd("range", {"key": _encoded(key), "range_end": _encoded(end), "keys_only": True})
            return sorted(_decoded(row["key"]).removeprefix(PREFIX) for row in rows)
        rows = self._ask_etcd("range", {"key": _encoded(key)})
        if step["etcd"] == "writes":
            return int(rows[0]["version"]) if rows else 0
        if not rows:
            return {} if step["etcd"] == "fields" else None
        text = _decoded(rows[0].get("value", ""))
        try:
            record = json.loads(text)
        except ValueError:
            return text
        return {name: type(value).__name__ for name, value in record.items()} if step["etcd"] == "fields" else record

    def _ask_etcd(self, method: str, body: dict[str, object]) -> list[dict[str, str]]:
        request = urllib.request.Request(
            f"http://{self._pods.etcd}/v3/kv/{method}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=10) as response:
            found: list[dict[str, str]] = json.load(response).get("kvs", [])
            return found


def _encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _decoded(text: str) -> str:
    return base64.b64decode(text).decode(errors="replace")


def masked(answer: object) -> object:
    """Replace times by T and pods by POD; leave out copies that did not fail, whose status ModelMesh does not know."""
    match answer:
        case dict():
            if answer and all(re.fullmatch(r"_?pod\d+", key) for key in answer):
                return {"POD": sorted(json.dumps(masked(value)) for value in answer.values())}
            kept = {key: masked(value) for key, value in answer.items() if key != "modelCopyInfos"}
            failed = [copy for copy in answer.get("modelCopyInfos", ()) if copy.get("copyStatus") == "LOADING_FAILED"]
            if failed:
                kept["modelCopyInfos"] = [masked(copy) for copy in failed]
            if kept.get("code") == "DEADLINE_EXCEEDED" and "as asked" not in str(kept["details"]):
                kept["details"] = ""  # either side may notice it first, in its own words
            return kept
        case list():
            return [masked(value) for value in answer]
        case bool():
            return answer
        case int():
            return "T" if answer > _EARLIEST_TIME_MS else answer
        case str():
            return re.sub(r"_?\bpod\d\b", "POD", re.sub(r"\b1[5-9]\d{11}\b", "T", answer))
    return answer


def matches(step: Step, wanted: Any, got: Any) -> bool:
    step = step.get("step", step)
    if step.get("loose"):
        return _status(wanted) == _status(got)
    kind = step.get("etcd")
    if kind == "writes":
        return isinstance(got, int) and got <= wanted
    if kind == "keys" or "metrics" in step:
        return set(wanted) <= set(got)
    if isinstance(wanted, dict) and isinstance(got, dict):
        if kind in ("get", "fields"):
            return _includes(got, wanted)
        if "code" in wanted:
            return bool(wanted["code"] == got.get("code") and got["details"].startswith(wanted["details"]))
        wanted = {name: value for name, value in wanted.items() if name != "trailers"}
    return bool(wanted == got)


def _includes(got: Any, wanted: Any) -> bool:
    """Whether a record has the recorded properties at every depth; it may have more. Masked pods are lists of JSON texts."""
    if isinstance(wanted, dict):
        return isinstance(got, dict) and all(name in got and _includes(got[name], wanted[name]) for name in wanted)
    if isinstance(wanted, list) and isinstance(got, list):
        return len(wanted) == len(got) and all(
            _includes(_parsed(mine), _parsed(recorded)) for mine, recorded in zip(got, wanted, strict=True)
        )
    return bool(got == wanted)


def _parsed(text: object) -> object:
    try:
        return json.loads(text) if isinstance(text, str) else text
    except ValueError:
        return text


def _status(answer: object) -> object:
    inner = answer.get("answer") if isinstance(answer, dict) else None
    return inner.get("status") if isinstance(inner, dict) else answer
