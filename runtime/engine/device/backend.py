"""The backend of an engine: loads models in threads of their own into a runner over ranges of device memory."""

import importlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from functools import partial
from typing import Generic, TypeVar, cast

import torch
from transformers import logging as transformers_logging

from common.errors import ConfigError
from runtime.config.schema import EngineConfig
from runtime.engine.adapters.bank import AdapterBank
from runtime.engine.adapters.load import load_adapter
from runtime.engine.device.cpu import CpuDevice
from runtime.engine.device.device import Device
from runtime.engine.interfaces import AdapterResult, Bucket, GraphCapture, LoadRequest, LoadResult
from runtime.engine.model.build.adapter_warmup import AdapterWarmup
from runtime.engine.model.build.builder import assemble, draw, facts_of
from runtime.engine.model.build.equivalence_check import EquivalenceChecker
from runtime.engine.model.build.warmup import Warmup, Warmups
from runtime.engine.model.run.device_state import DeviceState
from runtime.engine.model.run.kv_geometry import kv_geometry
from runtime.engine.model.run.runner import ModelRunner
from runtime.engine.parallel.rank_group import RankGroup
from runtime.engine.parallel.shard import WHOLE, Shard
from runtime.errors import Cancelled, LoadFailed, ModelTooLarge
from runtime.types import Checkpoint

_LOG = logging.getLogger(__name__)

T = TypeVar("T")


def make_backend(config: EngineConfig, shard: Shard = WHOLE, rendezvous: str = "") -> "EngineBackend":
    """Return the backend that `config.device` names ("auto": a GPU if there is one). Call it from the engine thread, on whose stream everything runs.

    A rank of a tensor-parallel group uses the device that many places after it, and meets the others at the file `rendezvous`. Raises ConfigError for
    a device or a budget that the machine does not have.
    """
    _quiet_libraries()
    device = _device_of(config)
    if device.type == "cuda":
        _check_gpu(config.device, device.index or 0)
        if shard.size > 1:
            _check_gpu(f"{config.device} for {shard.size} ranks", (device.index or 0) + shard.size - 1)
        from runtime.engine.device.cuda import CudaDevice

        own = torch.device("cuda", (device.index or 0) + shard.rank)
        torch.cuda.set_device(own)
        return EngineBackend(config, CudaDevice(own, config), group=_join(shard, own, rendezvous))
    if device.type == "cpu":
        return EngineBackend(config, CpuDevice(config), group=_join(shard, device, rendezvous))
    raise ConfigError(f"device {config.device} is neither auto, cpu nor cuda[:N]")


def _join(shard: Shard, device: torch.device, rendezvous: str) -> RankGroup | None:
    return RankGroup(shard, device, rendezvous) if shard.size > 1 else None


def _check_gpu(name: str, index: int) -> None:
    if not torch.cuda.is_available():
        raise ConfigError(
            f"device {name} needs an NVIDIA GPU and its driver, and none is usable here: install the driver, or use device cpu"
        )
    count = torch.cuda.device_count()
    if index >= count:
        raise ConfigError(f"device {name} does not exist: this machine has {count} GPUs, cuda:0 to cuda:{count - 1}")


def import_for_loads(config: EngineConfig) -> None:
    """Import what the first load would import. Inside `light_imports` this takes a fraction of the time that it takes later."""
    _quiet_libraries()
    importlib.import_module("transformers.generation.utils")  # every modelling file imports it
    if _device_of(config).type == "cpu":
        importlib.import_module(
            "bitsandbytes.functional"
        )  # for 4-bit models: 0.15 s here, 2 s with torch's compiler later


def _quiet_libraries() -> None:
    transformers_logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its import warns of an optional package


def _device_of(config: EngineConfig) -> torch.device:
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


