"""CUDA graphs of small steps, captured lazily.

Idle turns capture what steps have asked for (a bucket's second eager use asks), then what each resident model will
most likely meet, the model with the fewest graphs first; a turn either runs a bucket once or captures it, so that a
request never waits for more than that. Where no idle turn comes, a bucket is captured in place once it has run
eagerly often enough to pay. All models' graphs share one memory pool: they run one after another on one stream and
leave nothing behind in it but what the next step reads at once. Weights, KV and inputs keep their addresses, so a
graph outlives its model's evictions.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from runtime.engine.model.run.buckets import Bucket

_LOG = logging.getLogger(__name__)

EAGER_USES = 4  # then a graph is captured at once: it costs two or three eager steps
POOL_LIMIT_BYTES = 2 << 30
_LARGEST_GRAPH_BYTES = 512 << 20  # what more is gone was taken by another thread meanwhile
UNASKED_SHARE = 0.5  # of the limit, for graphs that nobody has asked for yet


@dataclass(frozen=True, slots=True)
class StepGraph:
    """A captured pass. `logits` [num_rows, V] are where it leaves them; the next replay of any graph may overwrite them. `driver_bytes` end with it:
    what the driver keeps of a graph, beside the pool's memory that all graphs share."""

    graph: "torch.cuda.CUDAGraph"
    logits: torch.Tensor
    driver_bytes: int = 0


