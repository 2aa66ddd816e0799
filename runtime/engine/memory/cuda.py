"""Slabs on a GPU, through CUDA's virtual memory calls: physical handles are mapped to reserved addresses as needed.

An engine that is alone on its GPU creates all handles at its start and keeps them. One that shares its GPU creates a handle when the slab is committed,
and releases it when the slab is decommitted.

Unmapping is postponed: a place that was given up keeps its old physical memory until something else is mapped there or the engine is idle, because
the driver may only unmap what no launched kernel uses, and waiting for that would stall the engine. So a slab may be reachable from an old place and
a new one at once; that is safe because all work on slabs is ordered on the compute stream (copies wait for it first). The exception is a copy that
saves KV: only the next user of a slab waits for the copy that reads the slab (`read_until`).

A range's first place always has memory: torch and Triton ask the driver about the pointers that they get, and the driver rejects unmapped addresses.
While the owner has mapped no slab there, the place holds the anchor, a slab that is never read.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from runtime.engine.memory.device import SlabLedger

_ANCHOR = -1  # in the place of a slab's number


class CudaError(RuntimeError):
    """A driver call failed."""


class _ForeignArray:
    """Device memory as torch's `as_tensor` takes it."""

    def __init__(self, address: int, size_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
            "strides": None,
        }


class Driver:
    """The nine driver calls that we make, with their results checked. Holds the module and the properties of our allocations."""

    def __init__(self, ordinal: int) -> None:
        from cuda.bindings import driver

        self._driver: Any = driver
        self.ordinal = ordinal
        location = driver.CUmemLocation()
        location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        location.id = ordinal
        self._prop = driver.CUmemAllocationProp()
        self._prop.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._prop.location = location
        self._access = driver.CUmemAccessDesc()
        self._access.location = location
        self._access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE

    def granularity(self) -> int:
        """Bytes that every size must be a multiple of."""
        flag = self._driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
        return int(
            self._checked("cuMemGetAllocationGranularity", self._driver.cuMemGetAllocationGranularity(self._prop, flag))
        )

    def create(self, size: int) -> Any:
        return self._checked("cuMemCreate", self._driver.cuMemCreate(size, self._prop, 0))

    def release(self, handle: Any) -> None:
        self._checked("cuMemRelease", self._driver.cuMemRelease(handle))

    def reserve(self, size: int) -> int:
        return int(self._checked("cuMemAddressReserve", self._driver.cuMemAddressReserve(size, 0, 0, 0)))

    def free(self, address: int, size: int) -> None:
        self._checked("cuMemAddressFree", self._driver.cuMemAddressFree(address, size))

    def map(self, address: int, size: int, handle: Any) -> None:
        self._checked("cuMemMap", self._driver.cuMemMap(address, size, 0, handle, 0))

    def allow(self, address: int, size: int) -> None:
        self._checked("cuMemSetAccess", self._driver.cuMemSetAccess(address, size, [self._access], 1))

    def unmap(self, address: int, size: int) -> None:
        self._checked("cuMemUnmap", self._driver.cuMemUnmap(address, size))

    def copy_rows(
        self,
        device_address: int,
        host_address: int,
        *,
        to_host: bool,
        row_bytes: int,
        num_rows: int,
        pitch_bytes: int,
        stream: torch.cuda.Stream,
    ) -> None:
        """Queue a copy of rows that begin every `pitch_bytes` in both memories."""
        driver = self._driver
        copy = driver.CUDA_MEMCPY2D()
        kinds = driver.CUmemorytype
        copy.srcPitch = copy.dstPitch = pitch_bytes
        copy.WidthInBytes = row_bytes
        copy.Height = num_rows
        if to_host:
            copy.srcMemoryType, copy.dstMemoryType = kinds.CU_MEMORYTYPE_DEVICE, kinds.CU_MEMORYTYPE_HOST
            copy.srcDevice, copy.dstHost = device_address, host_address
        else:
            copy.srcMemoryType, copy.dstMemoryType = kinds.CU_MEMORYTYPE_HOST, kinds.CU_MEMORYTYPE_DEVICE
            copy.srcHost, copy.dstDevice = host_address, device_address
        self._checked("cuMemcpy2DAsync", driver.cuMemcpy2DAsync(copy, stream.cuda_stream))

    def _checked(self, call: str, result: tuple[Any, ...]) -> Any:
        status, *values = result
        if int(status) != 0:
            raise CudaError(f"{call} failed on device {self.ordinal}: {status.name}")
        return values[0] if values else None


