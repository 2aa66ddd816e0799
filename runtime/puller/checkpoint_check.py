"""Inspects a checkpoint's files before they are loaded: their kind, whether they are complete, and whether they may and can be used.

Reads JSON and headers only.
"""

import hashlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from common.model_key import Quantization
from runtime.errors import LoadFailed
from runtime.puller.safetensors_header import read_header
from runtime.puller.sizing import TensorShape
from runtime.puller.source import ADAPTER_CONFIG, module_files

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_TEXTS = (".json", ".txt", ".jinja", ".model")
LARGEST_JSON_BYTES = 64 * 1024 * 1024  # of a configuration or an index; the largest there are have ten
_SLOW_TOKENIZERS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt")


class CheckpointKind(StrEnum):
    SAFETENSORS = "safetensors"
    BITSANDBYTES = "bitsandbytes"
    FP8 = "fp8"
    GGUF = "gguf"
    PICKLE = "pickle"


_KINDS = {Quantization.NONE: CheckpointKind.SAFETENSORS, Quantization.FP8: CheckpointKind.FP8}


@dataclass(frozen=True, slots=True)
class Policy:
    allow_pickle: bool = False
    allow_remote_code: bool = False


@dataclass(frozen=True, slots=True)
class CheckpointSummary:
    """The result of `inspect`. A GGUF file contains its configuration and tokenizer: `config` and `tensors` are then empty."""

    kind: CheckpointKind
    model_dir: Path
    weight_files: Sequence[Path]
    config: Mapping[str, object]
    tensors: Sequence[TensorShape]
    quantization: Quantization  # that the files hold already
    double_quant: bool
    needs_tokenizer: bool  # has only a slow tokenizer
    identity: str  # of the files as they are: names, sizes, times


def inspect(path: Path, policy: Policy) -> CheckpointSummary:
    """Inspect a directory or a .gguf file. Raises LoadFailed naming the file and what is wrong with it."""
    if path.is_file():
        return _inspect_file(path)
    if not path.is_dir():
        raise LoadFailed(f"{path}: no such file or directory")
    if not (path / "config.json").is_file():
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1:
            return _inspect_file(ggufs[0])
        if ggufs:
            raise LoadFailed(
                f"{path} has {len(ggufs)} GGUF files ({', '.join(file.name for file in ggufs[:4])}…): name one of them"
            )
        if (path / ADAPTER_CONFIG).is_file():
            raise LoadFailed(f"{path} is a LoRA adapter: register it with adapter_of, the name of its base model")
        raise LoadFailed(f"{path} has no config.json")
    config = read_json(path / "config.json")
    _refuse_remote_code(path, config, policy)
    quantization, double_quant = stored_quantization(_with_modelopt(path, config))
    files = _safetensors(path)
    kind = _KINDS.get(quantization, CheckpointKind.BITSANDBYTES)
    if not files:
        files = sorted(file for file in path.iterdir() if file.suffix in _PICKLES and file.name != "training_args.bin")
        if not files:
            raise LoadFailed(f"{path} has no weights: no *.safetensors and no .gguf file")
        if not policy.allow_pickle:
            raise LoadFailed(
                f"{path} has only pickled weights ({files[0].name}), which can run code when they are read; "
                "convert them to safetensors, or set allow_pickle"
            )
        kind = CheckpointKind.PICKLE
    tensors = (
        [] if kind is CheckpointKind.PICKLE else [tensor for file in files for tensor in read_header(file).tensors]
    )
    return CheckpointSummary(
        kind,
        path,
        files,
        config,
        tensors,
        quantization,
        double_quant,
        _needs_tokenizer(path),
        _identity([*files, *_texts(path)]),
    )


def read_json(path: Path) -> dict[str, object]:
    """Read a JSON object in a checkpoint. Raises LoadFailed naming the file."""
    try:
        with path.open("rb") as file:
            return parse_json(str(path), file.read(LARGEST_JSON_BYTES + 1))
    except FileNotFoundError:
        raise LoadFailed(f"{path.name} is missing in {path.parent}") from None
    except OSError as error:
        raise LoadFailed(f"{path} cannot be read: {error.strerror}") from error


def parse_json(name: str, data: bytes) -> dict[str, object]:
    """Parse an untrusted JSON object. Raises LoadFailed naming one that is too large, nested too deeply or damaged."""
    if len(data) > LARGEST_JSON_BYTES:
        raise LoadFailed(f"{name} is larger than {LARGEST_JSON_BYTES} bytes, which no configuration is")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        # The error's own text may quote the file, which need not be a checkpoint's.
        where = f" at line {error.lineno}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise LoadFailed(f"{name} is not valid JSON{where} ({type(error).__name__})") from None
    if not isinstance(value, dict):
        raise LoadFailed(f"{name} is not a JSON object")
    return value


def _inspect_file(path: Path) -> CheckpointSummary:
    if path.suffix != ".gguf":
        raise LoadFailed(f"{path}: a single file must be .gguf; name the directory of a safetensors checkpoint")
    with path.open("rb") as file:
        magic = file.read(8)
    if magic[:4] != b"GGUF":
        raise LoadFailed(f"{path} is not a GGUF file: it does not begin with GGUF")
    return CheckpointSummary(
        CheckpointKind.GGUF, path.parent, [path], {}, [], Quantization.NONE, False, True, _identity([path])
    )


