"""From files to an image: every layout of files gives the same bytes, and every damaged one a LoadFailed that says what is wrong."""

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from runtime.engine.memory.weight_buffer import Contiguous
from runtime.engine.model.build.builder import draw
from runtime.engine.model.build.equivalence_check import EquivalenceChecker
from runtime.errors import Cancelled, LoadFailed
from runtime.types import Checkpoint
from tests.support.families import VOCAB
from tests.support.steps import bring_up, hf_logits, prompts, save
from tests.support.tiny_models import assert_same, tiny


def rewrite(checkpoint: Checkpoint, tensors: dict[str, torch.Tensor]) -> None:
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        checkpoint.weight_files[0],
        metadata={"format": "pt"},
    )


def read(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = load_file(checkpoint.weight_files[0])
    return weights


def refused(checkpoint: Checkpoint) -> str:
    with pytest.raises(LoadFailed) as caught:
        draw("m", checkpoint, None, EquivalenceChecker(fuse=True), num_threads=1, min_group_bytes=1)
    assert caught.value.message.startswith("model m: ")
    return caught.value.message


def test_sharded_equals_single(tmp_path: Path) -> None:
    model = tiny("llama")
    single = bring_up(save(model, tmp_path / "one"))
    checkpoint = save(model, tmp_path / "many", max_shard_size="40KB")
    assert len(checkpoint.weight_files) > 2
    sharded = bring_up(checkpoint)
    asked = prompts(VOCAB, [9])
    assert torch.equal(single.logits(asked)[0], sharded.logits(asked)[0])
    assert torch.equal(single.memory.weights_view, sharded.memory.weights_view)


def test_names_without_the_models_prefix(tmp_path: Path) -> None:
    model = tiny("gpt2")
    checkpoint = save(model, tmp_path)
    rewrite(checkpoint, {name.removeprefix("transformer."): tensor for name, tensor in read(checkpoint).items()})
    asked = prompts(VOCAB, [9])
    assert_same(bring_up(checkpoint).logits(asked), hf_logits(model, asked))


def test_old_names_are_renamed(tmp_path: Path) -> None:
    model = tiny("neox")
    checkpoint = save(model, tmp_path)
    old = {name.replace("lm_head.", "embed_out."): tensor for name, tensor in read(checkpoint).items()}
    old["gpt_neox.layers.0.attention.bias"] = torch.ones(1, 1, 4, 4)  # a mask that older versions stored
    assert "embed_out.weight" in old
    rewrite(checkpoint, old)
    asked = prompts(VOCAB, [9])
    assert_same(bring_up(checkpoint).logits(asked), hf_logits(model, asked))


def test_experts_are_stacked(tmp_path: Path) -> None:
    model = tiny("mixtral")
    checkpoint = save(model, tmp_path)
    assert any(".experts.0.w1." in name for name in read(checkpoint)), "transformers saves experts apart"
    asked = prompts(VOCAB, [9])
    assert_same(bring_up(checkpoint).logits(asked), hf_logits(model, asked))


@pytest.mark.parametrize("kept", ["lm_head.weight", "transformer.wte.weight"])
def test_weight_loader_finds_a_tied_tensor_by_either_name(tmp_path: Path, kept: str) -> None:
    model = tiny("gpt2")
    checkpoint = save(model, tmp_path)
    tensors = read(checkpoint)
    tied = tensors.pop("transformer.wte.weight")
    rewrite(checkpoint, {**tensors, kept: tied})
    asked = prompts(VOCAB, [9])
    assert_same(bring_up(checkpoint).logits(asked), hf_logits(model, asked))


def test_tied_by_the_configuration_but_not_in_fact(tmp_path: Path) -> None:
    model = tiny("gpt2")
    checkpoint = save(model, tmp_path)
    tensors = read(checkpoint)
    tensors["lm_head.weight"] = torch.randn(VOCAB, 48, generator=torch.Generator().manual_seed(1))
    rewrite(checkpoint, tensors)
    asked = prompts(VOCAB, [9])
    before = hf_logits(model, asked)
    model.lm_head.weight = torch.nn.Parameter(tensors["lm_head.weight"])
    found = bring_up(checkpoint).logits(asked)
    assert_same(found, hf_logits(model, asked))
    assert not torch.allclose(found[0], before[0])


def test_constants_that_old_files_store_are_ignored(tmp_path: Path) -> None:
    model = tiny("gpt2")
    checkpoint = save(model, tmp_path)
    constants = {
        f"transformer.h.{layer}.attn.{name}": torch.tensor(value)
        for layer in range(3)
        for name, value in (("masked_bias", -1e4), ("bias", [[[[1.0]]]]))
    }
    rewrite(checkpoint, read(checkpoint) | constants)
    asked = prompts(VOCAB, [9])
    assert_same(bring_up(checkpoint).logits(asked), hf_logits(model, asked))
    rewrite(checkpoint, read(checkpoint) | {"transformer.h.0.attn.masked_weight": torch.zeros(1)})
    assert "has unexpected transformer.h.0.attn.masked_weight" in refused(checkpoint)


def test_weight_loader_names_missing_and_unexpected_tensors(tmp_path: Path) -> None:
    checkpoint = save(tiny("llama"), tmp_path)
    tensors = read(checkpoint)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    rewrite(checkpoint, {**tensors, "model.layers.1.mlp.sideways.weight": torch.zeros(2)})
    message = refused(checkpoint)
    assert "is missing model.layers.1.mlp.up_proj.weight" in message
    assert "has unexpected model.layers.1.mlp.sideways.weight" in message


def test_weight_loader_names_a_wrong_shape(tmp_path: Path) -> None:
    checkpoint = save(tiny("llama"), tmp_path)
    rewrite(checkpoint, read(checkpoint) | {"model.norm.weight": torch.ones(7)})
    message = refused(checkpoint)
    assert "model.norm.weight" in message
    assert "[7]" in message
    assert "[48]" in message


@pytest.mark.parametrize(("keep", "says"), [(3, "not even a header"), (200, "its header alone needs"), (-5, "ends at")])
def test_weight_loader_names_a_truncated_file(tmp_path: Path, keep: int, says: str) -> None:
    checkpoint = save(tiny("llama"), tmp_path)
    file = Path(checkpoint.weight_files[0])
    data = file.read_bytes()
    file.write_bytes(data[:keep])
    message = refused(checkpoint)
    assert "truncated" in message
    assert says in message
    assert str(file) in message


@pytest.mark.parametrize(
    "header", [b"\xff" * 8, (40).to_bytes(8, "little") + b"no JSON" * 20, (2).to_bytes(8, "little") + b"[]"]
)
def test_weight_loader_names_a_file_of_another_format(tmp_path: Path, header: bytes) -> None:
    checkpoint = save(tiny("llama"), tmp_path)
    Path(checkpoint.weight_files[0]).write_bytes(header)
    assert "is not a safetensors file" in refused(checkpoint)


def test_weight_loader_names_a_missing_file(tmp_path: Path) -> None:
    checkpoint = save(tiny("llama"), tmp_path)
    Path(checkpoint.weight_files[0]).unlink()
    assert f"{checkpoint.weight_files[0]} cannot be read: No such file" in refused(checkpoint)


def test_weight_loader_fails_the_swap_in_of_a_file_that_shrank(tmp_path: Path) -> None:
    checkpoint = save(tiny("llama"), tmp_path)
    resident = bring_up(checkpoint)
    asked = prompts(VOCAB, [5])
    resident.logits(asked)
    resident.memory.evict()
    file = Path(checkpoint.weight_files[0])
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    resident.memory.swap_in(range(resident.memory.weight_slabs))
    with pytest.raises(LoadFailed, match="truncated"):
        resident.logits(asked)
    assert resident.memory.swap_in_done()
    assert resident.memory.pending
    resident.memory.evict()
    file.write_bytes(data)
    resident.memory.swap_in(range(resident.memory.weight_slabs))
    assert len(resident.logits(asked)) == 1


def test_weight_filler_can_be_cancelled(tmp_path: Path) -> None:
    blueprint = draw(
        "m", save(tiny("llama"), tmp_path), None, EquivalenceChecker(fuse=True), num_threads=2, min_group_bytes=1
    )
    cancelled = threading.Event()
    groups: list[int] = []

    def stop(group: int) -> None:
        groups.append(group)
        cancelled.set()

    big = Contiguous(torch.zeros(blueprint.layout.size_bytes, dtype=torch.uint8))
    cancelled.set()
    with pytest.raises(Cancelled):
        blueprint.filler.fill(big, cancelled, stop)
    assert groups == []


def test_groups_come_in_order(tmp_path: Path) -> None:
    blueprint = draw(
        "m", save(tiny("llama"), tmp_path), None, EquivalenceChecker(fuse=True), num_threads=2, min_group_bytes=1
    )
    image = torch.zeros(blueprint.layout.size_bytes, dtype=torch.uint8)
    groups: list[int] = []
    blueprint.filler.fill(Contiguous(image), threading.Event(), groups.append)
    assert groups == list(range(len(blueprint.layout.group_ends)))
    assert len(groups) >= 5


def test_unsupported_models_say_why(tmp_path: Path) -> None:
    checkpoint = save(tiny("llama"), tmp_path)
    config_file = tmp_path / "config.json"
    original = config_file.read_text()
    cases: list[tuple[dict[str, object], str]] = [
        ({"model_type": "mamba"}, "recurrent state"),
        ({"model_type": "bloom"}, "no attention hook"),
        ({"model_type": "t5"}, "not a causal language model"),
        ({"model_type": "no such thing"}, "config.json cannot be used"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised in a format"),
    ]
    for changes, says in cases:
        config_file.write_text(json.dumps({**json.loads(original), **changes}))
        message = refused(checkpoint)
        assert says in message, message
    config_file.unlink()
    assert "config.json cannot be used" in refused(checkpoint)


def test_end_tokens_and_context_limit(tmp_path: Path) -> None:
    checkpoint = save(tiny("llama"), tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 3, 7]}))
    prover = EquivalenceChecker(fuse=True)
    blueprint = draw("m", checkpoint, 100, prover, num_threads=1, min_group_bytes=1)
    assert blueprint.card.eos_token_ids[:2] == (7, 3)
    assert blueprint.card.max_model_len == 100
    with pytest.raises(LoadFailed, match="max_model_len 513 is not within the checkpoint's 512 tokens"):
        draw("m", checkpoint, 513, prover, num_threads=1, min_group_bytes=1)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "eos_token_id": 11}))
    (tmp_path / "generation_config.json").unlink()
    blueprint = draw("m", checkpoint, None, prover, num_threads=1, min_group_bytes=1)
    assert blueprint.card.eos_token_ids == (11,)
    assert blueprint.card.max_model_len == 512


def test_identity_follows_the_files(tmp_path: Path) -> None:
    checkpoint = save(tiny("llama"), tmp_path)
    prover = EquivalenceChecker(fuse=True)

    def identity() -> str:
        return draw("m", checkpoint, None, prover, num_threads=1, min_group_bytes=1).identity

    first = identity()
    assert identity() == first
    copy = tmp_path / "copy"
    shutil.copy(checkpoint.weight_files[0], copy)
    copy.replace(checkpoint.weight_files[0])
    assert identity() != first
