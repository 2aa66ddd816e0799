"""Runs steps of a model over zero weights while the real weights are loading, so that kernels are compiled and
libraries are initialised before the first request.

One layer of each kind and the output projection run in threads and on streams of their own, with separate inputs and
results, so that the engine's buffers are not touched. Each combination of kernels and sizes is warmed up once per
process.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import zip_longest

import msgspec
import numpy as np
import torch

from common.model_key import Quantization
from runtime.checkpoint.meta_model import tied_names
from runtime.checkpoint.quantized_shapes import SCALE_NAMES
from runtime.checkpoint.weight_layout import Placed
from runtime.config.schema import EngineConfig
from runtime.engine.grammar.interfaces import mask_words
from runtime.engine.interfaces import Bucket, KvGeometry, RowSetup, StepPlan
from runtime.engine.memory.weight_readiness import AlwaysReady
from runtime.engine.model.build.builder import Blueprint, facts_of
from runtime.engine.model.run.buckets import standard
from runtime.engine.model.run.device_state import DeviceState
from runtime.engine.model.run.fused_spec import LayerSpec, StackSpec
from runtime.engine.model.run.fused_stack import FusedStack
from runtime.engine.model.run.kv_geometry import kv_planes
from runtime.engine.model.run.rope import rotary_tables
from runtime.engine.model.run.runner import ModelRunner
from runtime.engine.model.run.step import BuiltModel, KvPlanes, StepContext
from runtime.types import LogprobParams, ModelFacts, SamplingParams

_LOG = logging.getLogger(__name__)

_MOST_TOKENS = 2048
_MOST_CONTEXT = 4096
_PROMPT_SIZES = (16, 32, 64, 128, 256)  # tokens of the steps that stand for prompts of all lengths
_SLACK_BYTES = 2 << 20  # after the weights, as in a real model's range
_LONGEST_WAIT_S = 60.0
_NUM_PARTS = 2  # of every warmup
_VOCAB = 131_072
_FACTS = ModelFacts("", "", "warmup", "", Quantization.NONE, 0, 0, _MOST_CONTEXT, _VOCAB, 0)
_PROMPT_TOKENS = 12  # within one KV block of any size
_GREEDY = SamplingParams(temperature=0.0)
_SAMPLED = (SamplingParams(temperature=1.0, seed=1), SamplingParams(temperature=1.0, top_p=0.9, seed=1))


Part = Callable[[], Iterator[Bucket | None]]
"""Runs steps. Yields after each of them its bucket, or None if it had its own sizes. A load waits for the first bucket of each part."""


@dataclass(slots=True)
class Warmups:
    """Starts warmups and keeps those of this process. Safe to use from several loading threads."""

    device: torch.device
    config: EngineConfig
    _shared: "Warmup | None" = None
    _known: "dict[object, Warmup]" = field(default_factory=dict)
    _running: list["Warmup"] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    # Torch takes streams from a small pool, so a new stream for each warmup would at some point be the stream on which a graph is captured.
    _streams: "tuple[torch.cuda.Stream, ...]" = field(init=False)

    def __post_init__(self) -> None:
        on_gpu = self.device.type == "cuda"
        self._streams = tuple(torch.cuda.Stream(self.device) for _ in range(_NUM_PARTS)) if on_gpu else ()

    @property
    def busy(self) -> bool:
        """Whether a warmup is running."""
        with self._lock:
            self._running = [warmup for warmup in self._running if not warmup.over]
            return bool(self._running)

    def open(self) -> "Warmup":
        """Start warming up what all models share: the kernels for inputs and sampling."""
        self._shared = self._begin([partial(_shared_steps, self.device, self.config, sorts) for sorts in (False, True)])
        return self._shared

    def begin(self, blueprint: Blueprint, kv: KvGeometry, kv_dtype: torch.dtype, slab_bytes: int) -> "Warmup | None":
        """Start warming up a model, unless an equal one was warmed up before. Returns its warmup. None = its own code runs, which has no warmup."""
        if blueprint.spec is None:
            return None
        key = _key(blueprint, kv_dtype)
        with self._lock:
            if key in self._known:
                return self._known[key]
            twin = partial(_twin, blueprint, kv, kv_dtype, slab_bytes, _shared_zeros(self.device))
            facts = facts_of(blueprint, kv)
            warmup = self._known[key] = self._start(
                [partial(_model_steps, twin, facts, self.device, self.config, decode) for decode in (False, True)]
            )
        return warmup

    def has_compiled(self, own: "Warmup | None", bucket: Bucket) -> bool:
        """Return whether warmups have compiled the kernels of a model's step of a bucket, or none will. `own`: the model's warmup."""
        if own is None or self._shared is None:
            return not self.busy
        return own.has_run(bucket) and self._shared.has_run(bucket)

    def _begin(self, parts: Sequence[Part]) -> "Warmup":
        with self._lock:
            return self._start(parts)

    def _start(self, parts: Sequence[Part]) -> "Warmup":
        warmup = Warmup(parts, self.device, self._streams)
        self._running.append(warmup)
        return warmup


class Warmup:
    """A running warmup: each part has its own thread, because compilation blocks a thread, and one of `streams` on a GPU. Starts at once."""

    def __init__(
        self, parts: Sequence[Part], device: torch.device, streams: "Sequence[torch.cuda.Stream]" = ()
    ) -> None:
        self._device = device
        self.num_steps = 0
        self._buckets: set[Bucket] = set()  # that have run
        self._ready = [threading.Event() for _ in parts]
        self._threads = [
            threading.Thread(target=self._run, args=(part, ready, stream), name="warmup", daemon=True)
            for part, ready, stream in zip_longest(parts, self._ready, streams[: len(parts)])
        ]
        for thread in self._threads:
            thread.start()

    @property
    def over(self) -> bool:
        return not any(thread.is_alive() for thread in self._threads)

    def has_run(self, bucket: Bucket) -> bool:
        """Return whether a step of the bucket has run, or all steps that will run have."""
        return bucket in self._buckets or self.over

    def wait(self) -> None:
        """Wait for the steps that a first request needs. The other steps continue."""
        for ready in self._ready:
            ready.wait(_LONGEST_WAIT_S)

    def finish(self) -> None:
        """Wait for all steps."""
        for thread in self._threads:
            thread.join()

    def _run(self, part: Part, ready: threading.Event, stream: "torch.cuda.Stream | None") -> None:
        begun_s, ready_s = time.monotonic(), 0.0
        try:
            with torch.inference_mode(), self._on(stream):
                for bucket in part():
                    self.num_steps += 1
                    if bucket is None:
                        continue
                    self._buckets.add(bucket)
                    if not ready.is_set():
                        ready_s = time.monotonic() - begun_s
                        ready.set()
                if stream is not None:
                    stream.synchronize()
            _LOG.info(
                "warmed up in %.2f s, and in %.2f s what a first request needs", time.monotonic() - begun_s, ready_s
            )
        except Exception as error:  # The first request meets the same error and reports it to its caller.
            _LOG.warning("a warmup ended early: %s: %s", type(error).__name__, error)
        finally:
            ready.set()
            if self._device.type == "cuda":
                with suppress(RuntimeError):  # It fails while the engine captures a graph.
                    torch.cuda.empty_cache()

    def _on(self, stream: "torch.cuda.Stream | None") -> AbstractContextManager[object]:
        if stream is None:
            return nullcontext()
        torch.cuda.set_device(self._device)
        return torch.cuda.stream(stream)


def _state(device: torch.device, config: EngineConfig) -> DeviceState:
    own = msgspec.structs.replace(config, max_batch_tokens=min(config.max_batch_tokens, _MOST_TOKENS), graphs=False)
    return DeviceState.create(device, own)


def _shared_steps(device: torch.device, config: EngineConfig, sorts: bool) -> Iterator[Bucket | None]:
    """Run a model that consists of logits only: a short answer in each type that logits have."""
    state = _state(device, config)
    for dtype in (torch.bfloat16, torch.float16) if device.type == "cuda" else (torch.float32,):
        runner = ModelRunner(_nothing_but_logits(dtype, device), _FACTS, config, state)
        _answer(runner, _SAMPLED[sorts])
        yield None
        _answer(runner, _SAMPLED[sorts], masked=True)
        yield None
        if not sorts:
            _answer(runner, _GREEDY)
            state.uploads.blank()
            for bucket in _within(state):
                runner.run_padded(bucket)
                yield bucket
        runner.close()


def _model_steps(
    twin: Callable[[], BuiltModel], facts: ModelFacts, device: torch.device, config: EngineConfig, decode: bool
) -> Iterator[Bucket | None]:
    """Run prefill or decode, which are separate parts."""
    state = _state(device, config)
    runner = ModelRunner(twin(), facts, config, state)
    if not decode:
        _answer(runner, _GREEDY)
        yield None
    state.uploads.blank()
    for bucket in _decode_sizes(state) if decode else _prompt_sizes(state):
        runner.run_padded(bucket)
        yield bucket
    runner.close()


def _decode_sizes(state: DeviceState) -> list[Bucket]:
    return [bucket for bucket in _within(state) if bucket.max_query_len == 1]


def _prompt_sizes(state: DeviceState) -> list[Bucket]:
    """Return the likely sizes of prompts, first those up to the largest of _PROMPT_SIZES, from large to small.

    Products tile their rows by powers of two up to the largest of these, so a prompt of any length finds its kernels compiled. A load waits for that size
    alone, because each further one compiles for seconds.
    """
    prompts = [bucket for bucket in _within(state) if bucket.max_query_len > 1]
    return sorted(
        prompts,
        key=lambda bucket: (bucket.num_tokens in _PROMPT_SIZES, bucket.num_tokens, bucket.num_rows),
        reverse=True,
    )


def _within(state: DeviceState) -> list[Bucket]:
    """Return the likely sizes, capped at the largest step of `state`."""
    return list(dict.fromkeys(bucket.within(state.max_rows, state.max_tokens) for bucket in standard()))


class _Zeros:
    """Implements CausalForward without a layer."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def __call__(
        self, input_ids: torch.Tensor, positions: torch.Tensor, logits_at: torch.Tensor, step: StepContext
    ) -> torch.Tensor:
        return torch.zeros((logits_at.numel(), _VOCAB), dtype=self._dtype, device=input_ids.device)


