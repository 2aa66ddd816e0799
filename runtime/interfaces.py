"""The seam inside the front process: loaded models and the engine, as the APIs see them.

The lifecycle side (runtime.models, runtime.engine_client.client) implements these; the APIs and the generator use them. Knows no wire format.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from runtime.ipc.messages import RowTokens
from runtime.text.text_model import TextModel
from runtime.types import LogprobParams, ModelFacts, ModelSettings, SamplingParams, StopParams


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A loaded model. `text` tokenizes, detokenizes and renders chats; `name` is what answers carry."""

    model_id: str
    name: str
    settings: ModelSettings
    facts: ModelFacts
    text: TextModel
    loaded_at_s: float


class ModelDirectory(Protocol):
    def get(self, model_id: str) -> ServedModel:
        """Raises ModelNotFound (to a mesh: load it again), Unavailable while the engine restarts."""

    def list(self) -> Sequence[ServedModel]: ...


class TokenEngine(Protocol):
    """The engine process, from the front."""

    def generate(
        self,
        model_id: str,
        prompt: Sequence[int],
        sampling: SamplingParams,
        stop: StopParams,
        logprobs: LogprobParams,
        *,
        priority: int = 0,
        event_s: float = 0.0,
    ) -> AsyncIterator[RowTokens]:
        """One sequence. Ends after the item with `finish` set. Closing the iterator (aclose, cancellation) aborts the row at the next step.

        Items of one sequence may be merged when the consumer is slow, or when all consumers together are: tokens and log-probabilities then
        come together in one item. `event_s`: what sending one item on costs the busiest process on its way, 0 = nothing is sent.

        Raises ModelNotFound, Overloaded, Unavailable (the engine died), EngineFault.
        """
