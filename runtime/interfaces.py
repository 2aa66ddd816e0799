"""Interfaces between the APIs and the rest of the front process: loaded models and the token engine.

`runtime.models` and `runtime.engine_client` implement them. The APIs and the generator use them.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from common.model_key import ModelSettings
from runtime.ipc.messages import RowTokens
from runtime.text.text_model import TextModel
from runtime.types import GenerationRequest, ModelFacts


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A loaded model. `text` tokenizes, detokenizes and renders chats. Responses carry `name`.

    `base_id` and `base_name`: of the model whose LoRA adapter this is; "" if it is none. `root`: the URI of its files, without secrets.
    """

    model_id: str
    name: str
    settings: ModelSettings
    facts: ModelFacts
    text: TextModel
    loaded_at_s: float
    base_id: str = ""
    base_name: str = ""
    root: str = ""


class ModelDirectory(Protocol):
    def get(self, model_id: str) -> ServedModel:
        """Return the loaded model. Raises ModelNotFound (a mesh then loads it again), or Unavailable while the engine restarts."""

    def list(self) -> Sequence[ServedModel]: ...


class TokenEngine(Protocol):
    """The engine process, as the front process uses it."""

    def generate(self, model_id: str, request: GenerationRequest) -> AsyncIterator[RowTokens]:
        """Run one sequence. Ends after the item with `finish` set.

        Closing the iterator (aclose, cancellation) aborts the row at the next step. Items of one sequence may be merged when its consumer,
        or all consumers together, are slow: the tokens and log-probabilities of several steps then come in one item.

        Raises ModelNotFound, Overloaded, Unavailable (the engine died), EngineFault.
        """