def _nothing_but_logits(dtype: torch.dtype, device: torch.device) -> BuiltModel:
    plane = torch.zeros(0, dtype=dtype, device=device)
    return BuiltModel(
        _Zeros(dtype), [KvPlanes(plane, plane, 1)], 16, _VOCAB, _MOST_CONTEXT, device, dtype, dtype, (), "warmup", 1
    )


def _answer(runner: ModelRunner, sampling: SamplingParams, *, masked: bool = False) -> None:
    """Run a prompt, the first token of its answer and the one after it."""
    runner.open_row(RowSetup(0, sampling, LogprobParams(), [0] * _PROMPT_TOKENS, _PROMPT_TOKENS, masked=masked))
    waiting = [0] if masked else []
    prompt = StepPlan([0], [0], [_PROMPT_TOKENS], [False], [1], [0] * _PROMPT_TOKENS, [(0, 0, 0)], masked=waiting)
    for plan in (prompt, StepPlan([0], [_PROMPT_TOKENS], [1], [True], [1], [], masked=waiting)):
        if masked:
            runner.launch_forward(plan)
            runner.launch_draws(np.full((1, mask_words(_VOCAB)), -1, np.int32)).collect()
        else:
            runner.launch(plan).collect()
    runner.close_row(0)


def _shared_zeros(device: torch.device) -> Callable[[int], torch.Tensor]:
    """Return a function that allocates zeros once for all threads: an output projection alone may take a gigabyte."""
    lock = threading.Lock()
    made: list[torch.Tensor] = []

    def zeros(size_bytes: int) -> torch.Tensor:
        with lock:
            if not made:
                made.append(torch.zeros(size_bytes, dtype=torch.uint8, device=device))
                if device.type == "cuda":
                    torch.cuda.current_stream(device).synchronize()
            return made[0]

    return zeros


