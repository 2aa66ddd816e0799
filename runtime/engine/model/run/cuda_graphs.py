"""Captures CUDA graphs of small steps, lazily.

Idle turns of the engine loop capture the buckets that steps have requested; the second eager use of a bucket requests it. Further idle turns
capture each resident model's likely buckets, starting with the model that has the fewest graphs. One turn either runs a bucket once or records
it, so a request waits for at most one of these. If the engine is never idle, a bucket is captured before a step after EAGER_USES eager uses.

A step whose bucket has no graph runs in a larger bucket's graph where the padding costs less than a pass without one. A graph of 8B takes about 18 MiB,
so the memory of all graphs holds few of each model if many are loaded. Once half of it is used, only steps that no graph covers lead to a capture,
and of a wide bucket, which covers many. If all of it is used, the model with the most graphs gives up the one that it has not used for longest.

Which bucket is captured when is decided on rank 0 of a tensor-parallel group, and the other ranks follow: a pass waits for all ranks. A rank
without the graph of a step runs the same padded pass without it.

The graphs of all models share one memory pool. They run one after another on one stream, and the next step reads a graph's results before
another replay overwrites them. Weights, KV and inputs keep their addresses, so a graph stays valid when its model is evicted and returns.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest

import torch

from runtime.engine.interfaces import Bucket, GraphCapture, GraphChoice
from runtime.engine.model.run.alias import alias
from runtime.engine.model.run.buckets import covers

_LOG = logging.getLogger(__name__)

EAGER_USES = 4  # A capture takes as long as two or three eager steps.
COVERED_USES = 32  # It takes as long as the padding of about this many steps in another bucket's graph.
POOL_LIMIT_BYTES = 2 << 30
_LARGEST_GRAPH_BYTES = 512 << 20  # Memory beyond this was taken by another process during the capture.
_NUM_FIRST = 2  # likely buckets that a model's first request needs
LIKELY_SHARE = 0.5  # share of the limit that graphs of likely buckets, and of buckets with a cover, may use


@dataclass(frozen=True, slots=True)
class StepGraph:
    """A captured forward pass.

    Attributes:
        logits: [num_rows, V], the pass's output. The next replay of any graph may overwrite it.
        driver_bytes: driver memory that is freed with the graph, in addition to the pool that all graphs share.
    """

    graph: "torch.cuda.CUDAGraph"
    logits: torch.Tensor
    driver_bytes: int = 0


class GraphPool:
    """The memory and the queue of captures that all models of an engine share.

    `collective`: other ranks wait in every pass, so an error in one is raised.
    """

    def __init__(
        self, device: torch.device, *, enabled: bool, collective: bool = False, limit_bytes: int = POOL_LIMIT_BYTES
    ) -> None:
        self.enabled = enabled
        self.collective = collective
        self._device = device
        self.used_bytes = 0
        self._limit_bytes = limit_bytes
        self._wanted: deque[tuple[ModelGraphs, Bucket]] = deque()
        self._members: list[ModelGraphs] = []
        self._joining = threading.Lock()  # loading threads add models
        self._handle = torch.cuda.graph_pool_handle() if enabled else None
        self._stream = torch.cuda.Stream(device) if enabled else None
        self._anchor: torch.cuda.CUDAGraph | None = None
        self._failed: list[torch.cuda.CUDAGraph] = []

    @property
    def full(self) -> bool:
        return self.used_bytes >= self._limit_bytes

    @property
    def has_spare(self) -> bool:
        """Whether there is memory for graphs that no step needs, because another graph covers it."""
        return self.used_bytes < LIKELY_SHARE * self._limit_bytes

    def stop(self) -> None:
        """Stop capturing, after the device ran out of memory."""
        self._limit_bytes = 0

    def has_room(self, graphs: "ModelGraphs") -> bool:
        """Whether `make_room` would find memory for another graph of a model."""
        return not self.full or (self._limit_bytes > 0 and self._with_most(graphs) is not None)

    def make_room(self, graphs: "ModelGraphs") -> None:
        """Release graphs of models that have at least two more than this one, until there is memory for a graph or no such model is left."""
        while self.full and (other := self._with_most(graphs)) is not None:
            other.release_oldest()

    def _with_most(self, graphs: "ModelGraphs") -> "ModelGraphs | None":
        """Return the model with the most graphs if it would still have more than `graphs` has, after giving one up."""
        with self._joining:
            most = max(self._members, key=lambda member: member.num_graphs, default=None)
        return most if most is not None and most.num_graphs > graphs.num_graphs + 1 else None

    def join(self, graphs: "ModelGraphs") -> None:
        with self._joining:
            self._members.append(graphs)

    def give_back(self, graph: StepGraph) -> None:
        """Account for a graph that was released."""
        self.used_bytes -= graph.driver_bytes

    def want(self, graphs: "ModelGraphs", bucket: Bucket) -> None:
        self._wanted.append((graphs, bucket))

    def forget(self, graphs: "ModelGraphs") -> None:
        self._wanted = deque(item for item in self._wanted if item[0] is not graphs)
        with self._joining:
            self._members = [member for member in self._members if member is not graphs]

    def settle(self) -> None:
        """Wait for all passes that were launched. Raises the device's error if the device is lost."""
        torch.cuda.current_stream(self._device).synchronize()

    def next_capture(self) -> GraphCapture | None:
        """Return what to do next for the bucket that was requested first, or else for a likely one. None = there is nothing to do."""
        for graphs, bucket in tuple(self._wanted):
            if not graphs.compiled(bucket):
                continue
            if (capture := graphs.next_of(bucket)) is not None:
                return capture
            self._wanted.remove((graphs, bucket))
        if self.has_spare:
            for graphs in sorted(self._members, key=lambda member: member.num_graphs):
                bucket_ahead = graphs.ahead()
                if bucket_ahead is not None and (capture := graphs.next_of(bucket_ahead)) is not None:
                    return capture
        return None

    def record(self, run: Callable[[], torch.Tensor]) -> StepGraph:
        """Capture `run`, which returns logits, without executing it. Other threads may use the device during the capture."""
        if self._anchor is None:
            # Torch destroys a pool with its last graph, and the handle cannot be used again. This graph keeps the pool.
            self._anchor, _ = self._capture(lambda: torch.zeros(1, device=self._device))
        before = self._memory()
        graph, logits = self._capture(run)
        # The pool keeps its memory when a graph is released, and uses it for later graphs.
        pooled, driver_bytes = (max(0, now - then) for now, then in zip(self._memory(), before, strict=True))
        driver_bytes = min(driver_bytes, _LARGEST_GRAPH_BYTES)
        self.used_bytes += pooled + driver_bytes
        return StepGraph(graph, alias(logits), driver_bytes)

    def _memory(self) -> tuple[int, int]:
        """Return the bytes of the pool, and those that torch has not allocated, which include the driver's own for graphs."""
        pooled = sum(int(segment["total_size"]) for segment in torch.cuda.memory_snapshot(self._handle))
        free, total = torch.cuda.mem_get_info()
        return pooled, total - free - torch.cuda.memory_reserved(self._device)

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
                    with suppress(RuntimeError):  # The first error is the one to report.
                        graph.capture_end()
                    raise
                graph.capture_end()
        except BaseException:
            self._replace_pool(graph)
            raise
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph, made

    def _replace_pool(self, failed: "torch.cuda.CUDAGraph") -> None:
        """Continue with a new pool after `capture_end` failed.

        Torch then treats the old pool as still recording: it starts no other capture and frees no memory. Graphs in the old pool keep it alive.
        """
        assert self._handle is not None
        index = self._device.index or 0
        try:
            torch._C._cuda_endAllocateToPool(index, self._handle)
        except RuntimeError:
            return  # The pool is not recording, because the pass failed and not the end of the capture.
        torch._C._cuda_releasePool(index, self._handle)
        self._failed.append(failed)  # Torch's pinned-memory allocator still queries this graph.
        self._handle = torch.cuda.graph_pool_handle()
        self._anchor = None


