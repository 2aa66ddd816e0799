"""Reads how an embedding model makes a vector of its tokens' hidden states, from sentence-transformers' files beside the checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

from runtime.errors import LoadFailed
from runtime.text.embedding_layers import DenseConfig, Layer, normalize, read_dense
from runtime.types import Pooling

_T = TypeVar("_T")


class _Module(msgspec.Struct, frozen=True):
    """An entry of modules.json. `type` is a class of sentence-transformers, such as `….models.Pooling`."""

    type: str
    path: str = ""

    @property
    def kind(self) -> str:
        return self.type.rpartition(".")[2]


class _Pooling(msgspec.Struct, frozen=True):
    """1_Pooling/config.json: a flag for each mode, or the names of the modes in newer files."""

    word_embedding_dimension: int | None = None
    pooling_mode: str | list[str] | None = None
    pooling_mode_lasttoken: bool = False
    pooling_mode_mean_tokens: bool = False
    pooling_mode_cls_token: bool = False
    pooling_mode_max_tokens: bool = False
    pooling_mode_mean_sqrt_len_tokens: bool = False
    pooling_mode_weightedmean_tokens: bool = False
    include_prompt: bool = True

    @property
    def modes(self) -> list[str]:
        if self.pooling_mode is not None:
            return [self.pooling_mode] if isinstance(self.pooling_mode, str) else self.pooling_mode
        flags: dict[str, bool] = {
            Pooling.FIRST: self.pooling_mode_cls_token,
            Pooling.MAX: self.pooling_mode_max_tokens,
            Pooling.MEAN: self.pooling_mode_mean_tokens,
            Pooling.MEAN_SQRT_LEN: self.pooling_mode_mean_sqrt_len_tokens,
            Pooling.WEIGHTED_MEAN: self.pooling_mode_weightedmean_tokens,
            Pooling.LAST: self.pooling_mode_lasttoken,
        }
        return [name for name, used in flags.items() if used]


class _Prompts(msgspec.Struct, frozen=True):
    """config_sentence_transformers.json: texts that stand before an input, by the name of what the input is for."""

    prompts: dict[str, str] | None = None
    default_prompt_name: str | None = None


class Embedding(msgspec.Struct, frozen=True):
    """The content of the files.

    Attributes:
        pooling: the modes whose vectors are joined, in the order of `Pooling`.
        layers: what is applied to a pooled vector, in this order.
        default_prompt: the name of the prompt for requests that name none; None = no prompt.
        unsupported: why this server cannot follow the files; empty = it can.
    """

    pooling: tuple[Pooling, ...] = (Pooling.LAST,)
    layers: tuple[Layer, ...] = (normalize,)
    prompts: Mapping[str, str] = {}
    default_prompt: str | None = None
    unsupported: str = ""


def read_embedding(model_dir: Path) -> Embedding | None:
    """Return how the model pools, or None if it is not an embedding model. Raises LoadFailed for a file that cannot be read."""
    modules = _read(model_dir / "modules.json", list[_Module])
    pooling_dir = "1_Pooling"
    kinds: list[str] = []
    if modules is not None:
        kinds = [module.kind for module in modules]
        pooling_dir = next((module.path for module in modules if module.kind == "Pooling"), pooling_dir)
    found = _read(_inside(model_dir, pooling_dir) / "config.json", _Pooling)
    if found is None:
        return None
    if kinds and kinds[:2] != ["Transformer", "Pooling"]:
        return Embedding(unsupported=f"its modules are {', '.join(kinds)}; they must begin with Transformer, Pooling")
    unknown = [name for name in found.modes if name not in list(Pooling)]
    if unknown or not found.modes:
        return Embedding(unsupported=f"its pooling is {unknown[0] if unknown else 'no mode'}, which is not supported")
    asked = _read(model_dir / "config_sentence_transformers.json", _Prompts) or _Prompts()
    prompts = asked.prompts or {}
    if any(prompts.values()) and not found.include_prompt:
        return Embedding(unsupported="its pooling leaves out the tokens of its prompts")
    if asked.default_prompt_name is not None and asked.default_prompt_name not in prompts:
        raise LoadFailed(
            f"config_sentence_transformers.json has no prompt {asked.default_prompt_name!r}, which is its default_prompt_name"
        )
    pooling = tuple(mode for mode in Pooling if mode in found.modes)
    layers: list[Layer] = [normalize] if modules is None else []
    size = None if found.word_embedding_dimension is None else found.word_embedding_dimension * len(pooling)
    for module in (modules or [])[2:]:
        if module.kind == "Normalize":
            layers.append(normalize)
            continue
        if module.kind != "Dense":
            return Embedding(unsupported=f"it has a module of the kind {module.kind} after the pooling")
        folder = _inside(model_dir, module.path)
        dense = _read(folder / "config.json", DenseConfig)
        if dense is None:
            raise LoadFailed(f"{folder / 'config.json'} is missing, and modules.json names it")
        if dense.unsupported:
            return Embedding(unsupported=dense.unsupported)
        if size not in (None, dense.in_features):
            raise LoadFailed(
                f"{folder / 'config.json'} states in_features {dense.in_features}, and the vectors before it have {size} values"
            )
        size = dense.out_features
        layers.append(read_dense(folder, dense))
    return Embedding(pooling, tuple(layers), prompts, asked.default_prompt_name)


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
        raise LoadFailed(f"{path} cannot be read: {error}") from error
