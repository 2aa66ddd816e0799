"""Device operations: everything that changes a device's state, as plain data in one order.

Planning enqueues operations and `core.executor` applies them. The ordered log is complete: a second backend that applies the same operations
reaches the same state and draws the same tokens. Models are named by id; an id means one model from its FinishLoad to its Unload.
"""

import msgspec

from runtime.engine.interfaces import Bucket, RowSetup, StepPlan
from runtime.types import Checkpoint


class StartLoad(msgspec.Struct, frozen=True, tag="start_load"):
    """Begin to load a model in the background, or an adapter of the model `adapter_of`."""

    model_id: str
    checkpoint: Checkpoint
    max_model_len: int | None = None
    adapter_of: str = ""


class CancelLoad(msgspec.Struct, frozen=True, tag="cancel_load"):
    """Stop a load that was started as soon as possible. FinishLoad still follows."""

    model_id: str


class FinishLoad(msgspec.Struct, frozen=True, tag="finish_load"):
    """Wait for a load and keep its model. If the load failed, no model of this id exists afterwards."""

    model_id: str


class Unload(msgspec.Struct, frozen=True, tag="unload"):
    """Close a model's runner and release its memory. Its weights were evicted and its KV unmapped before."""

    model_id: str


class SwapIn(msgspec.Struct, frozen=True, tag="swap_in"):
    """Map `slabs` under the weights and start to copy the weights in."""

    model_id: str
    slabs: tuple[int, ...]


class Evict(msgspec.Struct, frozen=True, tag="evict"):
    """Unmap the weights after the last launched step."""

    model_id: str


class DropHost(msgspec.Struct, frozen=True, tag="drop_host"):
    """Release the copy of the weights in the host arena."""

    model_id: str


class CommitSlabs(msgspec.Struct, frozen=True, tag="commit_slabs"):
    """Take memory for slabs from the driver, on all ranks or on none."""

    slabs: tuple[int, ...]


class DecommitSlabs(msgspec.Struct, frozen=True, tag="decommit_slabs"):
    """Give the memory of slabs that nothing uses back to the driver, after the last launched step."""

    slabs: tuple[int, ...]


class MapKv(msgspec.Struct, frozen=True, tag="map_kv"):
    """Map `slab` at place `index` of the KV range."""

    model_id: str
    index: int
    slab: int


class UnmapKv(msgspec.Struct, frozen=True, tag="unmap_kv"):
    """Unmap place `index` of the KV range after the last launched step."""

    model_id: str
    index: int


class MapHostKv(msgspec.Struct, frozen=True, tag="map_host_kv"):
    """Take a chunk of host memory for place `index` of the model's saved KV."""

    model_id: str
    index: int


class UnmapHostKv(msgspec.Struct, frozen=True, tag="unmap_host_kv"):
    """Release the chunk at place `index` of the model's saved KV, and its content."""

    model_id: str
    index: int


class SaveKv(msgspec.Struct, frozen=True, tag="save_kv"):
    """Begin to copy KV blocks (page, host page) to host memory, after the last launched step."""

    model_id: str
    blocks: tuple[tuple[int, int], ...]


class RestoreKv(msgspec.Struct, frozen=True, tag="restore_kv"):
    """Begin to copy KV blocks (page, host page) from host memory. Steps launched later wait for the copies."""

    model_id: str
    blocks: tuple[tuple[int, int], ...]


class MapAdapters(msgspec.Struct, frozen=True, tag="map_adapters"):
    """Map `slab` at place `index` of the range of a base's adapters."""

    model_id: str
    index: int
    slab: int


class UnmapAdapters(msgspec.Struct, frozen=True, tag="unmap_adapters"):
    """Unmap place `index` of the range of a base's adapters after the last launched step."""

    model_id: str
    index: int


class SwapInAdapter(msgspec.Struct, frozen=True, tag="swap_in_adapter"):
    """Have steps find an adapter in `slot`, and start to copy it to byte `offset` of its base's range."""

    model_id: str
    slot: int
    offset: int


class EvictAdapter(msgspec.Struct, frozen=True, tag="evict_adapter"):
    """Stop using the place of an adapter, after the last launched step."""

    model_id: str


class OpenRow(msgspec.Struct, frozen=True, tag="open_row"):
    """Set a row up for a sequence that was admitted."""

    model_id: str
    setup: RowSetup


class CloseRow(msgspec.Struct, frozen=True, tag="close_row"):
    """Forget a row. Another model may open it next."""

    model_id: str
    row: int


class CaptureGraph(msgspec.Struct, frozen=True, tag="capture_graph"):
    """Run a padded pass without rows, or `record` its CUDA graph. Texts do not depend on graphs."""

    model_id: str
    bucket: Bucket
    record: bool


class RunStep(msgspec.Struct, frozen=True, tag="run_step"):
    """Launch one forward pass, of the sizes of `padded_to` if given, and its draws."""

    model_id: str
    plan: StepPlan
    padded_to: Bucket | None = None


class RunForward(msgspec.Struct, frozen=True, tag="run_forward"):
    """Launch the forward pass of a plan with masked rows. RunDraws of the same model follows next."""

    model_id: str
    plan: StepPlan
    padded_to: Bucket | None = None


class RunDraws(msgspec.Struct, frozen=True, tag="run_draws"):
    """Launch the draws of the last forward pass. `masks`: packed int32 masks of the plan's masked rows, end to end."""

    model_id: str
    masks: bytes


Operation = (
    StartLoad
    | CancelLoad
    | FinishLoad
    | Unload
    | SwapIn
    | Evict
    | DropHost
    | CommitSlabs
    | DecommitSlabs
    | MapKv
    | UnmapKv
    | MapHostKv
    | UnmapHostKv
    | SaveKv
    | RestoreKv
    | MapAdapters
    | UnmapAdapters
    | SwapInAdapter
    | EvictAdapter
    | OpenRow
    | CloseRow
    | CaptureGraph
    | RunStep
    | RunForward
    | RunDraws
)
