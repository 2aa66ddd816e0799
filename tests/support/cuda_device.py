"""Stands in for a GPU's driver, streams and events where there is none, and enforces what the real ones do or suffer.

Work is put on streams and happens later, in any order that events and waits allow. An address with no memory below it is unknown; access needs a
grant after each mapping; a mapping is unmapped whole, and never while launched work uses it; a handle goes when nothing maps it. Every use of
physical memory finds what was last written there when it was launched: two streams that are not made to wait for each other are found out.
"""

import contextlib
import ctypes
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from runtime.engine.memory import cuda


@dataclass(eq=False)
class Use:
    """Launched work: where it reads and writes (address, size), and which version of what lies there it expects."""

    ranges: list[tuple[int, int]]
    expects: dict[int, int]
    leaves: dict[int, int]


@dataclass(eq=False)
class Stream:
    device: "Device"
    queue: list[Callable[[], bool]] = field(default_factory=list)  # each does its part; False = not yet

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(self.device.recorded(other))

    def wait_event(self, event: "Event") -> None:
        with self.device.lock:
            marks = event.marks
            self.queue.append(lambda: marks in self.device.passed)

    def synchronize(self) -> None:
        self.device.recorded(self).synchronize()


@dataclass(eq=False)
class Event:
    device: "Device"
    marks: object = None

    def record(self, stream: Stream | None = None) -> None:
        marks = object()

        def pass_mark() -> bool:
            self.device.passed.add(marks)
            return True

        with self.device.lock:
            self.marks = marks
            (stream or self.device.current_stream()).queue.append(pass_mark)

    def query(self) -> bool:
        with self.device.lock:
            return self.marks is None or self.marks in self.device.passed

    def synchronize(self) -> None:
        while not self.query():
            assert self.device.advance(), "waits for what will never come"


class Device:
    """`failing(call)` may raise in the driver's place."""

    def __init__(self, seed: int = 0) -> None:
        self.lock = threading.RLock()
        self.passed: set[object] = set()
        self.streams: list[Stream] = []
        self.compute = self.stream()
        self._current = threading.local()
        self.drivers: list[CheckedDriver] = []
        self.failing: Callable[[str], None] = lambda call: None
        self._rng = random.Random(seed)
        self._uses: list[Use] = []
        self._written: dict[int, int] = {}  # handle → version, as launches have it
        self._holds: dict[int, int] = {}  # and as it is

    def stream(self) -> Stream:
        made = Stream(self)
        self.streams.append(made)
        return made

    def current_stream(self, device: object = None) -> Stream:
        del device
        return getattr(self._current, "stream", self.compute)

    def recorded(self, stream: Stream) -> Event:
        event = Event(self)
        event.record(stream)
        return event

    def advance(self) -> bool:
        """One piece of work; False if none can be done."""
        with self.lock:
            for stream in self._rng.sample(self.streams, len(self.streams)):
                if stream.queue and stream.queue[0]():
                    stream.queue.pop(0)
                    return True
            return False

    def launch(
        self,
        stream: Stream,
        *,
        reads: Iterable[tuple[int, int]] = (),
        writes: Iterable[tuple[int, int]] = (),
        host: Iterable[tuple[int, int]] = (),
    ) -> None:
        """Work over ranges of addresses (address, size); `host`: of the host's memory."""
        driver = self.drivers[-1]
        with self.lock:
            writes = list(writes)
            ranges = [*reads, *writes]
            expects = {handle: self._written.get(handle, 0) for at, size in ranges for handle in driver.below(at, size)}
            leaves = {handle: expects[handle] + 1 for at, size in writes for handle in driver.below(at, size)}
            self._written |= leaves
            use = Use([*ranges, *host], expects, leaves)
            self._uses.append(use)
            stream.queue.append(lambda: self._do(use))

    def in_use(self, address: int, size: int) -> bool:
        with self.lock:
            return any(at < address + size and address < at + length for use in self._uses for at, length in use.ranges)

    def _do(self, use: Use) -> bool:
        found = {handle: self._holds.get(handle, 0) for handle in use.expects}
        assert found == use.expects, f"work finds {found}, was launched over {use.expects}"
        self._holds |= use.leaves
        self._uses.remove(use)
        return True

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """In the places of torch's and the driver's own."""

        @contextlib.contextmanager
        def on(stream: Stream) -> Iterator[None]:
            before = self.current_stream()
            self._current.stream = stream
            try:
                yield
            finally:
                self._current.stream = before

        def driver(ordinal: int) -> CheckedDriver:
            self.drivers.append(CheckedDriver(self))
            return self.drivers[-1]

        as_tensor = torch.as_tensor

        def viewed(value: Any, **kwargs: Any) -> torch.Tensor:
            interface = getattr(value, "__cuda_array_interface__", None)
            viewed = self.drivers[-1].view(interface["data"][0]) if interface else None
            return as_tensor(value, **kwargs) if viewed is None else viewed

        monkeypatch.setattr(cuda, "Driver", driver)
        monkeypatch.setattr(torch, "as_tensor", viewed)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(torch.cuda, "current_stream", self.current_stream)
        monkeypatch.setattr(torch.cuda, "stream", on)
        monkeypatch.setattr(torch.cuda, "Stream", lambda *_: self.stream())
        monkeypatch.setattr(torch.cuda, "Event", lambda **_: Event(self))