class CudaMemory:
    """A budget of device memory in slabs, `committed` of them at first (None = all). Implements DeviceMemory.

    Everything but the constructor is called from the engine thread, except `reserve`, which any thread may call.
    """

    def __init__(
        self,
        device: torch.device,
        slab_bytes: int,
        total_slabs: int,
        compute_stream: torch.cuda.Stream,
        committed: int | None = None,
    ) -> None:
        torch.cuda.set_device(device)
        torch.cuda.current_stream(device).synchronize()  # makes the primary context, torch's own, the current one
        self.device = device
        self.slab_bytes = slab_bytes
        self.total_slabs = total_slabs
        self.ledger = SlabLedger(total_slabs, 0)
        self.driver = Driver(device.index or 0)
        self.compute_stream = compute_stream
        granularity = self.driver.granularity()
        if slab_bytes % granularity:
            raise ValueError(f"slab_bytes {slab_bytes} is not a multiple of the device's granularity {granularity}")
        self.handles: dict[int, Any] = {}  # of the slabs that are committed
        self.anchor: Any = self.driver.create(slab_bytes)
        self.ranges: list[CudaRange] = []
        self._readers: dict[int, torch.cuda.Event] = {}  # slab → when the copy that reads it has passed
        try:
            self.commit(range(total_slabs if committed is None else committed))
        except CudaError:
            self.driver.release(self.anchor)
            raise

    def note_reader(self, slab: int, passed: torch.cuda.Event) -> None:
        """Have the slab's next user wait for `passed`."""
        self._readers[slab] = passed

    def take_readers(self, slabs: Sequence[int]) -> dict[int, torch.cuda.Event]:
        """Return what the next user of these slabs must wait for, by place in `slabs`. The caller has to wait."""
        readers = {place: self._readers.pop(slab) for place, slab in enumerate(slabs) if slab in self._readers}
        return {place: passed for place, passed in readers.items() if not passed.query()}

    def reserve(self, num_slabs: int) -> "CudaRange":
        torch.cuda.set_device(self.device)
        made = CudaRange(self, num_slabs)
        self.ranges.append(made)
        return made

    def commit(self, slabs: Sequence[int]) -> None:
        made: dict[int, Any] = {}
        try:
            for slab in slabs:
                made[slab] = self.driver.create(self.slab_bytes)
        except CudaError as error:
            for handle in made.values():
                self.driver.release(handle)
            raise CudaError(
                f"{len(made)} of {len(slabs)} slabs of {self.slab_bytes} bytes could be allocated: {error}"
            ) from error
        self.ledger.commit(slabs)
        self.handles |= made

    def decommit(self, slabs: Sequence[int]) -> None:
        had = self.ledger.decommit(slabs)
        for made in self.ranges:
            made.forget(had)
        for passed in self.take_readers(had).values():
            passed.synchronize()
        for slab in had:
            self.driver.release(self.handles.pop(slab))

    def tidy(self) -> bool:
        return any(made.tidy() for made in self.ranges)

    def close(self) -> None:
        for made in list(self.ranges):
            made.close()
        for handle in self.handles.values():
            self.driver.release(handle)
        self.driver.release(self.anchor)
        self.handles.clear()


