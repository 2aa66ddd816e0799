"""What ModelMesh's pods compute from the numbers of a runtime, with Java's integers. Pure.

Memory is counted in units of 8192 bytes. The facts were read from ModelMesh 0.4.2 and seen in it.
"""

from dataclasses import dataclass

from wire.mmesh import model_runtime_pb2 as pb

UNIT_BYTES = 8192
MIB = 1024 * 1024
_MIN_QUEUE = 16
_QUEUE_PER_SLOT = 8
_INT_BITS = 32


class Refused(Exception):
    """ModelMesh does not start, or does not load the model, because of a number."""


def int32(value: int) -> int:
    """The value of an arithmetic result in a Java int."""
    wrapped = value % (1 << _INT_BITS)
    return wrapped - (1 << _INT_BITS) if wrapped >> (_INT_BITS - 1) else wrapped


def units_of(size_bytes: int) -> int:
    return -(-size_bytes // UNIT_BYTES)


@dataclass(frozen=True, slots=True)
class ModelMeshPod:
    """One pod's settings as ModelMesh derives them at the start. Times are in milliseconds."""

    capacity_units: int
    default_units: int
    loading_threads: int
    load_timeout_ms: int
    limits_concurrency: bool

    @classmethod
    def of(cls, status: pb.RuntimeStatusResponse) -> "ModelMeshPod":
        """Raises Refused for a runtime that ModelMesh does not start with."""
        default_units = units_of(status.defaultModelSizeInBytes)
        default_bytes = default_units * UNIT_BYTES
        if status.maxLoadingConcurrency < 1:
            raise Refused("loading concurrency")
        if status.modelLoadingTimeoutMs < 100:
            raise Refused("loading timeout")
        if default_units < 1:
            raise Refused("default size")
        if status.capacityInBytes < max(2 * default_bytes, min(512 * MIB, 10 * default_bytes)):
            raise Refused("capacity too small for the default size")
        return cls(
            status.capacityInBytes // UNIT_BYTES,
            default_units,
            status.maxLoadingConcurrency,
            status.modelLoadingTimeoutMs,
            status.limitModelConcurrency,
        )

    @property
    def assumed_loaded_after_ms(self) -> int:
        return max(3000, self.load_timeout_ms // 3)

    @property
    def longest_wait_ms(self) -> int:
        """How long a request waits for a load at most."""
        return 5 * self.load_timeout_ms

    @property
    def min_churn_age_ms(self) -> int:
        """The age below which a full pod evicts no model and refuses new ones, unless tas.min_churn_age_ms is set."""
        return 10 * self.assumed_loaded_after_ms

    @property
    def unload_reserve_units(self) -> int:
        wanted = int32(self.loading_threads * self.default_units) // (2 if self.loading_threads <= 2 else 4)
        return max(min(wanted, self.capacity_units // 10), self.capacity_units // 100)

    @property
    def effective_units(self) -> int:
        """What models may take."""
        return self.capacity_units - self.unload_reserve_units

    @property
    def full_below_units(self) -> int:
        """The free space below which the pod is full, which arms the churn guard."""
        return max(self.default_units, min(int32(self.default_units * self.loading_threads), self.capacity_units // 20))

    def insertion_weight(self, predicted_bytes: int | None) -> int:
        """The weight of a model that is about to be loaded. None: the runtime did not answer within 0.5 s, or with an error.

        Raises Refused for 0: its cache throws, and the model never loads.
        """
        if predicted_bytes is None:
            return self.default_units
        weight = units_of(predicted_bytes)
        if weight < 1:
            raise Refused("a weight of 0")
        if weight > self.effective_units:
            raise Refused("larger than the total effective capacity")
        return weight

    def most_in_flight(self, max_concurrency: int) -> int:
        """The requests of one copy that run or wait; the next one gets "Model queue overload"."""
        slots = max_concurrency if max_concurrency >= 1 else 1
        return max(_MIN_QUEUE, int32(slots * _QUEUE_PER_SLOT))
