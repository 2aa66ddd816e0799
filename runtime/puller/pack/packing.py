"""Fills a packed directory: reads, quantises and writes tensor by tensor, in several threads within a byte budget.

The weights of GGUF files and pickles are held in memory as a whole.
"""

import copy
import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.model_key import Quantization
from runtime.checkpoint.meta_model import build_skeleton, stored_specs, tied_names
from runtime.checkpoint.model_config import ModelConfig, check_sizes, read_card
from runtime.checkpoint.name_mapping import is_old_constant
from runtime.checkpoint.packed import KERNEL_LAYOUT
from runtime.checkpoint.quantized_shapes import packed_shapes
from runtime.checkpoint.safetensors_index import read_index
from runtime.checkpoint.weight_layout import TensorSpec
from runtime.errors import LoadFailed
from runtime.puller.gguf_index import read_index as read_gguf_index
from runtime.puller.pack.aux_files import convert_tokenizer, copy_beside, write_config
from runtime.puller.pack.finite_weights import check_finite, check_scales, check_stored
from runtime.puller.pack.gguf_tokenizer import convert_gguf_tokenizer, end_of_turn_ids
from runtime.puller.pack.gguf_weights import check_gguf_names, read_gguf_config, read_gguf_weights
from runtime.puller.pack.quantize import Matrix, quantize
from runtime.puller.pack.request import PACKED_NAME, PackEvent, PackProgress, PackRequest
from runtime.puller.pack.tensors import FromFiles, InMemory, Tensors, quantizable
from runtime.puller.pack.writer import Entry, PackedWriter
from runtime.types import Checkpoint

Say = Callable[[PackEvent], None]
_MOST_THREADS = 16
_BYTES_AT_ONCE = 2 << 30
_CODES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
}

_CODE_TYPES = {Quantization.INT8: "I8", Quantization.FP8: "F8_E4M3"}


@torch.inference_mode()
def pack(request: PackRequest, say: Say) -> int:
    """Fill `request.out_dir`; returns the packed file's bytes. Raises LoadFailed, OSError."""
    out_dir = Path(request.out_dir)
    model_dir = Path(request.model_dir)
    whole: dict[str, Tensor | Matrix] | None = None
    if request.kind == "gguf":
        whole = _read_gguf(request, out_dir, say)
    else:
        copy_beside(model_dir, out_dir)
        if not (out_dir / "tokenizer.json").is_file():
            say(PackProgress(0, 0, "converting the tokenizer"))
            convert_tokenizer(model_dir, out_dir)
        if request.kind == "pickle":
            say(PackProgress(0, 0, "reading the pickled weights"))
            whole = _read_pickles(request)
    if not request.pack_weights:
        return 0
    card = read_card("", Checkpoint(model_dir=str(out_dir), dtype=request.dtype), None)
    return _pack_weights(request, card, whole, out_dir / PACKED_NAME, say)


