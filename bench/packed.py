"""Provides checkpoints as the puller prepares them: original files for bf16, a packed file for quantised formats."""

import json
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import torch
from safetensors.torch import save_file

from bench.checkpoints import Shape, config_of
from common.model_key import Quantization
from runtime.checkpoint.quantized_shapes import padded_width
from runtime.puller.pack.request import FORMAT, PACKED_NAME, PackRequest
from runtime.types import Checkpoint

_PLAIN = {"bf16": "bfloat16", "fp32": "float32"}


def checkpoint_of(folder: Path, format_: str, cache: Path) -> Checkpoint:
    """`format_`: bf16 | fp32 | int8 | fp8 | nf4 | fp4. Packs into `cache` once, by the packer's own process (on the GPU if there is one)."""
    files = tuple(str(path) for path in sorted(folder.glob("*.safetensors")))
    num_bytes = sum(Path(path).stat().st_size for path in files)
    if format_ in _PLAIN:
        return Checkpoint(str(folder), files, None, Quantization.NONE, _PLAIN[format_], num_bytes)
    quantization = Quantization(format_)
    out = cache / f"{folder.name}-{format_}"
    packed = out / PACKED_NAME
    if not packed.exists():
        out.mkdir(parents=True, exist_ok=True)
        tokenizer = folder / "tokenizer.json"
        if not tokenizer.exists():
            tokenizer.write_text("{}")  # random weights need no tokenizer, and the packer would look for one to convert
        request = PackRequest("safetensors", str(folder), files, str(out), "benchmark", quantization, dtype="bfloat16")
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "runtime.puller.pack"],
            input=msgspec.json.encode(request),
            capture_output=True,
            check=False,
        )
        if done.returncode != 0 or not packed.exists():
            raise RuntimeError(
                f"packing {folder.name} as {format_}: {done.stdout[-500:]!r} {done.stderr[-1500:].decode(errors='replace')}"
            )
        print(f"packed {folder.name} as {format_} in {time.perf_counter() - started:.1f} s", flush=True)
    return Checkpoint(str(out), (), str(packed), quantization, "bfloat16", packed.stat().st_size)


def random_packed(shape: Shape, format_: str, folder: Path) -> Checkpoint:
    """A packed file of random codes and scales, as large and as distributed as a packed model's, in seconds: for timing steps, not packing."""
    out = folder / f"{shape.name}-{format_}-random"
    packed = out / PACKED_NAME
    quantization = Quantization(format_)
    if not packed.exists():
        out.mkdir(parents=True, exist_ok=True)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        generator = torch.Generator(device).manual_seed(1)
        tensors: dict[str, torch.Tensor] = {}

        def linear(name: str, rows: int, columns: int) -> None:
            spread = 0.7 / columns**0.5
            if quantization is Quantization.INT8:
                codes = (
                    (torch.randn(rows, columns, generator=generator, device=device) * 32)
                    .clamp(-127, 127)
                    .to(torch.int8)
                )
                tensors[f"{name}.scale"] = torch.full((rows,), spread / 32)
            elif quantization is Quantization.FP8:
                codes = (
                    (torch.randn(rows, columns, generator=generator, device=device) * 112)
                    .clamp(-448, 448)
                    .to(torch.float8_e4m3fn)
                )
                tensors[f"{name}.scale"] = torch.full((rows,), spread / 112)
            else:
                width = padded_width(columns)
                codes = torch.randint(0, 256, (rows, width // 2), generator=generator, device=device, dtype=torch.uint8)
                tensors[f"{name}.absmax"] = (
                    (torch.rand(rows, width // 64, generator=generator, device=device) + 0.5).mul_(1.7 * spread).cpu()
                )
            tensors[f"{name}.weight"] = codes.cpu()

        def plain(name: str, rows: int, columns: int) -> None:
            wide = torch.randn(rows, columns, generator=generator, device=device) * (0.7 / columns**0.5)
            tensors[f"{name}.weight"] = wide.to(torch.bfloat16).cpu()

        q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        for layer in range(shape.layers):
            base = f"model.layers.{layer}."
            for name, size in (("q", q), ("k", kv), ("v", kv)):
                linear(f"{base}self_attn.{name}_proj", size, shape.hidden)
            linear(f"{base}self_attn.o_proj", shape.hidden, q)
            linear(f"{base}mlp.gate_proj", shape.intermediate, shape.hidden)
            linear(f"{base}mlp.up_proj", shape.intermediate, shape.hidden)
            linear(f"{base}mlp.down_proj", shape.hidden, shape.intermediate)
            for name in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{base}{name}.weight"] = torch.ones(shape.hidden, dtype=torch.bfloat16)
        plain("model.embed_tokens", shape.vocab, shape.hidden)
        tensors["model.norm.weight"] = torch.ones(shape.hidden, dtype=torch.bfloat16)
        if not shape.tied:
            plain("lm_head", shape.vocab, shape.hidden)
        (out / "config.json").write_text(json.dumps(config_of(shape)))
        save_file(
            tensors,
            packed,
            metadata={"format": FORMAT, "quantization": format_, "dtype": "bfloat16", "layout_4bit": "kernel"},
        )
        if device == "cuda":
            torch.cuda.empty_cache()
    return Checkpoint(str(out), (), str(packed), quantization, "bfloat16", packed.stat().st_size)