class CudaRange:
    """Implements VirtualRange."""

    def __init__(self, memory: CudaMemory, num_slabs: int) -> None:
        self.num_slabs = num_slabs
        self._memory = memory
        self._driver = memory.driver
        self._size = max(num_slabs, 1) * memory.slab_bytes
        self._live: list[int | None] = [None] * num_slabs  # what the owner sees
        self._under: list[int | None] = [None] * max(num_slabs, 1)  # what the driver has mapped
        self._stale: dict[int, list[torch.cuda.Event]] = {}  # place → when its last users have passed
        self._read_until: dict[int, torch.cuda.Event] = {}  # place → when the last copy from it has passed
        self._address = self._driver.reserve(self._size)
        try:
            self._put_anchor()
            self._view = torch.as_tensor(_ForeignArray(self._address, self._size), device=memory.device)
            if self._view.data_ptr() != self._address:
                raise CudaError("torch copied a reserved range instead of viewing it")
        except BaseException:
            self._release()
            raise

    @property
    def bytes_view(self) -> torch.Tensor:
        return self._view

    def map(self, first: int, slabs: Sequence[int]) -> None:
        places = range(first, first + len(slabs))
        if any(self._live[place] is not None for place in places):
            raise ValueError(f"places {first} to {first + len(slabs) - 1} are not all empty")
        self._memory.ledger.take(slabs)
        try:
            self._put(first, slabs)
        except BaseException:
            self._memory.ledger.give(slabs)
            raise
        for passed in self._memory.take_readers(slabs).values():
            self._memory.compute_stream.wait_event(passed)
        for place, slab in zip(places, slabs, strict=True):
            self._stale.pop(place, None)
            self._live[place] = slab

    def read_until(self, places: Iterable[int], passed: torch.cuda.Event) -> None:
        """Note that copies on another stream read these places until `passed`."""
        for place in places:
            slab = self._live[place]
            if slab is None:
                raise ValueError(f"place {place} is read and has no slab")
            self._read_until[place] = passed
            self._memory.note_reader(slab, passed)

    def unmap(self, first: int, count: int) -> None:
        slabs = [slab for slab in self._live[first : first + count] if slab is not None]
        if not slabs:
            return
        passed = torch.cuda.Event()
        passed.record(self._memory.compute_stream)
        for place in range(first, first + count):
            if self._live[place] is not None:
                reader = self._read_until.pop(place, None)
                self._stale[place] = [passed] if reader is None else [passed, reader]
                self._live[place] = None
        self._memory.ledger.give(slabs)

    def tidy(self) -> bool:
        """Unmap what is stale and no longer in use; True if there was something."""
        passed = [place for place, events in self._stale.items() if all(event.query() for event in events)]
        self._drop(passed)
        if 0 in passed:
            self._put_anchor()
        return bool(passed)

    def forget(self, slabs: Sequence[int]) -> None:
        """Unmap slabs that the owner has given up, after the work that uses them."""
        wanted = frozenset(slabs)
        stale = [place for place in self._stale if self._under[place] in wanted]
        self._drop(stale)
        if 0 in stale:
            self._put_anchor()

    def close(self) -> None:
        self.unmap(0, self.num_slabs)
        # A pass without KV uses the anchor's address, and no event marks its end.
        self._memory.compute_stream.synchronize()
        self._release()
        self._memory.ranges.remove(self)

    def _release(self) -> None:
        self._drop([place for place, slab in enumerate(self._under) if slab is not None])
        self._driver.free(self._address, self._size)

    def _put(self, first: int, slabs: Sequence[int]) -> None:
        """Have the driver map the slabs that are not mapped yet. If that fails, none of them stays mapped."""
        slab_bytes = self._memory.slab_bytes
        fresh: list[int] = []
        try:
            self._drop([place for place, slab in enumerate(slabs, first) if self._under[place] not in (None, slab)])
            for place, slab in enumerate(slabs, first):
                if self._under[place] is None:
                    self._driver.map(self._address + place * slab_bytes, slab_bytes, self._memory.handles[slab])
                    self._under[place] = slab
                    fresh.append(place)
            for start, count in _runs(fresh):
                self._driver.allow(self._address + start * slab_bytes, count * slab_bytes)
        except BaseException:
            self._drop(fresh)
            if self._under[0] is None:
                self._put_anchor()
            raise

    def _put_anchor(self) -> None:
        self._driver.map(self._address, self._memory.slab_bytes, self._memory.anchor)
        self._under[0] = _ANCHOR
        self._driver.allow(self._address, self._memory.slab_bytes)

    def _drop(self, places: list[int]) -> None:
        slab_bytes = self._memory.slab_bytes
        for place in places:
            for event in self._stale.pop(place, ()):
                event.synchronize()
            self._under[place] = None
            # the driver wants each mapping unmapped whole; one call may span several, but then they must be neighbours
            self._driver.unmap(self._address + place * slab_bytes, slab_bytes)


def _runs(places: list[int]) -> list[tuple[int, int]]:
    """Group ascending places into runs of adjacent ones, as (first, count)."""
    runs: list[tuple[int, int]] = []
    for place in places:
        if runs and runs[-1][0] + runs[-1][1] == place:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((place, 1))
    return runs