def _twin(
    blueprint: Blueprint,
    kv: KvGeometry,
    kv_dtype: torch.dtype,
    slab_bytes: int,
    shared_zeros: Callable[[int], torch.Tensor],
) -> BuiltModel:
    """Return the model with one layer of each kind, all of whose weights view the same zeros."""
    assert blueprint.spec is not None
    spec = replace(blueprint.spec, layers=_kinds(blueprint))
    placed = _used(blueprint, spec)
    zeros = shared_zeros(max(tensor.size_bytes for tensor in placed) + _SLACK_BYTES)
    device = zeros.device
    views = {tensor.name: zeros[: tensor.size_bytes].view(tensor.dtype).view(tensor.shape) for tensor in placed}
    views |= {alias: views[owner] for alias, owner in tied_names(blueprint.skeleton).items() if owner in views}
    tables = rotary_tables(blueprint.skeleton.get_submodule(spec.rotary), device)
    card = blueprint.card
    return BuiltModel(
        forward=FusedStack(
            spec,
            views,
            tables,
            blueprint.quantization,
            AlwaysReady(),
            [0] * (len(spec.layers) + 2),
            None,
            (),
            blueprint.head,
        ),
        planes=kv_planes(torch.zeros(slab_bytes, dtype=torch.uint8, device=device), kv, blueprint.shape, kv_dtype),
        block_tokens=kv.block_tokens,
        vocab_size=card.vocab_size,
        max_model_len=min(card.max_model_len, _MOST_CONTEXT),
        device=device,
        dtype=card.dtype,
        kv_dtype=kv_dtype,
        eos_token_ids=(),
        path="warmup",
        token_stride=blueprint.shape.token_stride,
    )


