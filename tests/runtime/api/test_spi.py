"""mmesh.ModelRuntime and repertory.RuntimeState through real gRPC on a unix socket, over a fake engine."""

import asyncio
import contextlib
import ipaddress
import json
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import grpc
import grpc.aio
import pytest

from runtime.api.mesh_only import MeshOnly, is_of_this_machine
from runtime.api.spi import SERVICE_NAME as SPI_NAME
from runtime.api.state import SERVICE_NAME as STATE_NAME
from runtime.api.state import TokenRate
from runtime.config.schema import EngineConfig, RuntimeConfig
from runtime.engine_client.engine_group import EngineGroup
from runtime.engine_client.lifecycle import EngineState
from runtime.engine_client.restart_policy import RestartPolicy
from runtime.ipc.messages import Hello
from runtime.models.capacity import budgets_of, capacity_of
from runtime.models.model_state import Phase
from tests.support.fake_engine import WEIGHT_BYTES
from tests.support.spi_runtime import SLAB, SpiRuntime
from wire.mmesh import model_runtime_pb2 as spi
from wire.mmesh.model_runtime_pb2_grpc import ModelRuntimeStub
from wire.repertory import runtime_pb2 as state
from wire.repertory.runtime_pb2_grpc import RuntimeStateStub


@pytest.fixture
async def runtime(tmp_path: Path) -> AsyncIterator[SpiRuntime]:
    runtime = SpiRuntime(
        tmp_path, RuntimeConfig(grace_s=0.2, load_timeout_s=10.0, engine=EngineConfig(slab_bytes=SLAB))
    )
    await runtime.server.start()
    runtime.engine.start()
    yield runtime
    await runtime.server.stop(0)
    await runtime.models.close()
    await runtime.engine.stop(0.0)


@pytest.fixture
async def stub(runtime: SpiRuntime) -> AsyncIterator[ModelRuntimeStub]:
    async with grpc.aio.insecure_channel(runtime.address) as channel:
        yield ModelRuntimeStub(channel)


def request(model_id: str, path: str = "/models/a", **key: object) -> spi.LoadModelRequest:
    return spi.LoadModelRequest(modelId=model_id, modelType="any", modelPath=path, modelKey=json.dumps(key))


