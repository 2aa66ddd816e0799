"""Decides what a control-plane stream is sent next, and which changes Envoy has confirmed. There is one object per stream."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Difference:
    """What changes a set of resources into another one, by name."""

    changed: tuple[str, ...]
    removed: tuple[str, ...]


@dataclass(slots=True)
class DeltaStream:
    """The state of one stream. Resources are known by their versions.

    Attributes:
        known: what Envoy has, or has been sent.
        confirmed: the newest generation of resources that Envoy has taken as a whole.
    """

    known: dict[str, str] = field(default_factory=dict)
    confirmed: int = 0
    _has_begun: bool = False
    _awaited: dict[str, int] = field(default_factory=dict)  # nonce → generation, in the order of sending

    def next(
        self, wanted: Mapping[str, str], generation: int, nonce: str, *, among: Iterable[str] | None = None
    ) -> Difference | None:
        """Return what has to be sent for `wanted` to hold, and count it as sent; None for nothing.

        `among`: the names that may have changed since the last call; None for all.
        The first message is sent even if it is empty, because Envoy waits for it before it listens.
        """
        names = tuple({**wanted, **self.known} if among is None else among)
        difference = Difference(
            tuple(name for name in names if name in wanted and self.known.get(name) != wanted[name]),
            tuple(name for name in names if name in self.known and name not in wanted),
        )
        if not self._has_begun or difference.changed or difference.removed:
            self._has_begun = True
            self.known.update((name, wanted[name]) for name in difference.changed)
            for name in difference.removed:
                del self.known[name]
            self._awaited[nonce] = generation
            return difference
        if self._awaited:
            # The last message sent already brings Envoy to this generation.
            self._awaited[next(reversed(self._awaited))] = generation
        else:
            self.confirmed = generation
        return None

    def answered(self, nonce: str) -> None:
        """Note that Envoy has taken, or refused, the message with this nonce and the ones before it."""
        if nonce not in self._awaited:
            return
        for earlier in list(self._awaited):
            self.confirmed = self._awaited.pop(earlier)
            if earlier == nonce:
                return
