"""The messages between the runtime's front process and the engine.

A message is a tagged msgspec struct, sent in a frame of runtime/ipc/framing.py. The engine answers every Load with Loaded or
LoadFailed, every Unload with Unloaded, every Add with rows in Tokens messages until one carries a finish reason. Nothing else is promised
about order between different models or requests.
"""

import msgspec

from common.model_state import ModelFigures
from runtime.types import Checkpoint, FinishReason, GenerationRequest, ModelFacts


class Load(msgspec.Struct, frozen=True, tag=True):
    """Load a model. `max_model_len` None means the checkpoint's limit. Idempotent for an equal checkpoint.

    With `adapter_of`, the id of a loaded model, load a LoRA adapter of that model. Requests name it by its own `model_id`.
    """

    model_id: str
    checkpoint: Checkpoint
    max_model_len: int | None = None
    max_waiting: int = 1024
    adapter_of: str = ""


class Unload(msgspec.Struct, frozen=True, tag=True):
    """Unload a model; its sequences end as ABORTED. Unknown models are answered with Unloaded, too."""

    model_id: str


class Add(msgspec.Struct, frozen=True, tag=True):
    """A new sequence. `request_id` is unique in the front's life."""

    request_id: int
    model_id: str
    request: GenerationRequest


class Abort(msgspec.Struct, frozen=True, tag=True):
    """End these sequences at the next step. Unknown ids are ignored, because a sequence may just have ended."""

    request_ids: tuple[int, ...]


class Resize(msgspec.Struct, frozen=True, tag=True):
    """Hold `num_slabs` slabs of each device from now on, of an engine that shares its devices. `number` grows with each command.

    The models `evict` leave the device if they are idle. An engine that cannot give back enough keeps the rest and completes the command at once, unless
    `drain`: then busy models admit no more requests until enough is given back. DeviceShareFigures report the end.
    """

    number: int
    num_slabs: int
    evict: tuple[str, ...] = ()
    drain: bool = False


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Finish running sequences within `grace_s`, then exit with status 0."""

    grace_s: float


Command = Load | Unload | Add | Abort | Resize | Shutdown


class Hello(msgspec.Struct, frozen=True, tag=True):
    """The first message of an engine: it is ready for loads. The figures are those of its device."""

    pid: int
    device: str  # "cpu", "cuda:0"
    device_name: str
    device_budget_bytes: int
    host_budget_bytes: int
    slab_bytes: int
    min_kv_tokens: int  # a model is loaded only if this much KV fits beside its weights


class StartFailed(msgspec.Struct, frozen=True, tag=True):
    """Instead of Hello: this machine cannot run the engine with its configuration. `message` says why and what to change."""

    message: str


class Loaded(msgspec.Struct, frozen=True, tag=True):
    facts: ModelFacts


class LoadFailed(msgspec.Struct, frozen=True, tag=True):
    """`code` is a gRPC status name (runtime.errors.from_code), `message` the cause without the model's name.

    `budget_bytes`: of the device whose whole budget the model exceeds; 0 for other causes.
    """

    model_id: str
    code: str
    message: str
    budget_bytes: int = 0


class Unloaded(msgspec.Struct, frozen=True, tag=True):
    model_id: str


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One token's log-probability, its 1-based rank, and the best alternatives as (token id, log-probability), best first."""

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


class RowTokens(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The result of one step for one sequence. The last one of a sequence has `finish` set, and may have no token."""

    request_id: int
    tokens: tuple[int, ...]
    finish: FinishReason | None = None
    stop_token: int | None = None  # the id that ended it, if one did
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = (
        None  # once, with the first token; the first entry is None
    )
    cached_tokens: int | None = None  # prompt tokens found in the prefix cache; once, with the first token
    error_code: str | None = None  # with finish ERROR
    error: str | None = None  # the cause, without the model's name
    queue_s: float | None = None  # from arrival to the first step; once, with the first token
    vector: bytes | None = None  # float32 values, for a request with pooling; with the finish reason
    retry_after_s: float | None = None  # with finish ERROR: when a retry may succeed; None if unknown


class Tokens(msgspec.Struct, frozen=True, tag=True):
    """All rows of one step of one model."""

    model_id: str
    rows: tuple[RowTokens, ...]


class GrammarFigures(msgspec.Struct, frozen=True):
    """Counts and times of grammars since the engine started. Times are in seconds: of the building threads, and of the engine thread for masks."""

    tokenizers_total: int = 0
    tokenizer_seconds_total: float = 0.0
    grammars_total: int = 0
    grammar_seconds_total: float = 0.0
    known_grammars_total: int = 0  # requests whose grammar had been built before
    masks_total: int = 0
    mask_seconds_total: float = 0.0


class DeviceShareFigures(msgspec.Struct, frozen=True):
    """The slabs of an engine that shares its devices, on each of them.

    Attributes:
        committed_slabs: those that it holds.
        free_slabs, idle_slabs: those of them that nothing uses, and those that hold only cached prefixes or idle adapters.
        spare_slabs: free slabs below which it wants more while it is busy.
        needed_slabs: those that a request lacks, for which idle models may be evicted.
        wanted_slabs: those that it would use, the needed ones included.
        since_s: when the oldest request came that lacks slabs, on the machine's monotonic clock; inf = only rows that run lack any.
        last_resize: the number of the last Resize that is complete; 0 before the first.
    """

    committed_slabs: int
    free_slabs: int
    idle_slabs: int
    spare_slabs: int = 0
    needed_slabs: int = 0
    wanted_slabs: int = 0
    since_s: float = 0.0
    last_resize: int = 0


class EngineStats(msgspec.Struct, frozen=True, tag=True):
    """Sent every second, and at once after a load, an unload, an eviction or a swap-in."""

    device_budget_bytes: int
    device_used_bytes: int
    host_budget_bytes: int
    host_used_bytes: int
    stranded_bytes: int  # free blocks inside half-empty slabs
    models: tuple[ModelFigures, ...]
    grammars: GrammarFigures = GrammarFigures()
    share: DeviceShareFigures | None = None  # None: it has its devices to itself


Event = Hello | StartFailed | Loaded | LoadFailed | Unloaded | Tokens | EngineStats