def _safetensors(path: Path) -> list[Path]:
    index_path = path / "model.safetensors.index.json"
    if index_path.is_file():
        weight_map = read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise LoadFailed(f"{index_path} has no weight_map")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise LoadFailed(f"{index_path.name} names {name!r}, which is outside the checkpoint")
            if not (path / name).is_file():
                raise LoadFailed(f"{name} is missing: {index_path.name} names {len(names)} files")
        return [path / name for name in names]
    single = path / "model.safetensors"
    if single.is_file():
        return [single]
    return sorted(path.glob("*.safetensors"))


def stored_quantization(config: Mapping[str, object]) -> tuple[Quantization, bool]:
    """Return the format in which the weights are stored, and whether their scales are quantised, too. Raises LoadFailed for an unsupported format."""
    stored = config.get("quantization_config")
    if stored is None:
        return Quantization.NONE, False
    if not isinstance(stored, dict):
        raise LoadFailed(f"quantization_config in config.json is {type(stored).__name__}, not an object")
    method = str(stored.get("quant_method", "unknown"))
    if method == "bitsandbytes" or "load_in_4bit" in stored:
        if stored.get("load_in_8bit"):
            if stored.get("llm_int8_has_fp16_weight"):
                raise LoadFailed(
                    "the checkpoint keeps fp16 weights beside int8 (llm_int8_has_fp16_weight), which is not supported"
                )
            return Quantization.INT8, False
        if stored.get("load_in_4bit"):
            kind = str(stored.get("bnb_4bit_quant_type", "fp4"))
            if kind not in (Quantization.NF4, Quantization.FP4):
                raise LoadFailed(
                    f"the checkpoint is quantised with bitsandbytes' {kind!r}, which is not supported; nf4 and fp4 are"
                )
            return Quantization(kind), bool(stored.get("bnb_4bit_use_double_quant"))
    if _is_fp8(method, stored):
        return Quantization.FP8, False
    raise LoadFailed(
        f"the checkpoint is quantised with {method}, which is not supported; use fp8 (e4m3), bitsandbytes (int8, nf4, fp4), GGUF, "
        "or an unquantised one"
    )


def _is_fp8(method: str, stored: Mapping[str, object]) -> bool:
    """Whether the weights are e4m3 with scales per tensor, row or block: the formats of Qwen and DeepSeek, fbgemm, ModelOpt and compressed-tensors."""
    if method in ("fp8", "fbgemm_fp8"):
        return str(stored.get("fmt", "e4m3")) == "e4m3"
    if method.startswith("modelopt"):
        return str(stored.get("quant_algo")) == "FP8"
    groups = stored.get("config_groups")
    if method != "compressed-tensors" or not isinstance(groups, dict) or not groups:
        return False
    weights = [group.get("weights") for group in groups.values() if isinstance(group, dict)]
    return len(weights) == len(groups) and all(
        isinstance(one, dict)
        and (one.get("type"), one.get("num_bits")) == ("float", 8)
        and one.get("strategy") in ("tensor", "channel", "block")
        for one in weights
    )


def _with_modelopt(path: Path, config: Mapping[str, object]) -> Mapping[str, object]:
    """Return `config` with the quantisation that ModelOpt keeps in a file of its own."""
    file = path / "hf_quant_config.json"
    if "quantization_config" in config or not file.is_file():
        return config
    stored = read_json(file).get("quantization")
    return {
        **config,
        "quantization_config": {"quant_method": "modelopt", **stored} if isinstance(stored, dict) else stored,
    }


def _refuse_remote_code(path: Path, config: Mapping[str, object], policy: Policy) -> None:
    # Many checkpoints bring code for an architecture that transformers has. Its own code is used, and theirs never runs.
    model_type = str(config.get("model_type", ""))
    if "auto_map" not in config or policy.allow_remote_code or _is_native(model_type):
        return
    raise LoadFailed(
        f"{path.name} needs its own code (auto_map in config.json, model type {model_type!r}), which is not run"
    )


def _is_native(model_type: str) -> bool:
    spec = importlib.util.find_spec("transformers")  # finds, does not import
    if spec is None or spec.origin is None or not model_type:
        return False
    return (Path(spec.origin).parent / "models" / model_type.replace("-", "_")).is_dir()


def _needs_tokenizer(path: Path) -> bool:
    if (path / "tokenizer.json").is_file():
        return False
    if any((path / name).is_file() for name in _SLOW_TOKENIZERS):
        return True
    raise LoadFailed(f"{path} has no tokenizer: no tokenizer.json and none of {', '.join(_SLOW_TOKENIZERS)}")


def _texts(path: Path) -> list[Path]:
    """Return the configuration, tokenizer and template files, and sentence-transformers' modules: a packed directory holds copies of them."""
    files = [*path.iterdir(), *path.glob("additional_chat_templates/*")]
    return sorted([*(file for file in files if file.suffix in _TEXTS and file.is_file()), *module_files(path)])


def _identity(files: Sequence[Path]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        status = file.stat()
        digest.update(f"{file.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()