def _kinds(blueprint: Blueprint) -> tuple[LayerSpec, ...]:
    """Return one layer of each kind. Layers whose matrices are stored in different formats differ."""
    assert blueprint.spec is not None
    dtypes = {tensor.name: tensor.dtype for tensor in (*blueprint.layout.tensors, *blueprint.layout.joined)}
    found: dict[object, LayerSpec] = {}
    for layer in blueprint.spec.layers:
        refs = (layer.qkv, layer.out, layer.gate_up, layer.down)
        formats = tuple(
            dtypes.get(f"{name}.{leaf}")
            for ref in refs
            for name in (ref.name, *ref.members)
            for leaf in ("weight", *SCALE_NAMES)
        )
        found.setdefault((replace(layer.attention, layer=0), layer.rope, layer.rope_key, formats), layer)
    return tuple(found.values())


def _used(blueprint: Blueprint, spec: StackSpec) -> list[Placed]:
    """Return the tensors of the layers that `spec` keeps and of the rest of the stack."""
    assert blueprint.spec is not None
    dropped = tuple(
        layer.input_norm.rpartition(".")[0] + "." for layer in blueprint.spec.layers if layer not in spec.layers
    )
    return [
        tensor
        for tensor in (*blueprint.layout.tensors, *blueprint.layout.joined)
        if not tensor.name.startswith(dropped)
    ]


def _key(blueprint: Blueprint, kv_dtype: torch.dtype) -> object:
    """Return a key that is equal for models that need the same kernels in the same sizes."""
    assert blueprint.spec is not None
    spec = replace(blueprint.spec, layers=_kinds(blueprint))
    shapes = tuple((tensor.name, tensor.shape, tensor.dtype) for tensor in _used(blueprint, spec))
    return spec, shapes, kv_dtype, blueprint.quantization
