"""Defines the messages from a follower to rank 0. Rank 0 sends device operations (engine.operations)."""

import msgspec


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The rank has its device. `total_slabs`: the slabs of its budget."""

    total_slabs: int


class Alive(msgspec.Struct, frozen=True, tag="alive"):
    """Sent every second."""


class Finished(msgspec.Struct, frozen=True, tag="finished"):
    """The answer to FinishLoad, CommitSlabs and DecommitSlabs. `code`: "" for success, else a gRPC status name with the error's text."""

    code: str = ""
    text: str = ""


class RankFailed(msgspec.Struct, frozen=True, tag="rank_failed"):
    """The rank has failed with the reason `text`. `cannot_start`: it failed at the start, and a restart would not help."""

    text: str
    cannot_start: bool = False


Report = Ready | Alive | Finished | RankFailed
