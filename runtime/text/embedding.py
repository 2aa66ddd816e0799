"""How an embedding model makes a vector of its tokens' hidden states: the files of sentence-transformers beside the checkpoint."""

from pathlib import Path
from typing import TypeVar

import msgspec

from runtime.errors import LoadFailed

_T = TypeVar("_T")
_LAST, _MEAN = "lasttoken", "mean"


class _Module(msgspec.Struct, frozen=True):
    """An entry of modules.json. `type` is a class of sentence-transformers, such as `….models.Pooling`."""

    type: str
    path: str = ""

    @property
    def kind(self) -> str:
        return self.type.rpartition(".")[2]


class _Pooling(msgspec.Struct, frozen=True):
    """1_Pooling/config.json: a flag for each mode, or the mode's name in newer files."""

    pooling_mode: str | None = None
    pooling_mode_lasttoken: bool = False
    pooling_mode_mean_tokens: bool = False
    pooling_mode_cls_token: bool = False
    pooling_mode_max_tokens: bool = False
    pooling_mode_mean_sqrt_len_tokens: bool = False
    pooling_mode_weightedmean_tokens: bool = False

    @property
    def modes(self) -> list[str]:
        if self.pooling_mode is not None:
            return [self.pooling_mode]
        flags = {
            _LAST: self.pooling_mode_lasttoken,
            _MEAN: self.pooling_mode_mean_tokens,
            "cls": self.pooling_mode_cls_token,
        }
        flags |= {"max": self.pooling_mode_max_tokens, "mean_sqrt_len": self.pooling_mode_mean_sqrt_len_tokens}
        flags |= {"weightedmean": self.pooling_mode_weightedmean_tokens}
        return [name for name, used in flags.items() if used]


class Embedding(msgspec.Struct, frozen=True):
    """What the files say. `unsupported`: why this server cannot follow them; empty = it can, with the last token's hidden state."""

    normalizes: bool = True
    unsupported: str = ""


def read_embedding(model_dir: Path) -> Embedding | None:
    """Return how the model pools, or None if it is not an embedding model. Raises LoadFailed for a file that cannot be read."""
    modules = _read(model_dir / "modules.json", list[_Module])
    pooling_dir = "1_Pooling"
    kinds: list[str] = []
    if modules is not None:
        kinds = [module.kind for module in modules]
        pooling_dir = next((module.path for module in modules if module.kind == "Pooling"), pooling_dir)
    pooling = _read(_inside(model_dir, pooling_dir) / "config.json", _Pooling)
    if pooling is None:
        return None
    others = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    if others:
        return Embedding(unsupported=f"it has a module of the kind {others[0]}")
    if pooling.modes != [_LAST]:
        names = " and ".join(pooling.modes) or "no mode"
        return Embedding(unsupported=f"its pooling is {names}, and only the last token's is supported")
    return Embedding(normalizes=modules is None or "Normalize" in kinds)


def _inside(model_dir: Path, name: str) -> Path:
    """Return a folder of the checkpoint. Raises LoadFailed if the name leads out of it."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise LoadFailed(f"modules.json names the folder {name!r}, which is not in the checkpoint")
    return model_dir / name


def _read(path: Path, kind: type[_T]) -> _T | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except (msgspec.MsgspecError, OSError, UnicodeError, RecursionError) as error:
        raise LoadFailed(f"{path} can't be read: {error}") from error