class ModelGraphs:
    """One model's graphs.

    Args:
        name: the model's id.
        blank: makes the device's upload a step without rows.
        run: runs a forward pass padded to the bucket's sizes and returns its logits.
        ready: whether the weights are in device memory.
        likely: buckets to capture before any step requests them, in this order.
        compiled: whether the kernels of a bucket are compiled. Idle turns capture no other buckets.
    """

    def __init__(
        self,
        name: str,
        pool: GraphPool,
        blank: Callable[[], None],
        run: Callable[[Bucket], torch.Tensor],
        ready: Callable[[], bool],
        likely: Sequence[Bucket] = (),
        compiled: Callable[[Bucket], bool] = lambda bucket: True,
    ) -> None:
        self.compiled = compiled
        self._name = name
        self._pool = pool
        self._refused = False
        self._blank = blank
        self._run = run
        self._ready = ready
        self._likely, self._first = list(likely), tuple(likely[:_NUM_FIRST])
        self._graphs: dict[Bucket, StepGraph] = {}  # least recently used first
        # buckets without a graph → the smallest one whose graph may run their steps
        self._covers: dict[Bucket, Bucket | None] = {}
        self._uses: dict[Bucket, int] = {}
        self._warmed_up: Bucket | None = None
        if pool.enabled:
            pool.join(self)

    @property
    def num_graphs(self) -> int:
        return len(self._graphs)

    def expect(self, likely: Sequence[Bucket]) -> None:
        """Capture these buckets before any step requests them, too. They take turns with those that are due, which are as likely."""
        further = [bucket for bucket in likely if bucket not in self._likely]
        turns = zip_longest(self._likely, further)
        self._likely = [bucket for turn in turns for bucket in turn if bucket is not None]

    def ahead(self) -> Bucket | None:
        """Return the first likely bucket without a graph whose kernels are compiled, or None."""
        self._likely = [bucket for bucket in self._likely if bucket not in self._graphs]
        return next(filter(self.compiled, self._likely), None)

    def is_prepared(self) -> bool:
        """Whether the first likely buckets have graphs, or will have none."""
        missing = any(bucket not in self._graphs for bucket in self._first)
        return not missing or self._refused or not self._pool.enabled or not self._pool.has_spare

    def choose(self, bucket: Bucket, wide: Bucket | None = None) -> GraphChoice:
        """Count a use of `bucket`, and choose how its step runs. `wide`: covers it and other buckets; captured instead if memory is short."""
        if self._refused or not self._pool.enabled or not self._ready():
            return GraphChoice()
        if bucket in self._graphs:
            return self._replay(bucket)
        cover = self._cover(bucket)
        if cover is not None and not self._pool.has_spare:
            return self._replay(cover)
        wanted = bucket if wide is None or self._pool.has_spare else wide
        uses = self._uses[wanted] = self._uses.get(wanted, 0) + 1
        if uses == 2:
            self._pool.want(self, wanted)
        if uses > (EAGER_USES if cover is None else COVERED_USES) and self._possible(wanted):
            return GraphChoice(capture=wanted)
        return GraphChoice() if cover is None else self._replay(cover)

    def _replay(self, bucket: Bucket) -> GraphChoice:
        self._graphs[bucket] = self._graphs.pop(bucket)
        return GraphChoice(replay=bucket)

    def _cover(self, bucket: Bucket) -> Bucket | None:
        """Return the smallest bucket whose graph may run a step of `bucket`, or None."""
        if bucket not in self._covers:
            self._covers[bucket] = min((graph for graph in self._graphs if covers(graph, bucket)), default=None)
        return self._covers[bucket]

    def find(self, bucket: Bucket) -> StepGraph | None:
        """Return the graph that a step may replay now, or None if there is none or the weights are absent."""
        graph = self._graphs.get(bucket)
        return graph if graph is not None and self._ready() else None

    def run(self, bucket: Bucket) -> torch.Tensor:
        """Run the bucket's pass over the current upload, by its graph if it can. Returns its logits."""
        graph = self.find(bucket)
        if graph is None:
            return self._run(bucket)
        graph.graph.replay()
        return graph.logits

    def next_of(self, bucket: Bucket) -> GraphCapture | None:
        """Return what the bucket needs next. None = it has a graph, the weights are absent, the pool is full or a capture failed."""
        if not self._possible(bucket):
            return None
        return GraphCapture(self._name, bucket, record=self._warmed_up == bucket)

    def _possible(self, bucket: Bucket) -> bool:
        if bucket in self._graphs or self._refused or not self._pool.has_room(self):
            return False
        if not self._ready():
            self._uses[bucket] = 0  # Steps request it again when the weights return.
            return False
        return True

    def capture(self, bucket: Bucket, *, record: bool) -> None:
        """Record the bucket's graph. Not `record`: run its pass once before, to compile kernels and initialise libraries. Overwrites the upload.

        Code that reads a value from the device cannot be captured: such a model runs without graphs from then on.
        """
        if record:
            self._record_once(bucket)
        else:
            self._run_once(bucket)

    def _run_once(self, bucket: Bucket) -> None:
        self._warmed_up = None
        if self._pool.collective:
            self._run_blank(bucket)
        elif not self._attempt(self._run_blank, bucket):
            return
        self._warmed_up = bucket

    def _record_once(self, bucket: Bucket) -> None:
        self._warmed_up = None
        if bucket in self._graphs or self._refused or not self._have_arrived():
            return
        self._pool.make_room(self)
        if not self._pool.full:
            self._attempt(self._record, bucket)

    def _have_arrived(self) -> bool:
        """Whether the weights are in device memory, after waiting for the passes that wait for them.

        Rank 0 records once its own weights have arrived. Those of another rank may take longer, and a capture cannot wait for a copy.
        """
        if not self._ready() and self._pool.collective:
            self._pool.settle()
        return self._ready()

    def _run_blank(self, bucket: Bucket) -> None:
        self._blank()
        self._run(bucket)

    def _record(self, bucket: Bucket) -> None:
        self._graphs[bucket] = self._pool.record(lambda: self._run(bucket))
        self._covers.clear()

    def _attempt(self, work: Callable[[Bucket], None], bucket: Bucket) -> bool:
        """Run `work`. No request depends on these passes, so an error disables graphs and fails nothing else."""
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

    def release_oldest(self) -> None:
        """Release the graph that was not used for longest. The driver keeps it until its last replay has ended."""
        bucket = next(iter(self._graphs))
        self._pool.give_back(self._graphs.pop(bucket))
        self._covers.clear()
        self._uses.pop(bucket, None)

    def close(self) -> None:
        """Release the graphs after the device has finished with them."""
        self._pool.forget(self)
        if self._graphs:
            torch.cuda.current_stream().synchronize()
        for graph in self._graphs.values():
            self._pool.give_back(graph)
        self._graphs.clear()
        self._covers.clear()
        self._refused = True
        # These are bound methods of the runner. The cycle would keep the runner alive until a full garbage collection.
        del self._run, self._blank, self._ready
