"""Decides what a control-plane stream is sent next, and which changes Envoy has confirmed. There is one object per stream."""

from collections.abc import Mapping
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

    def next(self, wanted: Mapping[str, str], generation: int, nonce: str) -> Difference | None:
        """Return what has to be sent for `wanted` to hold, and count it as sent; None for nothing.

        The first message is sent even if it is empty, because Envoy waits for it before it listens.
        """
        difference = Difference(
            tuple(name for name, version in wanted.items() if self.known.get(name) != version),
            tuple(name for name in self.known if name not in wanted),
        )
        if not self._has_begun or difference.changed or difference.removed:
            self._has_begun = True
            self.known = dict(wanted)
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