async def refused(call: Awaitable[object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""


async def until(runtime: SpiRuntime, done: Callable[[], bool]) -> None:
    while not done():
        await runtime.models.changes.wait(0.05)


async def ready(stub: ModelRuntimeStub) -> spi.RuntimeStatusResponse:
    while True:
        status = await stub.runtimeStatus(spi.RuntimeStatusRequest())
        if status.status != spi.RuntimeStatusResponse.STARTING:
            return status
        await asyncio.sleep(0.05)


async def test_runtime_status_purges_and_returns_the_limits(runtime: SpiRuntime, stub: ModelRuntimeStub) -> None:
    await stub.loadModel(request("old"))
    status = await ready(stub)
    assert status.status == spi.RuntimeStatusResponse.READY
    assert not runtime.models.views()
    assert runtime.preparer.held == 0
    assert status.capacityInBytes == 100_000
    assert status.maxLoadingConcurrency == 10
    assert status.modelLoadingTimeoutMs == 10_000
    assert status.capacityInBytes >= 10 * min(status.defaultModelSizeInBytes, 10_000)
    assert status.allowAnyMethod
    assert status.limitModelConcurrency
    assert list(status.methodInfos["fmaas.GenerationService/Generate"].idInjectionPath) == [1]


async def test_load_model_size_and_unload(runtime: SpiRuntime, stub: ModelRuntimeStub) -> None:
    loaded = await stub.loadModel(request("a", max_concurrency=3))
    # one slab of weights and one of KV
    assert loaded.sizeInBytes == 2 * SLAB > WEIGHT_BYTES
    assert loaded.maxConcurrency == 3
    assert (await stub.loadModel(request("a", max_concurrency=3))).sizeInBytes == loaded.sizeInBytes
    assert runtime.preparer.started == 1
    assert (await stub.loadModel(request("b", max_concurrency=2**40))).maxConcurrency == 512
    assert (await stub.modelSize(spi.ModelSizeRequest(modelId="a"))).sizeInBytes == loaded.sizeInBytes
    for _ in range(2):
        await stub.unloadModel(spi.UnloadModelRequest(modelId="a"))
    assert (await refused(stub.modelSize(spi.ModelSizeRequest(modelId="a"))))[0] is grpc.StatusCode.NOT_FOUND


async def test_load_model_refusal_names_the_field(stub: ModelRuntimeStub) -> None:
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    assert await refused(stub.loadModel(request(""))) == (invalid, "modelId is empty: name the model")
    assert await refused(stub.unloadModel(spi.UnloadModelRequest())) == (invalid, "modelId is empty: name the model")
    code, details = await refused(stub.loadModel(spi.LoadModelRequest(modelId="a", modelPath="/m", modelKey="[1]")))
    assert code is invalid
    assert "JSON object" in details
    code, details = await refused(stub.loadModel(request("a", quantise="nf4")))
    assert code is invalid
    assert "'quantise'" in details
    code, details = await refused(stub.loadModel(request("a", "missing:x")))
    assert (code, details) == (grpc.StatusCode.FAILED_PRECONDITION, "missing:x: no such files")
    code, details = await refused(stub.loadModel(request("fail")))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_load_model_cancelled_leaves_nothing(runtime: SpiRuntime, stub: ModelRuntimeStub) -> None:
    call = stub.loadModel(request("slow"))
    await until(runtime, lambda: bool(runtime.models.views()))
    call.cancel()
    await until(runtime, lambda: not runtime.models.views())
    assert runtime.preparer.held == 0
    code, _ = await refused(stub.loadModel(request("endless", "endless:x"), timeout=0.2))
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(runtime, lambda: not runtime.models.views())


async def test_predict_model_size_is_quick_and_never_zero(
    runtime: SpiRuntime, stub: ModelRuntimeStub, tmp_path: Path
) -> None:
    default_bytes = (await ready(stub)).defaultModelSizeInBytes
    slow = spi.PredictModelSizeRequest(modelId="a", modelPath="slow:x")
    started_s = time.monotonic()
    sizes = await asyncio.gather(*(stub.predictModelSize(slow) for _ in range(5)))
    assert time.monotonic() - started_s < 5, "five slow inspections in turns would take longer"
    assert {size.sizeInBytes for size in sizes} == {default_bytes}
    runtime.fitter.may_end.set()
    await until(runtime, lambda: runtime.fitter.ended == ["slow:x"])  # one inspection for all five
    exact = (await stub.predictModelSize(slow)).sizeInBytes
    assert exact not in (0, default_bytes)
    missing = await stub.predictModelSize(spi.PredictModelSizeRequest(modelId="a", modelPath="missing:x"))
    assert missing.sizeInBytes == default_bytes
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(12345))
    for path in (tmp_path, weights):
        unreadable = spi.PredictModelSizeRequest(modelId="a", modelPath=f"missing:{path}")
        assert (await stub.predictModelSize(unreadable)).sizeInBytes == default_bytes


async def test_watch_shows_a_load_and_an_unload(runtime: SpiRuntime, stub: ModelRuntimeStub) -> None:
    await ready(stub)
    runtime.preparer.delay_s = 0.5
    async with grpc.aio.insecure_channel(runtime.address) as channel:
        seen: list[tuple[int, int]] = []
        work: list[asyncio.Task[object]] = []
        async for snapshot in RuntimeStateStub(channel).watch(state.WatchRequest(), timeout=20):
            if not work:
                work.append(asyncio.ensure_future(stub.loadModel(request("a", quantize="nf4"))))
            if snapshot.models:
                model = snapshot.models[0]
                seen.append((model.state, model.tier))
                if model.state == state.ModelState.PULLING:
                    assert (model.progress_bytes, model.total_bytes, model.progress) == (1, 4, 0.25)
                elif model.state == state.ModelState.LOADED and model.tier == state.ModelState.DEVICE:
                    assert model.weight_bytes == WEIGHT_BYTES
                    assert model.load_s > 0
                    assert snapshot.engine_state == state.ENGINE_READY
                    assert snapshot.device_budget_bytes == snapshot.capacity_bytes == 100_000
                    work.append(asyncio.ensure_future(stub.unloadModel(spi.UnloadModelRequest(modelId="a"))))
            elif seen:
                break
        await asyncio.gather(*work)
    assert seen[0] == (state.ModelState.PULLING, state.ModelState.REMOTE)
    assert seen[-1] == (state.ModelState.LOADED, state.ModelState.DEVICE)


async def test_fit_returns_the_sizes_and_the_victims(runtime: SpiRuntime, stub: ModelRuntimeStub) -> None:
    await ready(stub)
    await stub.loadModel(request("old"))
    async with grpc.aio.insecure_channel(runtime.address) as channel:
        fit = RuntimeStateStub(channel).fit
        answer = await fit(state.FitRequest(model_path="/models/b"))
        assert answer.fits
        assert answer.kv_bytes_per_token == 2 * 2 * 1 * 8 * 4
        assert answer.min_kv_bytes == 64 * answer.kv_bytes_per_token
        assert list(answer.evicts) == []
        odd = await fit(state.FitRequest(model_path="/models/odd"))
        assert (odd.fits, odd.reason) == (False, "FakeForCausalLM is not supported")
        assert (await fit(state.FitRequest(model_path="/models/odd", sizes_only=True))).fits
        assert (await fit(state.FitRequest(model_id="old", model_path="/models/odd"))).fits  # it runs, so it can
        code, _ = await refused(fit(state.FitRequest(model_path="missing:x")))
        assert code is grpc.StatusCode.FAILED_PRECONDITION


@pytest.fixture
async def grouped(tmp_path: Path) -> AsyncIterator[RuntimeStateStub]:
    """A runtime with a group of two devices and a single one. The model takes 10 slabs of one device, or 8 of each of two."""
    engine = EngineConfig(slab_bytes=SLAB, device_budget_bytes=9 * SLAB)
    runtime = SpiRuntime(tmp_path, RuntimeConfig(grace_s=0.2, engine=engine), group_sizes=(2, 1))
    await runtime.server.start()
    runtime.engine.start()
    async with grpc.aio.insecure_channel(runtime.address) as channel:
        await ready(ModelRuntimeStub(channel))
        yield RuntimeStateStub(channel)
    await runtime.server.stop(0)
    await runtime.models.close()
    await runtime.engine.stop(0.0)


async def test_fit_takes_the_smallest_group_that_holds_the_model(grouped: RuntimeStateStub) -> None:
    answer = await grouped.fit(state.FitRequest(model_path="/models/b"))
    alone = await grouped.fit(state.FitRequest(model_path="/models/b", model_key='{"tensor_parallel": 1}'))
    assert (answer.fits, answer.num_devices) == (True, 2)
    assert (alone.fits, alone.num_devices) == (False, 1)
    assert answer.weight_bytes < alone.weight_bytes
    assert answer.capacity_bytes == alone.capacity_bytes == 9 * SLAB
    four = await grouped.fit(state.FitRequest(model_path="/models/b", model_key='{"tensor_parallel": 4}'))
    assert not four.fits
    assert "the groups of devices here have sizes 2, 1" in four.reason


async def test_snapshot_lists_the_devices_of_all_groups(grouped: RuntimeStateStub) -> None:
    async for snapshot in grouped.watch(state.WatchRequest()):
        if sum(device.budget_bytes for device in snapshot.devices) == 27 * SLAB:
            break
    assert [(device.name, device.group) for device in snapshot.devices] == [
        ("cpu:0", "cpu:0"), ("cpu:1", "cpu:0"), ("cpu:2", "cpu:2"),
    ]  # fmt: skip
    assert snapshot.device_budget_bytes == snapshot.capacity_bytes == 27 * SLAB
    assert snapshot.device_name == "3 × fake device"


def group(hello: Hello, *devices: str) -> EngineGroup:
    return EngineGroup(devices, hello, None, EngineState.READY, frozenset())


def test_capacity_of_follows_oversubscribe() -> None:
    cpu = [group(Hello(1, "cpu", "cpu", 1000, 0, 64, 8), "cpu")]
    gpu = [group(Hello(1, "cuda:0", "gpu", 1000, 5000, 64, 8), "cuda:0")]
    assert capacity_of("auto", cpu, 9).capacity_bytes == 1000
    assert capacity_of("host", cpu, 9).mode == "none"
    assert capacity_of("auto", gpu, 9).capacity_bytes == 5000
    assert capacity_of("none", gpu, 9).capacity_bytes == 1000
    assert capacity_of("disk", gpu, 9).capacity_bytes == 9
    assert capacity_of("host", gpu, 9).charge(70, 1, 100) == 70
    assert capacity_of("none", gpu, 9).charge(70, 9, 100) == 2 * 64 + 2 * 64  # 8 tokens of KV beside the weights
    assert capacity_of("none", gpu, 9).charge(70, 9, 7) == 2 * 64 + 64


def test_capacity_of_several_groups_is_that_of_all_devices() -> None:
    pair = group(Hello(1, "cuda:0", "gpu", 1000, 5000, 64, 8), "cuda:0", "cuda:1")
    single = group(Hello(2, "cuda:2", "gpu", 900, 4000, 64, 8), "cuda:2")
    assert capacity_of("none", [pair, single], 9).capacity_bytes == 2900
    assert capacity_of("host", [pair, single], 9).capacity_bytes == 14_000
    assert capacity_of("none", [pair, single], 9).charge(70, 9, 7, num_devices=2) == 2 * (2 * 64 + 64)
    assert capacity_of("host", [pair, single], 9).charge(70, 9, 7, num_devices=2) == 140
    assert budgets_of([single, pair, group(single.hello, "cuda:3")]) == {1: 900, 2: 1000}


def test_token_rate_restarts_with_the_counter() -> None:
    rate = TokenRate()
    assert rate.update(0.0, 0) == 0.0
    assert rate.update(1.0, 10) == 10.0
    for second in range(2, 10):
        last = rate.update(float(second), 10 + (second - 1) * 40)
    assert last == 40.0
    assert rate.update(10.0, 0) == 0.0


@pytest.mark.parametrize("header", [("mm-model-id", "a"), ("mm-model-id-bin", b"a")])
async def test_mesh_only_methods_refuse_forwarded_calls(runtime: SpiRuntime, header: tuple[str, str | bytes]) -> None:
    """ModelMesh forwards any method that a caller names, with the model's id: a caller could have files looked at and URLs fetched."""
    async with grpc.aio.insecure_channel(runtime.address) as channel:
        spi_stub, state_stub = ModelRuntimeStub(channel), RuntimeStateStub(channel)
        await ready(spi_stub)
        fit = state.FitRequest(model_path="/models/a")
        assert (await refused(state_stub.fit(fit, metadata=(header,))))[0] is grpc.StatusCode.UNIMPLEMENTED
        watch = state_stub.watch(state.WatchRequest(), metadata=(header,))
        assert (await refused(watch.read()))[0] is grpc.StatusCode.UNIMPLEMENTED
        load = spi_stub.loadModel(request("a"), metadata=(header,))
        assert (await refused(load))[0] is grpc.StatusCode.UNIMPLEMENTED
        assert not runtime.models.views()
        assert (await state_stub.fit(fit, metadata=(("other", "a"),))).fits


@pytest.mark.parametrize(
    ("peer", "is_local"),
    [
        ("unix:", True),
        ("unix:/tmp/x.sock", True),
        ("ipv4:127.0.0.1:5000", True),
        ("ipv6:%5B::1%5D:5000", True),
        ("ipv6:[::ffff:127.0.0.1]:5000", True),
        ("ipv4:10.0.0.7:5000", False),
        ("ipv6:%5B2001:db8::7%5D:5000", False),
        ("vsock:1:2", False),
        ("", False),
    ],
)
def test_is_of_this_machine_reads_grpcs_names(peer: str, is_local: bool) -> None:
    assert is_of_this_machine(peer) is is_local


@pytest.mark.parametrize("allow_remote", [False, True])
async def test_mesh_only_methods_refuse_other_machines(runtime: SpiRuntime, allow_remote: bool) -> None:
    """A call to this machine's own address comes from that address, as a call of another machine comes from its."""
    own = own_ip()
    if ipaddress.ip_address(own).is_loopback:
        pytest.skip("this machine has no address but loopback")
    server = grpc.aio.server(interceptors=(MeshOnly(SPI_NAME, STATE_NAME, allow_remote=allow_remote),))
    runtime.add_services(server)
    port = server.add_insecure_port("0.0.0.0:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"{own}:{port}") as channel:
            spi_stub, state_stub = ModelRuntimeStub(channel), RuntimeStateStub(channel)
            denied = grpc.StatusCode.PERMISSION_DENIED
            if allow_remote:
                await ready(spi_stub)
                assert await state_stub.watch(state.WatchRequest()).read() is not grpc.aio.EOF
                return
            assert (await refused(spi_stub.runtimeStatus(spi.RuntimeStatusRequest())))[0] is denied
            assert (await refused(spi_stub.unloadModel(spi.UnloadModelRequest(modelId="a"))))[0] is denied
            assert (await refused(state_stub.watch(state.WatchRequest()).read()))[0] is denied
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            await ready(ModelRuntimeStub(channel))
    finally:
        await server.stop(0)


def own_ip() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        with contextlib.suppress(OSError):
            probe.connect(("10.255.255.255", 1))
        return str(probe.getsockname()[0]).replace("0.0.0.0", "127.0.0.1")


async def test_load_model_waits_while_the_engine_restarts(runtime: SpiRuntime, stub: ModelRuntimeStub) -> None:
    """ModelMesh remembers a failed load for 15 minutes, so a dead engine must cost time and no failure."""
    await ready(stub)
    await stub.loadModel(request("before"))
    [group] = runtime.engine.groups
    os.kill(group.hello.pid, signal.SIGKILL)
    loads: list[asyncio.Future[spi.LoadModelResponse]] = []
    while runtime.engine.restarts == 0:
        loads.append(asyncio.ensure_future(stub.loadModel(request(f"m{len(loads)}"))))
        await asyncio.sleep(0.005)
    loads.append(asyncio.ensure_future(stub.loadModel(request("before"))))
    for answer in await asyncio.gather(*loads):
        assert answer.sizeInBytes > 0
    await until(runtime, lambda: {view.phase for view in runtime.models.views()} == {Phase.LOADED})


async def test_load_model_of_a_dead_engine_ends_at_its_timeout(tmp_path: Path) -> None:
    config = RuntimeConfig(load_timeout_s=0.5, engine=EngineConfig(slab_bytes=SLAB))
    runtime = SpiRuntime(tmp_path, config, restart=RestartPolicy(first_s=60.0, start_timeout_s=20.0))
    await runtime.server.start()
    runtime.engine.start()
    async with grpc.aio.insecure_channel(runtime.address) as channel:
        stub = ModelRuntimeStub(channel)
        await ready(stub)
        [group] = runtime.engine.groups
        os.kill(group.hello.pid, signal.SIGKILL)
        code, text = await refused(stub.loadModel(request("a")))
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "took longer than 0.5 s" in text
        starting = await stub.runtimeStatus(spi.RuntimeStatusRequest())
        assert starting.status == spi.RuntimeStatusResponse.STARTING, "the socket stays open meanwhile"
    await runtime.server.stop(0)
    await runtime.models.close()
    await runtime.engine.stop(0.0)