class EngineBackend:
    """Implements interfaces.Backend.

    Args:
        state: what all models share on the device; None = made for `hardware`.
        group: the tensor-parallel group of which this device is one rank.
    """

    def __init__(
        self,
        config: EngineConfig,
        hardware: Device,
        state: DeviceState | None = None,
        group: RankGroup | None = None,
    ) -> None:
        self._group = group
        self._config = config
        self._hardware = hardware
        self._prover = EquivalenceChecker(config.fuse)
        self._state = state if state is not None else DeviceState.create(hardware.device, config)
        # Nothing is compiled for a CPU.
        self._warmups: Warmups | None = None
        self._adapter_warmup: AdapterWarmup | None = None
        if hardware.device.type == "cuda":
            from runtime.engine.kernels.gpu.launchers import serialise_launchers  # needs triton

            serialise_launchers()  # before warmup threads and the engine thread launch kernels
            self._warmups = Warmups(hardware.device, config)
            self._adapter_warmup = AdapterWarmup(hardware.device, self._state.max_tokens)
        self._opened = False
        self.device = str(hardware.device)
        self.device_name = hardware.name
        self.slab_bytes = hardware.memory.slab_bytes
        self.total_slabs = hardware.memory.total_slabs
        self.host_total_bytes = hardware.host_total_bytes
        self.host_kv_bytes = hardware.host_kv_bytes
        self.max_rows = config.max_rows

    def limit_slabs(self, total_slabs: int) -> None:
        """Use no more slabs than another rank has. Call it before any model is loaded."""
        self.total_slabs = min(self.total_slabs, total_slabs)

    def commit_slabs(self, slabs: Sequence[int]) -> None:
        self._hardware.memory.commit(slabs)

    def decommit_slabs(self, slabs: Sequence[int]) -> None:
        self._hardware.memory.decommit(slabs)

    def host_free_bytes(self) -> int:
        return self._hardware.host_free_bytes()

    def load(self, request: LoadRequest) -> "Loading[LoadResult]":
        return Loading(lambda cancelled: self._load(request, cancelled))

    def load_adapter(self, request: LoadRequest, base: LoadResult) -> "Loading[AdapterResult]":
        return Loading(lambda cancelled: self._load_adapter(request, base, cancelled))

    def synchronize(self) -> None:
        self._hardware.synchronize()

    def settle(self) -> None:
        if self._hardware.device.type == "cuda":
            torch.cuda.current_stream(self._hardware.device).synchronize()

    def next_capture(self) -> GraphCapture | None:
        is_open = self._warmups is None or self._opened
        return self._state.graphs.next_capture() if is_open else None

    def idle(self, mark: Callable[[str], None] = lambda name: None) -> bool:
        if self._warmups is not None and not self._opened:
            self._opened = True  # not earlier, so that it does not delay the engine's Hello
            torch.cuda.current_blas_handle()  # Each thread has one of its own. Making it takes longer than a first step.
            self._warmups.open()
            return True
        mark("")  # no model causes what follows
        return self._hardware.idle()

    def close(self) -> None:
        """Release the device. All models must be closed."""
        self._hardware.close()

    def _load(self, request: LoadRequest, cancelled: threading.Event) -> LoadResult:
        config, hardware = self._config, self._hardware
        checkpoint = cast("Checkpoint", request.checkpoint)
        begun_s = time.monotonic()
        blueprint = draw(
            request.model_id,
            checkpoint,
            request.max_model_len,
            self._prover,
            num_threads=hardware.num_read_threads,
            min_group_bytes=hardware.min_group_bytes,
            layout_4bit=hardware.layout_4bit,
            host_order=hardware.host_order,
            shard=WHOLE if self._group is None else self._group.shard,
        )
        if cancelled.is_set():
            raise Cancelled("loading was cancelled", model=request.model_id)
        kv_dtype = blueprint.card.dtype if config.kv_dtype == "auto" else torch.float8_e4m3fn
        kv = kv_geometry(
            request.model_id,
            blueprint.shape,
            config.block_tokens,
            kv_dtype.itemsize,
            hardware.memory.slab_bytes,
            hardware.memory.total_slabs,
        )
        weight_slabs = -(-blueprint.layout.size_bytes // hardware.memory.slab_bytes)
        if weight_slabs >= hardware.memory.total_slabs:
            raise ModelTooLarge(
                f"it needs {blueprint.layout.size_bytes} bytes for its weights ({weight_slabs} slabs) and a slab of KV, "
                f"the device budget is {hardware.memory.total_slabs * hardware.memory.slab_bytes} bytes ({hardware.memory.total_slabs} slabs)",
                model=request.model_id,
                limit=hardware.memory.total_slabs * hardware.memory.slab_bytes,
                value=blueprint.layout.size_bytes,
            )
        drawn_s = time.monotonic()
        warmup = (
            self._warmups.begin(blueprint, kv, kv_dtype, hardware.memory.slab_bytes)
            if self._warmups is not None
            else None
        )
        try:
            memory = hardware.take(blueprint.filler, blueprint.identity, weight_slabs, kv, cancelled)
            taken_s = time.monotonic()
            bank: AdapterBank | None = None
            try:
                bank = AdapterBank(
                    hardware.memory.reserve(hardware.memory.total_slabs),
                    blueprint.targets,
                    blueprint.card.dtype,
                    config.max_adapters,
                    config.max_adapter_rank,
                    None if blueprint.spec is None else blueprint.spec.activation,
                )
                built = assemble(
                    blueprint, memory.weights_view, memory.kv_view, kv, kv_dtype, memory, self._group, bank
                )
                runner = ModelRunner(
                    built,
                    facts_of(blueprint, kv),
                    config,
                    self._state,
                    lambda: not memory.pending,
                    self._compiled_by(warmup),
                )
            except BaseException:
                memory.close()
                if bank is not None:
                    bank.close()
                raise
        finally:
            if warmup is not None:
                warmup.wait()
        _LOG.info(
            "model %s: planned in %.2f s, %d bytes of weights loaded in %.2f s, waited %.2f s for kernels",
            request.model_id,
            drawn_s - begun_s,
            memory.weight_bytes,
            taken_s - drawn_s,
            time.monotonic() - taken_s,
        )
        return LoadResult(runner, memory, bank)

    def _compiled_by(self, warmup: Warmup | None) -> Callable[[Bucket], bool]:
        """Return whether a model's kernels of a size are compiled. A capture that compiles them does so beside the warmup that is about to."""
        warmups = self._warmups
        return (lambda bucket: True) if warmups is None else partial(warmups.has_compiled, warmup)

    def _load_adapter(self, request: LoadRequest, base: LoadResult, cancelled: threading.Event) -> AdapterResult:
        bank = cast("AdapterBank | None", base.adapters)
        if bank is None or not bank.targets:
            raise LoadFailed(
                f"its base {base.runner.facts.model_id} has no linear layers that adapters may change",
                model=request.model_id,
            )
        try:
            loaded = load_adapter(
                request.model_id,
                cast("Checkpoint", request.checkpoint),
                base.runner.facts,
                bank,
                self._hardware.take_adapter,
                cancelled,
            )
        except LoadFailed as error:
            error.model = request.model_id
            raise
        if self._adapter_warmup is not None:
            self._adapter_warmup.run(bank)
        return loaded


class Loading(Generic[T]):
    """A load in a thread of its own. Implements interfaces.LoadJob and AdapterJob."""

    def __init__(self, work: Callable[[threading.Event], T]) -> None:
        self._work = work
        self._cancelled = threading.Event()
        self._future: Future[T] = Future()
        threading.Thread(target=self._run, name="load", daemon=True).start()

    def done(self) -> bool:
        return self._future.done()

    def result(self) -> T:
        try:
            return self._future.result()
        except CancelledError as error:
            raise Cancelled("the load was cancelled") from error

    def cancel(self) -> None:
        self._cancelled.set()

    def _run(self) -> None:
        try:
            loaded = self._work(self._cancelled)
        except BaseException as error:
            self._future.set_exception(error)
        else:
            self._future.set_result(loaded)