class CheckedDriver:
    """Reserved addresses are ordinary memory; a handle's contents do not follow it, its version does."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._reserved: dict[int, torch.Tensor] = {}
        self._mapped: dict[int, tuple[int, int]] = {}  # address → size, handle
        self._accessible: set[int] = set()
        self.handles: dict[int, int] = {}  # handle → size
        self._next_handle = 0
        self.unmap_calls = 0
        self.copied_rows = 0

    def granularity(self) -> int:
        return 4096

    def create(self, size: int) -> int:
        self._device.failing("create")
        handle = self._next_handle = self._next_handle + 1
        self.handles[handle] = size
        return handle

    def release(self, handle: int) -> None:
        assert all(handle != mapped for _, mapped in self._mapped.values()), (
            "a handle is released before it is unmapped"
        )
        del self.handles[handle]

    def reserve(self, size: int) -> int:
        self._device.failing("reserve")
        made = torch.zeros(size, dtype=torch.uint8)
        self._reserved[made.data_ptr()] = made
        return made.data_ptr()

    def free(self, address: int, size: int) -> None:
        assert not any(address <= at < address + size for at in self._mapped), (
            "addresses are freed with memory below them"
        )
        assert self._reserved.pop(address).numel() == size

    def map(self, address: int, size: int, handle: int) -> None:
        self._device.failing("map")
        assert any(
            at <= address and address + size <= at + held.numel() for at, held in list(self._reserved.items())
        ), "addresses that were not reserved"
        assert all(
            not at < address + size or not address < at + length for at, (length, _) in list(self._mapped.items())
        ), "mapped twice"
        assert self.handles[handle] >= size
        self._mapped[address] = size, handle

    def allow(self, address: int, size: int) -> None:
        self._device.failing("allow")
        inside = {at: length for at, (length, _) in list(self._mapped.items()) if address <= at < address + size}
        assert sum(inside.values()) == size, "access to unmapped addresses"
        self._accessible |= set(inside)

    def unmap(self, address: int, size: int) -> None:
        assert not self._device.in_use(address, size), "launched work still uses what is unmapped"
        assert self._mapped.pop(address)[0] == size, "a mapping is unmapped whole"
        self._accessible.discard(address)
        self.unmap_calls += 1

    def copy_rows(
        self,
        device_address: int,
        host_address: int,
        *,
        to_host: bool,
        row_bytes: int,
        num_rows: int,
        pitch_bytes: int,
        stream: Stream,
    ) -> None:
        assert 0 < row_bytes <= pitch_bytes
        on_device = [(device_address + row * pitch_bytes, row_bytes) for row in range(num_rows)]
        in_host = [(host_address + row * pitch_bytes, row_bytes) for row in range(num_rows)]
        self._device.launch(
            stream, reads=on_device if to_host else (), writes=() if to_host else on_device, host=in_host
        )
        for (device_row, _), (host_row, _) in zip(on_device, in_host, strict=True):
            ctypes.memmove(*((host_row, device_row) if to_host else (device_row, host_row)), row_bytes)
        self.copied_rows += num_rows

    # what torch and kernels ask

    def knows(self, address: int) -> bool:
        """Triton and torch refuse a pointer that the driver does not know."""
        return any(at <= address < at + size for at, (size, _) in list(self._mapped.items()) if at in self._accessible)

    def refuses(self, address: int) -> bool:
        """Whether it lies in reserved addresses and has no memory below it; others are the host's own."""
        reserved = any(at <= address < at + held.numel() for at, held in list(self._reserved.items()))
        return reserved and not self.knows(address)

    def view(self, address: int) -> torch.Tensor | None:
        """None for addresses of another kind."""
        if address not in self._reserved:
            return None
        assert self.knows(address), "torch asks which device an address is on"
        return self._reserved[address]

    def below(self, address: int, size: int) -> list[int]:
        """Handles under a range of addresses, all of which must be accessible."""
        inside = {at: held for at, held in list(self._mapped.items()) if at < address + size and address < at + held[0]}
        covered = sum(min(at + length, address + size) - max(at, address) for at, (length, _) in inside.items())
        assert covered == size, "a kernel touches an address without memory"
        assert self._accessible >= set(inside), "a kernel touches memory without access to it"
        return [handle for _, handle in inside.values()]

    @property
    def num_mapped(self) -> int:
        return len(self._mapped)

    @property
    def num_reserved(self) -> int:
        return len(self._reserved)
