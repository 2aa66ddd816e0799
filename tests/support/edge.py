"""A caller of a whole Repertory that sends anything, sound or not, and takes what comes: status, headers, text."""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

PROMPT = "The company keeps many plays ready"


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    text: str

    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def error(self) -> str:
        """The message of an error in OpenAI's shape; a KeyError if this is not one."""
        return str(self.json()["error"]["message"])

    @property
    def completion(self) -> str:
        return str(self.json()["choices"][0]["text"])


@dataclass(frozen=True, slots=True)
class Edge:
    """`key`: sent as a bearer key unless empty."""

    url: str
    key: str = ""

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)

    def ask(
        self,
        method: str,
        path: str,
        body: object = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 90,
    ) -> Answer:
        """`body`: bytes or an iterable of bytes (sent in chunks) as they are, anything else as JSON."""
        raw: Any = body if body is None or isinstance(body, bytes) or _is_chunks(body) else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data=raw, method=method, headers={**self._headers(), **(headers or {})}
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as response:
                return Answer(response.status, dict(response.headers), response.read().decode())
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, dict(error.headers), error.read().decode())

    def complete(self, model: str, **fields: object) -> Answer:
        """A short greedy completion; `fields` go over that."""
        return self.ask(
            "POST", "/v1/completions", {"model": model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0, **fields}
        )

    def outcome(self, model: str, timeout_s: float = 60) -> Answer:
        """A completion's answer once the model has been loaded or cannot be: past the wait budget it is asked for again."""
        give_up_s = time.monotonic() + timeout_s
        while (
            (answer := self.complete(model)).status == 503
            and "wait budget" in answer.text
            and time.monotonic() < give_up_s
        ):
            pass
        return answer

    def stream(self, model: str, **fields: object) -> http.client.HTTPResponse:
        """The beginning of a streamed completion; close it to leave."""
        connection = http.client.HTTPConnection(*self.address, timeout=90)
        body = {"model": model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "stream": True, **fields}
        connection.request("POST", "/v1/completions", json.dumps(body), self._headers())
        return connection.getresponse()

    def register(self, name: str, uri: object, **settings: object) -> Answer:
        return self.ask("POST", "/admin/v1/models", {"name": name, "uri": str(uri), **settings})

    def _headers(self) -> dict[str, str]:
        return {"Content-Type": "application/json", **({"Authorization": f"Bearer {self.key}"} if self.key else {})}


def _is_chunks(body: object) -> bool:
    return isinstance(body, Iterable) and not isinstance(body, (str, dict, list))
