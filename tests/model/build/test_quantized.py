"""Packed files run: 4-bit and int8 weights, fused and unfused, in bitsandbytes' layout and in the kernels', beside bitsandbytes' own layers."""

from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM, PreTrainedModel

from common.model_key import Quantization
from runtime.checkpoint.layout_4bit import bitsandbytes_layout_4bit
from runtime.errors import LoadFailed
from runtime.puller.pack.quantize import quantize
from tests.support.steps import bring_up, hf_logits, packed, prompts, save
from tests.support.tiny_models import assert_same

VOCAB = 193


def model_of(kind: str) -> PreTrainedModel:
    common = {
        "vocab_size": VOCAB,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_size": 192,
        "intermediate_size": 256,
    }
    torch.manual_seed(0)
    model: PreTrainedModel
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**common, num_key_value_heads=2, attention_bias=True))
    else:
        model = PhiForCausalLM(PhiConfig(**common))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 1.0 / parameter.shape[-1] ** 0.5)
    return model.eval()


def quantized_linears(model: PreTrainedModel) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]


def pack(model: PreTrainedModel, file: Path, quantization: Quantization, *, kernel_layout: bool) -> None:
    tensors = dict(model.state_dict())
    for name in quantized_linears(model):
        made = quantize(tensors[f"{name}.weight"], quantization, double_quant=False)
        codes, scale = made.weight, made.scale
        if not kernel_layout and quantization in (Quantization.NF4, Quantization.FP4):
            rows, columns = tensors[f"{name}.weight"].shape
            codes, scale = bitsandbytes_layout_4bit(codes, scale, columns)
            codes, scale = codes.view(rows, columns // 2), scale.view(rows, columns // 64)
        tensors[f"{name}.weight"] = codes
        tensors[f"{name}.{made.scale_name}"] = scale
    metadata = {"format": "repertory-packed-1", **({"layout_4bit": "kernel"} if kernel_layout else {})}
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, str(file), metadata=metadata)


def with_bitsandbytes(model: PreTrainedModel, quantization: Quantization) -> PreTrainedModel:
    """`model` with its layers' linears replaced by bitsandbytes' own, quantised by them."""
    for name in quantized_linears(model):
        old = model.get_submodule(name)
        if quantization is Quantization.INT8:
            new: nn.Module = bnb.nn.Linear8bitLt(
                old.in_features, old.out_features, bias=old.bias is not None, has_fp16_weights=False, threshold=0.0
            )
            new.weight = bnb.nn.Int8Params(old.weight.data.clone(), has_fp16_weights=False, requires_grad=False)
        else:
            new = bnb.nn.Linear4bit(
                old.in_features,
                old.out_features,
                bias=old.bias is not None,
                compute_dtype=torch.float32,
                compress_statistics=False,
                quant_type=quantization.value,
            )
            new.weight = bnb.nn.Params4bit(
                old.weight.data.clone(), requires_grad=False, compress_statistics=False, quant_type=quantization.value
            )
        if old.bias is not None:
            new.bias = old.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new.to("cpu"))
    return model


@pytest.mark.parametrize("kind", ["llama", "phi"])
@pytest.mark.parametrize("quantization", [Quantization.NF4, Quantization.FP4, Quantization.INT8])
@pytest.mark.parametrize("kernel_layout", [True, False])
def test_packed_model_computes_what_bitsandbytes_does(
    tmp_path: Path, kind: str, quantization: Quantization, kernel_layout: bool
) -> None:
    if kernel_layout and quantization is Quantization.INT8:
        pytest.skip("int8 has one layout")
    model = model_of(kind)
    checkpoint = save(model, tmp_path)
    pack(model, tmp_path / "packed", quantization, kernel_layout=kernel_layout)
    resident = bring_up(packed(checkpoint, tmp_path / "packed", quantization))
    assert resident.built.path.startswith("fused" if kind == "llama" else "unfused")
    asked = prompts(VOCAB, [21, 6])
    unquantized = hf_logits(model, asked)
    found = resident.logits(asked)
    oracle = hf_logits(with_bitsandbytes(model, quantization), asked)
    # int8 rounds activations, and theirs go through float16
    assert_same(found, oracle, tolerance=1e-4 if quantization is not Quantization.INT8 else 4e-2)
    assert float((found[0] - unquantized[0]).abs().max()) > 1e-3, "quantising leaves its mark"
    if quantization is not Quantization.INT8:
        assert resident.blueprint.layout.size_bytes < 0.45 * sum(
            4 * parameter.numel() for parameter in model_of(kind).parameters()
        )


@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_packed_fp8_model_computes_with_the_dequantised_weights(tmp_path: Path, kind: str) -> None:
    model = model_of(kind)
    checkpoint = save(model, tmp_path)
    pack(model, tmp_path / "packed", Quantization.FP8, kernel_layout=False)
    resident = bring_up(packed(checkpoint, tmp_path / "packed", Quantization.FP8))
    asked = prompts(VOCAB, [21, 6])
    unquantized = hf_logits(model, asked)
    with torch.no_grad():
        for name in quantized_linears(model):
            weight = model.get_submodule(name).weight
            made = quantize(weight, Quantization.FP8, double_quant=False)
            weight.copy_(made.weight.float() * made.scale[:, None])
    found = resident.logits(asked)
    assert_same(found, hf_logits(model, asked), tolerance=1e-4)
    assert float((found[0] - unquantized[0]).abs().max()) > 1e-3


def test_packed_file_that_lacks_a_tensor_is_refused_by_its_name(tmp_path: Path) -> None:
    model = model_of("llama")
    checkpoint = save(model, tmp_path)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    del state["model.layers.1.self_attn.o_proj.weight"]
    save_file(state, str(tmp_path / "packed"))
    with pytest.raises(LoadFailed, match=r"the packed file is missing model\.layers\.1\.self_attn\.o_proj\.weight"):
        bring_up(packed(checkpoint, tmp_path / "packed", Quantization.NONE))