def _pack_weights(
    request: PackRequest, card: ModelConfig, whole: dict[str, Tensor | Matrix] | None, path: Path, say: Say
) -> int:
    if whole is None:
        check_sizes(card, len(read_index(request.weight_files)))
    skeleton = build_skeleton(card.model_class, copy.deepcopy(card.config), "eager")
    specs = stored_specs(skeleton, card.dtype, card.num_layers)
    tensors: Tensors
    kept: dict[str, Matrix] = {}
    if whole is not None:
        tensors = InMemory(whole)
        kept = {name: matrix for name, matrix in whole.items() if isinstance(matrix, Matrix)}
        serialised: set[str] = set()
    else:
        from_files = FromFiles(skeleton, specs, request.weight_files, tied_names(skeleton), _fp8_block(request))
        tensors, serialised = from_files, from_files.serialised
    chosen = _chosen(request, skeleton, specs, serialised)
    entries = [
        entry
        for spec in specs
        for entry in (
            _kept_entries(spec.name, kept[spec.name])
            if spec.name in kept
            else _entries(spec, request.quantization, spec.name in chosen)
        )
    ]
    metadata = {
        "quantization": request.quantization.value,
        "double_quant": str(request.double_quant).lower(),
        "dtype": request.dtype,
        "source": request.source,
        "layout_4bit": KERNEL_LAYOUT,
    }
    writer = PackedWriter(path, entries, metadata)
    bytes_at_once = _Budget(_BYTES_AT_ONCE)

    def make(spec: TensorSpec) -> TensorSpec:
        with torch.inference_mode(), bytes_at_once.share(spec.size_bytes):
            for name, tensor in _made(tensors.take(spec), spec, request, spec.name in chosen):
                writer.write(name, _bytes(tensor))
        return spec

    verb = "writing" if request.quantization is Quantization.NONE else f"quantising to {request.quantization.value}:"
    threads = ThreadPoolExecutor(max(1, min(_MOST_THREADS, os.cpu_count() or 1)), thread_name_prefix="pack")
    try:
        for spec in threads.map(make, specs):
            layer = (
                f"layer {spec.layer + 1} of {card.num_layers}"
                if 0 <= spec.layer < card.num_layers
                else spec.name.rpartition(".")[0]
            )
            say(PackProgress(writer.written_bytes, writer.total_bytes, f"{verb} {layer}"))
        say(PackProgress(writer.written_bytes, writer.total_bytes, "verifying"))
        writer.finish(threads.map)
    finally:
        threads.shutdown(wait=True, cancel_futures=True)
        writer.close()
    return writer.total_bytes


def _fp8_block(request: PackRequest) -> tuple[int, int] | None:
    """Return the rows and columns that share a scale, from an fp8 checkpoint's quantization_config."""
    if request.kind != "fp8":
        return None
    stored = json.loads((Path(request.model_dir) / "config.json").read_text()).get("quantization_config") or {}
    size = stored.get("weight_block_size")
    for group in (stored.get("config_groups") or {}).values():
        size = size or group["weights"].get("block_structure")
    return (int(size[0]), int(size[1])) if size else None


