"""What the fake backend's models and adapters are like, and the rule by which their tokens are drawn."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from runtime.engine.interfaces import (
    KvGeometry,
)


def draw(
    model_id: str,
    history: Sequence[int],
    vocab: int,
    suppressed: Sequence[int] = (),
    allowed: Sequence[int] | None = None,
) -> int:
    """The fake model's next token. Where `allowed` and `suppressed` leave nothing, `allowed` has precedence."""
    if allowed is not None:
        left = set(allowed) - set(suppressed) or set(allowed)
        suppressed = [token for token in range(vocab) if token not in left]
    digest = blake2b(repr((model_id, tuple(history))).encode(), digest_size=8).digest()
    token = int.from_bytes(digest, "little") % vocab
    while token in suppressed:
        token = (token + 1) % vocab
    return token


def voice(model_id: str, adapter: str) -> str:
    """The name that tokens are drawn by."""
    return f"{model_id}+{adapter}" if adapter else model_id


@dataclass
class FakeSpec:
    """Handed as Load.checkpoint.model_dir's stand-in: see FakeBackend.specs."""

    weight_slabs: int = 4
    vocab: int = 48
    eos: tuple[int, ...] = (0, 1)
    max_model_len: int = 200
    kv: KvGeometry = field(default_factory=lambda: KvGeometry(4, 4, 8, 2, 256, 64))
    load_polls: int = 2
    swap_polls: int = 3
    latency_polls: int = 2
    fails: str = ""


@dataclass
class FakeAdapterSpec:
    """`content` decides, with the base, what the adapter's sequences say."""

    base: str
    content: str
    size_bytes: int = 5000
    load_polls: int = 1
    swap_polls: int = 2
    fails: str = ""
    swap_fails: bool = False
