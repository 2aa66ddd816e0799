"""Stand-ins for the puller and the tokenizer, for tests of the lifecycle alone."""

import asyncio
from pathlib import Path
from typing import cast

from common.model_key import ModelSettings
from runtime.errors import LoadFailed
from runtime.models.model_state import Phase, Prepared, Progress, Report
from runtime.text.text_model import TextModel
from runtime.types import Checkpoint, ModelSource


class ScriptedPreparer:
    """Counts what it prepares and what was given back. `files` is the identity of all sources. A URI of "missing:" fails, of "endless:" never ends; others take `delay_s`.

    A URI of "sized:N" has weights of N bytes.
    """

    def __init__(self, delay_s: float = 0.0) -> None:
        self.delay_s = delay_s
        self.started = 0
        self.held = 0
        self.files = "first"

    async def prepare(self, source: ModelSource, settings: ModelSettings, device: str, report: Report) -> Prepared:
        self.started += 1
        report(Progress(Phase.PULLING, 1, 4, "config.json"))
        if source.uri.startswith("missing:"):
            raise LoadFailed(f"{source.uri}: no such files")
        await asyncio.sleep(3600 if source.uri.startswith("endless:") else self.delay_s)
        self.held += 1
        return Prepared(
            Checkpoint(
                model_dir="/nowhere",
                quantization=settings.quantize,
                dtype="float32",
                weight_bytes=int(source.uri.removeprefix("sized:")) if source.uri.startswith("sized:") else 0,
            ),
            self._release,
            self.files,
        )

    async def identity(self, source: ModelSource) -> str:
        return self.files

    def _release(self) -> None:
        self.held -= 1


def no_text(model_dir: Path, settings: ModelSettings) -> TextModel:
    return cast("TextModel", object())