class _Budget:
    """Limits the bytes of tensors in memory at the same time. A single tensor may exceed the limit."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._used_bytes = 0
        self._changed = threading.Condition()

    @contextmanager
    def share(self, size_bytes: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._used_bytes or self._used_bytes + size_bytes <= self._limit_bytes)
            self._used_bytes += size_bytes
        try:
            yield
        finally:
            with self._changed:
                self._used_bytes -= size_bytes
                self._changed.notify_all()


def _chosen(request: PackRequest, skeleton: Any, specs: list[TensorSpec], serialised: set[str]) -> set[str]:
    """Return the names of the weights that the packed file holds quantised."""
    if request.quantization is Quantization.NONE:
        return set()
    if request.kind in ("bitsandbytes", "fp8"):
        names = serialised
    else:
        names = {f"{module}.weight" for module in quantizable(skeleton)}
    shapes = {spec.name: spec.shape for spec in specs}
    chosen = {
        name for name in names if name in shapes and packed_shapes(_two(shapes[name]), request.quantization) is not None
    }
    if not chosen:
        raise LoadFailed(
            f"{type(skeleton).__name__} has no linear layer that {request.quantization.value} could quantise"
        )
    return chosen


def _entries(spec: TensorSpec, quantization: Quantization, chosen: bool) -> list[Entry]:
    if chosen and (shapes := packed_shapes(_two(spec.shape), quantization)) is not None:
        codes, scale_name, scales = shapes
        module = spec.name.rpartition(".")[0]
        count = 1
        for size in scales:
            count *= size
        code = _CODE_TYPES.get(quantization, "U8")
        return [
            Entry(spec.name, code, codes, codes[0] * codes[1]),
            Entry(f"{module}.{scale_name}", "F32", scales, 4 * count),
        ]
    return [Entry(spec.name, _CODES[spec.dtype], spec.shape, spec.size_bytes)]


def _kept_entries(name: str, matrix: Matrix) -> list[Entry]:
    tensors = {name: matrix.weight, f"{name.rpartition('.')[0]}.{matrix.scale_name}": matrix.scale}
    return [Entry(key, _CODES[one.dtype], tuple(one.shape), one.nbytes) for key, one in tensors.items()]


def _made(tensor: Tensor | Matrix, spec: TensorSpec, request: PackRequest, chosen: bool) -> list[tuple[str, Tensor]]:
    if isinstance(tensor, Tensor):
        if tuple(tensor.shape) != spec.shape:
            raise LoadFailed(
                f"tensor {spec.name} has shape {list(tensor.shape)} in the checkpoint, the model wants {list(spec.shape)}"
            )
        if not chosen:
            stored = tensor.to(spec.dtype) if tensor.dtype.is_floating_point else tensor
            check_finite(stored, tensor, spec.name)
            return [(spec.name, stored)]
        tensor = _quantize(tensor, spec, request)
    else:
        check_stored(tensor, spec.name)
    module = spec.name.rpartition(".")[0]
    return [(spec.name, tensor.weight), (f"{module}.{tensor.scale_name}", tensor.scale)]


def _quantize(tensor: Tensor, spec: TensorSpec, request: PackRequest) -> Matrix:
    if torch.cuda.is_available():
        try:
            return _quantize_there(tensor.to("cuda"), spec, request)
        except torch.cuda.OutOfMemoryError:  # The engine uses the device; the CPU is slower but has room.
            torch.cuda.empty_cache()
    return _quantize_there(tensor, spec, request)


def _quantize_there(tensor: Tensor, spec: TensorSpec, request: PackRequest) -> Matrix:
    """Quantise a tensor on its device."""
    weight = tensor.to(spec.dtype)
    check_finite(weight, tensor, spec.name)
    matrix = quantize(weight, request.quantization, double_quant=request.double_quant)
    check_scales(matrix, spec.name, request.quantization)
    return matrix


def _bytes(tensor: Tensor) -> memoryview:
    array: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _two(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0], shape[1]) if len(shape) == 2 else (1, 1)


def _read_gguf(request: PackRequest, out_dir: Path, say: Say) -> dict[str, Tensor | Matrix]:
    """Write the file's configuration and tokenizer to `out_dir` and return its weights, none if they are not to be packed."""
    from gguf import GGUFReader

    path = Path(request.weight_files[0])
    index = read_gguf_index(path)
    say(PackProgress(0, 0, f"reading {path.name}"))
    try:
        reader: Any = GGUFReader(str(path))
        config = read_gguf_config(reader, index, path)
        end_ids = end_of_turn_ids(index)
        write_config({**config.to_dict(), "dtype": request.dtype}, out_dir)
        (out_dir / "generation_config.json").write_text(json.dumps({"eos_token_id": end_ids} if end_ids else {}))
        say(PackProgress(0, 0, "converting the tokenizer"))
        convert_gguf_tokenizer(reader, index, path, out_dir)
        card = read_card("", Checkpoint(model_dir=str(out_dir), dtype=request.dtype), None)
        check_sizes(card, len(index.tensors))
        model = build_skeleton(card.model_class, card.config, "eager")
        check_gguf_names(reader, model, index.architecture)
        if not request.pack_weights:
            return {}
        say(PackProgress(0, 0, f"dequantising {path.name}"))
        return read_gguf_weights(reader, model, index.architecture, card.dtype, keep_blocks=request.keep_blocks)
    except (LoadFailed, MemoryError):
        raise
    except Exception as error:  # the readers raise whatever a file of foreign make leads them to
        raise LoadFailed(f"{path.name} cannot be read: {type(error).__name__}: {error}") from error


def _read_pickles(request: PackRequest) -> dict[str, Tensor | Matrix]:
    """Load pickled weights by way of transformers. Raises LoadFailed naming tensors that are missing or unexpected."""
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            request.model_dir,
            dtype=getattr(torch, request.dtype),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=False,
            weights_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # the reader raises whatever a file of foreign make leads it to
        raise LoadFailed(
            f"{Path(request.weight_files[0]).name} cannot be read: {type(error).__name__}: {error}"
        ) from error
    for what in ("missing", "unexpected"):
        if names := sorted(name for name in info[f"{what}_keys"] if not is_old_constant(name)):
            raise LoadFailed(
                f"{Path(request.weight_files[0]).name} has {what} tensors for {type(model).__name__}: {', '.join(names[:5])}"
            )
    weights: dict[str, Tensor | Matrix] = dict(model.state_dict())
    return weights