class GraphPool:
    """The memory and the queue of captures that all models share."""

    def __init__(self, device: torch.device, *, enabled: bool, limit_bytes: int = POOL_LIMIT_BYTES) -> None:
        self.enabled = enabled
        self._device = device
        self.used_bytes = 0
        self._limit_bytes = limit_bytes
        self._wanted: deque[tuple[ModelGraphs, Bucket]] = deque()
        self._members: list[ModelGraphs] = []
        self._joining = threading.Lock()  # models come from loading threads
        self._handle = torch.cuda.graph_pool_handle() if enabled else None
        self._stream = torch.cuda.Stream(device) if enabled else None
        self._anchor: torch.cuda.CUDAGraph | None = None
        self._failed: list[torch.cuda.CUDAGraph] = []

    @property
    def full(self) -> bool:
        return self.used_bytes >= self._limit_bytes

    def stop(self) -> None:
        """Capture no more: there is no memory for it."""
        self._limit_bytes = 0

    def join(self, graphs: "ModelGraphs") -> None:
        with self._joining:
            self._members.append(graphs)

    def give_back(self, graph: StepGraph) -> None:
        """A graph has ended."""
        self.used_bytes -= graph.driver_bytes

    def want(self, graphs: "ModelGraphs", bucket: Bucket) -> None:
        self._wanted.append((graphs, bucket))

    def forget(self, graphs: "ModelGraphs") -> None:
        self._wanted = deque(item for item in self._wanted if item[0] is not graphs)
        with self._joining:
            self._members = [member for member in self._members if member is not graphs]

    def capture_one(self, mark: Callable[[str], None] = lambda name: None) -> bool:
        """One idle turn's work: run or capture the bucket that has been asked for longest, else a likely one. False if there is nothing to do.

        `mark` is told the model before anything of it runs. Raises what the device raises when it is lost.
        """
        while self._wanted:
            graphs, bucket = self._wanted[0]
            if graphs.advance(bucket, mark):
                return True
            self._wanted.popleft()
        if self.used_bytes < UNASKED_SHARE * self._limit_bytes:
            for graphs in sorted(self._members, key=lambda member: member.num_graphs):
                bucket_ahead = graphs.ahead()
                if bucket_ahead is not None and graphs.advance(bucket_ahead, mark):
                    return True
        return False

    def settle(self) -> None:
        """Wait for what was launched. Raises if the device is lost."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).synchronize()

    def record(self, run: Callable[[], torch.Tensor]) -> StepGraph:
        """Capture `run`, which returns logits, without running it. Other threads may use the device meanwhile."""
        if self._anchor is None:
            # torch gives a pool up with its last graph, and its handle can't be used again: this one stays
            self._anchor, _ = self._capture(lambda: torch.zeros(1, device=self._device))
        before, _ = torch.cuda.mem_get_info()
        pooled_before = torch.cuda.memory_reserved(self._device)
        graph, logits = self._capture(run)
        after, _ = torch.cuda.mem_get_info()  # with what the driver keeps of a graph
        grown = min(max(0, before - after), _LARGEST_GRAPH_BYTES)
        # the pool keeps its memory when graphs end, and uses it for the next ones
        pooled = min(max(0, torch.cuda.memory_reserved(self._device) - pooled_before), grown)
        self.used_bytes += grown
        return StepGraph(graph, alias(logits), grown - pooled)

    def _capture(self, run: Callable[[], torch.Tensor]) -> "tuple[torch.cuda.CUDAGraph, torch.Tensor]":
        assert self._stream is not None
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self._stream):
                graph.capture_begin(pool=self._handle, capture_error_mode="thread_local")
                try:
                    made = run()
                except BaseException:
                    with suppress(RuntimeError):  # what was captured so far is void; why is what counts
                        graph.capture_end()
                    raise
                graph.capture_end()
        except BaseException:
            self._begin_anew(graph)
            raise
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph, made

    def _begin_anew(self, failed: "torch.cuda.CUDAGraph") -> None:
        """After a capture whose end failed. Torch believes then that the pool is still recorded to: it would take no other capture, and meanwhile
        free no memory. Graphs that lie in the pool keep it alive."""
        assert self._handle is not None
        index = self._device.index or 0
        try:
            torch._C._cuda_endAllocateToPool(index, self._handle)
        except RuntimeError:
            return  # it isn't: only the pass failed
        torch._C._cuda_releasePool(index, self._handle)
        self._failed.append(failed)  # torch's allocator of pinned memory goes on asking it
        self._handle = torch.cuda.graph_pool_handle()
        self._anchor = None


class ModelGraphs:
    """One model's graphs; `name` is for the log. `blank()` makes the device's upload a step of no rows, `run(bucket)` is a pass padded to the
    bucket's sizes, `ready()` says whether the weights are in, and `likely` are the buckets to capture unasked, in this order."""

    def __init__(
        self,
        name: str,
        pool: GraphPool,
        blank: Callable[[], None],
        run: Callable[[Bucket], torch.Tensor],
        ready: Callable[[], bool],
        likely: Sequence[Bucket] = (),
    ) -> None:
        self._name = name
        self._pool = pool
        self._refused = False
        self._blank = blank
        self._run = run
        self._ready = ready
        self._likely = deque(likely)
        self._graphs: dict[Bucket, StepGraph] = {}
        self._uses: dict[Bucket, int] = {}
        self._rehearsed: Bucket | None = None
        if pool.enabled:
            pool.join(self)

    @property
    def num_graphs(self) -> int:
        return len(self._graphs)

    def ahead(self) -> Bucket | None:
        """The likeliest bucket without a graph."""
        while self._likely and self._likely[0] in self._graphs:
            self._likely.popleft()
        return self._likely[0] if self._likely else None

    def find(self, bucket: Bucket) -> StepGraph | None:
        """The graph to replay for a step, if there is one and the weights are in; counts the use. May blank the upload."""
        if self._refused or not self._pool.enabled or not self._ready():
            return None
        graph = self._graphs.get(bucket)
        if graph is not None:
            return graph
        uses = self._uses[bucket] = self._uses.get(bucket, 0) + 1
        if uses == 2:
            self._pool.want(self, bucket)
        if uses > EAGER_USES:
            self.capture(bucket)
        return self._graphs.get(bucket)

    def advance(self, bucket: Bucket, mark: Callable[[str], None]) -> bool:
        """Run the bucket to its end, or capture it if that was done last. False if there was nothing to do."""
        if not self._possible(bucket):
            return False
        mark(self._name)
        done = self._attempt(self._record if self._rehearsed == bucket else self._rehearse, bucket)
        self._pool.settle()  # a fault that shows later would be put down to another model
        return done

    def capture(self, bucket: Bucket) -> bool:
        """Capture the bucket's graph now. False if there is one, the weights are away, the pool is full, or the model's code can't be captured
        (it asks the device for a number); such a model runs eagerly from then on."""
        return self._possible(bucket) and self._attempt(self._rehearse, bucket) and self._attempt(self._record, bucket)

    def _possible(self, bucket: Bucket) -> bool:
        if bucket in self._graphs or self._refused or self._pool.full:
            return False
        if not self._ready():
            self._uses[bucket] = 0  # asked for again when the model is back
            return False
        return True

    def _rehearse(self, bucket: Bucket) -> None:
        """Compile kernels and wake libraries, which a capture may not."""
        self._blank()
        self._run(bucket)
        self._rehearsed = bucket

    def _record(self, bucket: Bucket) -> None:
        self._rehearsed = None
        self._graphs[bucket] = self._pool.record(lambda: self._run(bucket))

    def _attempt(self, work: Callable[[Bucket], None], bucket: Bucket) -> bool:
        """Nobody asked for these passes, so nobody may suffer from them: whatever they raise costs graphs and nothing else."""
        try:
            work(bucket)
        except torch.OutOfMemoryError:
            self._pool.stop()
            return False
        except Exception as error:
            self._refuse(error)
            return False
        return True

    def _refuse(self, error: Exception) -> None:
        self._refused = True
        _LOG.warning("model %s runs without CUDA graphs: %s", self._name, error)

    def close(self) -> None:
        """Give the graphs up, after the device is done with them."""
        self._pool.forget(self)
        if self._graphs:
            torch.cuda.current_stream().synchronize()
        for graph in self._graphs.values():
            self._pool.give_back(graph)
        self._graphs.clear()
        self._refused = True
        # they are the runner's own: with them it would live until a full collection, which an engine does without for long
        del self._run, self._blank, self._ready


class _Alias:
    """Foreign device memory in the form that torch.as_tensor takes."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": (tensor.numel() * tensor.element_size(),),
            "typestr": "|u1",
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


def alias(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory without owning it, where that is possible: a graph's results stay in the pool, free for the next graph's use."""
    if not tensor.is_contiguous():
        return tensor
    flat = torch.as_tensor(_Alias(tensor), device=tensor.device)
    return flat.view(tensor.dtype).view(tensor.shape)
