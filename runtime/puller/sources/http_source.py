"""Models behind a plain web server: one .gguf file, or a directory whose files have the usual names (a web server lists none)."""

import urllib.parse
from collections.abc import Sequence
from pathlib import Path

from runtime.errors import LoadFailed
from runtime.puller.checkpoint_check import LARGEST_JSON_BYTES, parse_json
from runtime.puller.progress import PullJob
from runtime.puller.source import (
    ADAPTER_CONFIG,
    ADAPTER_FILES,
    Arrived,
    Listing,
    RemoteFile,
    checked_name,
    refuse_split,
)
from runtime.puller.sources.http_client import HttpClient

_INDEX = "model.safetensors.index.json"
_BESIDE = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)


class WebSource:
    def __init__(self, url: str, client: HttpClient) -> None:
        parts = urllib.parse.urlsplit(url)
        self._url = url
        self._origin = urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
        self._client = client

    def listing(self, job: PullJob) -> Listing:
        name = Path(urllib.parse.unquote(urllib.parse.urlsplit(self._url).path)).name
        if name.endswith(".gguf"):
            refuse_split(name, self._origin)
            file = self._client.look(name, self._url, job)
            if file is None:
                raise LoadFailed(f"{self._origin}: the server has no such file")
            return Listing(self._origin, [file])
        config = self._look("config.json", job)
        if config is None and self._look(ADAPTER_CONFIG, job) is not None:
            adapter = (self._look(name, job) for name in ADAPTER_FILES)
            return Listing(self._origin, [file for file in adapter if file is not None])
        if config is None:
            raise LoadFailed(f"{self._origin} has no config.json and is not a .gguf file")
        files = [config, *self._weights(job)]
        for beside in _BESIDE:
            job.check()
            if (file := self._look(beside, job)) is not None:
                files.append(file)
        return Listing(self._origin, files)

    def fetch(self, file: RemoteFile, target: Path, job: PullJob, arrived: Arrived) -> None:
        self._client.fetch(file, target, job, arrived)

    def read(self, file: RemoteFile, start: int, count: int, job: PullJob) -> bytes:
        return self._client.read(file.location, start, count, job)

    def _weights(self, job: PullJob) -> Sequence[RemoteFile]:
        index = self._look(_INDEX, job)
        if index is None:
            single = self._look("model.safetensors", job)
            if single is None:
                raise LoadFailed(f"{self._origin} has neither model.safetensors nor {_INDEX}")
            return [single]
        weight_map = parse_json(
            f"{self._origin}/{_INDEX}", self._client.read(index.location, 0, LARGEST_JSON_BYTES + 1, job)
        ).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise LoadFailed(f"{self._origin}/{_INDEX} has no weight_map")
        files = [index]
        for name in sorted({str(name) for name in weight_map.values()}):
            file = self._look(checked_name(name, self._origin), job)
            if file is None:
                raise LoadFailed(f"{self._origin} has no {name}, which {_INDEX} names")
            files.append(file)
        return files

    def _look(self, name: str, job: PullJob) -> RemoteFile | None:
        parts = urllib.parse.urlsplit(self._url)
        path = f"{parts.path.rstrip('/')}/{urllib.parse.quote(name)}"
        return self._client.look(name, urllib.parse.urlunsplit(parts._replace(path=path)), job)
