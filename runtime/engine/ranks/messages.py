"""Defines the messages from a follower to rank 0. Rank 0 sends device operations (engine.operations)."""

import msgspec


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The rank has its device. `total_slabs`: the slabs of its budget."""

    total_slabs: int


class Alive(msgspec.Struct, frozen=True, tag="alive"):
    """Sent every second."""


class LoadFinished(msgspec.Struct, frozen=True, tag="load_finished"):
    """The answer to FinishLoad. `code`: "" for a model that is there, else a gRPC status name with the error's text."""

    model_id: str
    code: str = ""
    text: str = ""


class RankFailed(msgspec.Struct, frozen=True, tag="rank_failed"):
    """The rank has failed with the reason `text`. `cannot_start`: it failed at the start, and a restart would not help."""

    text: str
    cannot_start: bool = False


Report = Ready | Alive | LoadFinished | RankFailed
