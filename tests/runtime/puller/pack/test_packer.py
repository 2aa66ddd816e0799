"""The packer as a process: what it writes is bitsandbytes' own numbers in our layout, whole, aligned, and made once."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common.model_key import ModelSettings, Quantization
from runtime.checkpoint.layout_4bit import bitsandbytes_layout_4bit
from runtime.errors import InvalidRequest, LoadFailed, ModelTooLarge, RepertoryError
from runtime.models.model_state import Phase, Prepared, Progress
from runtime.puller.cache import Cache
from runtime.puller.preparer import CheckpointPreparer
from runtime.types import ModelSource
from tests.support.families import family
from tests.support.llama_checkpoints import save_tokenizer, tiny_llama
from tests.support.packing import pack_here
from tests.support.sources import OPEN


@pytest.fixture
def preparation(tmp_path: Path) -> Iterator[CheckpointPreparer]:
    """With the packer in this process, which has torch already."""
    preparation = CheckpointPreparer(OPEN, Cache(tmp_path / "cache", 1 << 30), pack_here)
    yield preparation
    preparation.close()


@pytest.fixture
def apart(tmp_path: Path) -> Iterator[CheckpointPreparer]:
    """With the packer in a process of its own, as it is meant."""
    preparation = CheckpointPreparer(OPEN, Cache(tmp_path / "cache", 1 << 30))
    yield preparation
    preparation.close()


async def prepare(
    preparation: CheckpointPreparer, path: Path, seen: list[Progress] | None = None, **settings: object
) -> Prepared:
    report = seen.append if seen is not None else lambda progress: None
    return await preparation.prepare(ModelSource(str(path)), ModelSettings(**settings), "cpu", report)  # type: ignore[arg-type]


def packed(prepared: Prepared) -> dict[str, torch.Tensor]:
    assert prepared.checkpoint.packed_file is not None
    entries: dict[str, torch.Tensor] = load_file(prepared.checkpoint.packed_file)
    return entries


async def test_preparer_uses_unquantised_safetensors_in_place(preparation: CheckpointPreparer, tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "m", shard="60KB")
    prepared = await prepare(preparation, tmp_path / "m")
    checkpoint = prepared.checkpoint
    assert checkpoint.packed_file is None
    assert checkpoint.model_dir == str(tmp_path / "m")
    assert len(checkpoint.weight_files) > 1
    assert checkpoint.weight_bytes == sum(p.numel() * 4 for p in model.parameters())
    prepared.release()
    assert not list((tmp_path / "cache" / "packed").iterdir())


async def test_pack_int8_equals_bitsandbytes(apart: CheckpointPreparer, tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "m")
    seen: list[Progress] = []
    prepared = await prepare(apart, tmp_path / "m", seen, quantize=Quantization.INT8)
    tensors = packed(prepared)
    weight = model.model.layers[1].mlp.down_proj.weight.detach()
    codes, absmax, _ = bnb.int8_vectorwise_quant(weight.to(torch.float16))
    assert torch.equal(tensors["model.layers.1.mlp.down_proj.weight"], codes)
    assert torch.equal(tensors["model.layers.1.mlp.down_proj.scale"], absmax.float() / 127.0)
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(tensors[name], model.state_dict()[name])
    packing = [progress for progress in seen if progress.phase is Phase.PACKING]
    assert any("layer 2 of 2" in progress.text for progress in packing)
    assert packing[-1].done_bytes == packing[-1].total_bytes > 0


@pytest.mark.parametrize(
    ("quantize", "double"), [(Quantization.NF4, False), (Quantization.FP4, False), (Quantization.NF4, True)]
)
async def test_pack_4_bit_equals_bitsandbytes(
    preparation: CheckpointPreparer, tmp_path: Path, quantize: Quantization, double: bool
) -> None:
    model = tiny_llama(tmp_path / "m", tied=True)
    prepared = await prepare(preparation, tmp_path / "m", quantize=quantize, double_quant=double)
    tensors = packed(prepared)
    weight = model.model.layers[0].self_attn.q_proj.weight.detach()
    codes, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type=quantize.value)
    name = "model.layers.0.self_attn.q_proj"
    # in the kernels' layout, a row of one block padded to two
    assert tensors[f"{name}.weight"].shape == (64, 64)
    assert tensors[f"{name}.absmax"].shape == (64, 2)
    theirs, absmax = bitsandbytes_layout_4bit(tensors[f"{name}.weight"], tensors[f"{name}.absmax"], 64)
    assert torch.equal(theirs, codes)
    # read by hand: high nibble first, a scale for each 64 values of a row
    nibbles = torch.stack((theirs >> 4, theirs & 15), dim=-1).view(64, 64).long()
    table = bnb.get_4bit_type(quantize.value, device="cpu")
    assert torch.allclose(table[nibbles] * absmax[:, None], bnb.dequantize_4bit(codes, state), atol=1e-6)
    assert "lm_head.weight" not in tensors


async def test_pack_keeps_rows_that_blocks_do_not_divide(preparation: CheckpointPreparer, tmp_path: Path) -> None:
    tiny_llama(tmp_path / "m", hidden=96)
    tensors = packed(await prepare(preparation, tmp_path / "m", quantize=Quantization.NF4))
    assert tensors["model.layers.0.self_attn.q_proj.weight"].dtype is torch.float32
    assert tensors["model.layers.0.mlp.down_proj.weight"].dtype is torch.uint8  # 192 columns


async def test_pack_aligns_orders_and_hashes_tensors(preparation: CheckpointPreparer, tmp_path: Path) -> None:
    tiny_llama(tmp_path / "m", hidden=72)
    prepared = await prepare(preparation, tmp_path / "m", quantize=Quantization.INT8)
    assert prepared.checkpoint.packed_file is not None
    data = Path(prepared.checkpoint.packed_file).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__")
    assert metadata["format"] == "repertory-packed-1"
    assert metadata["quantization"] == "int8"
    assert set(metadata["content_blake2b"]) != {"0"}
    assert (8 + length) % 256 == 0
    starts = {name: entry["data_offsets"][0] for name, entry in header.items() if not name.startswith("_padding")}
    assert all(start % 256 == 0 for start in starts.values())
    names = sorted(starts, key=lambda name: starts[name])
    assert names[0] == "model.embed_tokens.weight"
    layers = [int(name.split(".")[2]) for name in names if name.startswith("model.layers.")]
    assert layers == sorted(layers)
    with safe_open(prepared.checkpoint.packed_file, "pt") as file:  # any reader of the format takes it
        assert "model.norm.weight" in file.keys()  # noqa: SIM118 — a handle, not a dict


async def test_preparer_packs_once(preparation: CheckpointPreparer, tmp_path: Path) -> None:
    tiny_llama(tmp_path / "m")
    (await prepare(preparation, tmp_path / "m", quantize=Quantization.INT8)).release()
    seen: list[Progress] = []
    await prepare(preparation, tmp_path / "m", seen, quantize=Quantization.INT8)
    assert all(progress.phase is Phase.PULLING for progress in seen)
    both = await asyncio.gather(*(prepare(preparation, tmp_path / "m", quantize=Quantization.NF4) for _ in range(3)))
    assert len({one.checkpoint.packed_file for one in both}) == 1
    assert len(list((tmp_path / "cache" / "packed").iterdir())) == 2


@pytest.mark.parametrize("kind", ["int8", "nf4", "nf4-double", "nf4-bfloat16", "fp4-double-float32"])
async def test_pack_keeps_serialised_quantised_weights(
    preparation: CheckpointPreparer, tmp_path: Path, kind: str
) -> None:
    model = tiny_llama(tmp_path / "plain")
    quantize, double = Quantization(kind.partition("-")[0]), "-double" in kind
    storage = next((dtype for dtype in (torch.bfloat16, torch.float32) if str(dtype)[6:] in kind), torch.uint8)
    ours = packed(await prepare(preparation, tmp_path / "plain", quantize=quantize, double_quant=double))
    serialise(model, tmp_path / "plain", tmp_path / "stored", quantize, double, storage)
    look = await preparation.look(ModelSource(str(tmp_path / "stored")), ModelSettings(), "cpu")
    prepared = await prepare(preparation, tmp_path / "stored")
    assert prepared.checkpoint.quantization is quantize
    theirs = packed(prepared)
    assert theirs.keys() == ours.keys()
    for name in ours:
        assert torch.equal(theirs[name], ours[name]), name
    assert "quantization_config" not in json.loads((Path(prepared.checkpoint.model_dir) / "config.json").read_text())
    assert look.needs.weight_bytes < sum(tensor.numel() * 4 for tensor in model.state_dict().values())
    other = Quantization.INT8 if quantize is Quantization.FP4 else Quantization.FP4
    with pytest.raises(InvalidRequest, match="is stored in"):
        await prepare(preparation, tmp_path / "stored", quantize=other)


async def test_packer_says_what_went_wrong_in_it(apart: CheckpointPreparer, tmp_path: Path) -> None:
    """Whatever the exception is: without an answer the process would be taken for killed."""
    serialise(tiny_llama(tmp_path / "plain"), tmp_path / "plain", tmp_path / "stored", Quantization.NF4, False)
    path = tmp_path / "stored" / "model.safetensors"
    tensors = load_file(path)
    damaged = next(name for name in tensors if "quant_state." in name)
    save_file(tensors | {damaged: torch.zeros(4, dtype=torch.uint8)}, path, {"format": "pt"})
    with pytest.raises(RepertoryError, match="packing failed: JSONDecodeError"):
        await prepare(apart, tmp_path / "stored")


def serialise(
    model: torch.nn.Module,
    plain: Path,
    stored: Path,
    quantize: Quantization,
    double: bool,
    storage: torch.dtype = torch.uint8,
) -> None:
    """What transformers writes for a model that bitsandbytes quantised. `storage`: the type that the codes' bytes are written as."""
    stored.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in model.state_dict().items():
        if "_proj" not in name:
            tensors[name] = weight.clone()
        elif quantize is Quantization.INT8:
            codes, absmax, _ = bnb.int8_vectorwise_quant(weight.to(torch.float16))
            module = name.removesuffix(".weight")
            tensors |= {
                name: codes,
                f"{module}.SCB": absmax,
                f"{module}.weight_format": torch.tensor(0, dtype=torch.uint8),
            }
        else:
            codes, state = bnb.quantize_4bit(
                weight, blocksize=64, compress_statistics=double, quant_type=quantize.value
            )
            tensors[name] = codes.reshape(-1).view(storage).reshape(-1, 1)
            tensors |= {f"{name}.{key}": part.clone() for key, part in state.as_dict(packed=True).items()}
    save_file(tensors, stored / "model.safetensors", {"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    stored_as = (
        {"load_in_8bit": True}
        if quantize is Quantization.INT8
        else {"load_in_4bit": True, "bnb_4bit_quant_type": quantize.value, "bnb_4bit_use_double_quant": double}
    )
    config["quantization_config"] = {"quant_method": "bitsandbytes", **stored_as}
    (stored / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (stored / name).write_bytes((plain / name).read_bytes())


@pytest.mark.parametrize("kind", ["tensor", "channel", "block", "modelopt"])
async def test_pack_reads_serialised_fp8(preparation: CheckpointPreparer, tmp_path: Path, kind: str) -> None:
    model = tiny_llama(tmp_path / "plain")
    exact = serialise_fp8(model, tmp_path / "plain", tmp_path / "stored", kind)
    prepared = await prepare(preparation, tmp_path / "stored")
    assert prepared.checkpoint.quantization is Quantization.FP8
    tensors = packed(prepared)
    for name, weight in exact.items():
        codes, scale = tensors[name], tensors[f"{name.removesuffix('.weight')}.scale"]
        assert codes.dtype is torch.float8_e4m3fn
        found = codes.float() * scale[:, None]
        if kind == "block":  # quantised again, by row
            assert float((found - weight).norm() / weight.norm()) < 0.04
        else:
            assert torch.equal(found, weight), name
    assert tensors["lm_head.weight"].dtype is torch.float32


def serialise_fp8(model: torch.nn.Module, plain: Path, stored: Path, kind: str) -> dict[str, torch.Tensor]:
    """Write `model` in one of the fp8 formats. Returns the dequantised matrices."""
    stored.mkdir()
    tensors, exact = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for name, weight in model.state_dict().items():
        if "_proj" not in name:
            tensors[name] = weight.clone()
            continue
        rows, columns = weight.shape
        if kind == "channel":
            scale = weight.abs().amax(1, keepdim=True) / 448
        elif kind == "block":
            scale = torch.rand(-(-rows // 48), -(-columns // 32)) * 1e-3 + 1e-3
        else:
            scale = weight.abs().max() / 448
        spread = scale
        if kind == "block":
            spread = scale.repeat_interleave(48, 0)[:rows].repeat_interleave(32, 1)[:, :columns]
        codes = (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
        module = name.removesuffix(".weight")
        tensors[name] = codes
        tensors[f"{module}.weight_scale_inv" if kind == "block" else f"{module}.weight_scale"] = scale
        tensors[f"{module}.input_scale"] = torch.tensor(1.0)
        exact[name] = codes.float() * spread
    tensors["model.layers.0.self_attn.k_proj.k_scale"] = torch.tensor(1.0)
    save_file(tensors, stored / "model.safetensors", {"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    if kind == "block":
        config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [48, 32]}
    elif kind == "modelopt":
        (stored / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    else:
        weights = {"num_bits": 8, "type": "float", "strategy": kind}
        config["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
            "ignore": ["lm_head"],
        }
    (stored / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (stored / name).write_bytes((plain / name).read_bytes())
    return exact


@pytest.mark.parametrize(
    "stored",
    [
        {"quant_method": "fp8", "fmt": "e5m2"},
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 4, "type": "int"}}}},
    ],
)
async def test_preparer_refuses_other_quantised_formats(
    preparation: CheckpointPreparer, tmp_path: Path, stored: dict[str, object]
) -> None:
    tiny_llama(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "quantization_config": stored}))
    with pytest.raises(LoadFailed, match=f"quantised with {stored['quant_method']}, which is not supported"):
        await prepare(preparation, tmp_path / "m")


async def test_pack_fp8_scales_rows_to_the_largest_code(preparation: CheckpointPreparer, tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "m")
    tensors = packed(await prepare(preparation, tmp_path / "m", quantize=Quantization.FP8))
    weight = model.model.layers[1].mlp.down_proj.weight.detach()
    codes = tensors["model.layers.1.mlp.down_proj.weight"].float()
    scale = tensors["model.layers.1.mlp.down_proj.scale"]
    torch.testing.assert_close(scale, weight.abs().amax(1) / 448)
    assert bool(((codes * scale[:, None] - weight).abs() <= 2**-4 * weight.abs() + 2**-9 * scale[:, None]).all())


async def test_look_refuses_a_format_that_the_packer_has_no_layer_for(
    preparation: CheckpointPreparer, tmp_path: Path
) -> None:
    """GPT-2's layers are no linear ones, so its load fails; what predicts its size and registers it must say the same."""
    family("gpt2").save_pretrained(tmp_path / "m")
    save_tokenizer(tmp_path / "m")
    source = ModelSource(str(tmp_path / "m"))
    plain = await preparation.look(source, ModelSettings(), "cpu")
    assert plain.quantization is Quantization.NONE
    for quantize in (Quantization.INT8, Quantization.NF4, Quantization.FP8):
        with pytest.raises(InvalidRequest, match="GPT2LMHeadModel has no linear layer"):
            await preparation.look(source, ModelSettings(quantize=quantize), "cpu")
        with pytest.raises(LoadFailed, match="GPT2LMHeadModel has no linear layer"):
            await prepare(preparation, tmp_path / "m", quantize=quantize)


async def test_preparer_cleans_up_after_a_failed_pack(preparation: CheckpointPreparer, tmp_path: Path) -> None:
    tiny_llama(tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoadFailed, match=r"model\.norm\.weight"):
        await prepare(preparation, tmp_path / "m", quantize=Quantization.INT8)
    assert not list((tmp_path / "cache" / "packed").iterdir())


async def test_preparer_cleans_up_after_a_cancelled_pack(apart: CheckpointPreparer, tmp_path: Path) -> None:
    tiny_llama(tmp_path / "m")
    seen: list[Progress] = []
    packing = asyncio.create_task(prepare(apart, tmp_path / "m", seen, quantize=Quantization.NF4))
    while not any(progress.phase is Phase.PACKING for progress in seen):
        await asyncio.sleep(0.02)
    packing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await packing
    assert not list((tmp_path / "cache" / "packed").iterdir())
    children = Path("/proc/self/task").glob("*/children")
    assert not any(
        "runtime.puller.pack" in Path(f"/proc/{pid}/cmdline").read_text()
        for one in children
        for pid in one.read_text().split()
    )


async def test_preparer_names_a_cache_budget_that_is_too_small(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "m")
    preparation = CheckpointPreparer(OPEN, Cache(tmp_path / "cache", 1000))
    with pytest.raises(ModelTooLarge, match="budget of 1000 bytes"):
        await prepare(preparation, tmp_path / "m", quantize=Quantization.INT8)
    preparation.close()
