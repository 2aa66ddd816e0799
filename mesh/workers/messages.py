"""Defines the messages between a pod's control process and its workers, over one socket for each worker."""

import msgspec

from mesh.config.schema import MeshConfig
from mesh.envoy.plan import Carrier


class CarriedCopy(msgspec.Struct, frozen=True):
    """A name whose calls a worker sends to this pod's copy. `stat_name`: under which it counts them, as in mesh.envoy.plan.Cluster."""

    carrier: Carrier
    name: str
    model_id: str
    stat_name: str


class Start(msgspec.Struct, frozen=True, tag=True):
    """The first message of control: what the worker serves, and the sockets of the process that takes all calls."""

    config: MeshConfig
    instance_id: str
    listen: dict[Carrier, str]
    control: dict[Carrier, str]


class Table(msgspec.Struct, frozen=True, tag=True):
    """Copies by their clusters' names that are new or different, and the names of those that calls may not go to any more.

    `is_foreign`: the runtime reports no state. `logs_requests`: a line is logged for each request.
    """

    generation: int
    changed: dict[str, CarriedCopy]
    removed: tuple[str, ...]
    is_foreign: bool
    logs_requests: bool


class Ask(msgspec.Struct, frozen=True, tag=True):
    """Asks for the worker's figures."""

    number: int


class Lose(msgspec.Struct, frozen=True, tag=True):
    """Says that the runtime does not answer. Calls whose response has begun are ended, too, if `committed`."""

    committed: bool


class Leave(msgspec.Struct, frozen=True, tag=True):
    """The worker takes no further connections, and ends with its last call or after the grace period."""


class Listening(msgspec.Struct, frozen=True, tag=True):
    """The worker takes connections. Until it gets a table, it sends all calls to control."""


class Confirmed(msgspec.Struct, frozen=True, tag=True):
    """The worker decides by this generation of its table from now on."""

    generation: int


class CopyCalls(msgspec.Struct, frozen=True):
    """Calls to one copy. `begun`: since the last report. `active`: those that have not ended. `latency_s`: the recent median, 0 if unknown."""

    begun: int
    active: int
    latency_s: float


class EndedCalls(msgspec.Struct, frozen=True):
    """Calls of a key that have ended with a status since the last report."""

    key: str
    carrier: Carrier
    code: str
    count: int


class Figures(msgspec.Struct, frozen=True, tag=True):
    """The answer to Ask. `copies`: by stat_name."""

    number: int
    copies: dict[str, CopyCalls]
    keys: tuple[EndedCalls, ...]


ToWorker = Start | Table | Ask | Lose | Leave
ToControl = Listening | Confirmed | Figures
