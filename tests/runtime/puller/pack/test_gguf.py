"""GGUF files are packed exactly, or refused by the name of what is not supported."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from runtime.errors import LoadFailed
from runtime.puller.gguf_index import read_index
from runtime.puller.pack.gguf_tokenizer import convert_gguf_tokenizer
from runtime.puller.pack.packing import pack
from runtime.puller.pack.request import PACKED_NAME, PackRequest
from tests.support.gguf_files import write_llama
from tests.support.llama_checkpoints import tiny_llama
from tests.support.smollm2 import gguf_path


def packed(tmp_path: Path, tied: bool = False, **options: Any) -> Path:
    model = tiny_llama(tmp_path / "model", tied=tied)
    path = tmp_path / "m.gguf"
    write_llama(model, path, **options)
    out = tmp_path / "out"
    out.mkdir()
    pack(PackRequest("gguf", str(tmp_path), (str(path),), str(out), "test"), lambda event: None)
    return out


def config(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "config.json").read_text())
    return content


@pytest.mark.parametrize("tied", [False, True])
def test_pack_reads_the_weights_of_a_gguf_file(tmp_path: Path, tied: bool) -> None:
    out = packed(tmp_path, tied)
    ours, theirs = load_file(out / PACKED_NAME), load_file(tmp_path / "model" / "model.safetensors")
    assert theirs.keys() <= ours.keys()
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name
    assert config(out)["rope_parameters"]["rope_type"] == "default"


@pytest.mark.parametrize("dropped", ["blk.1.ffn_up", "output_norm", "token_embd"])
def test_pack_refuses_a_gguf_file_with_a_missing_tensor(tmp_path: Path, dropped: str) -> None:
    with pytest.raises(LoadFailed, match=r"missing|cannot be read"):
        packed(tmp_path, drop=dropped)


def test_pack_refuses_a_gguf_file_with_an_unexpected_tensor(tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("blk.0.attn_q.bias", np.zeros(64, np.float32))

    with pytest.raises(LoadFailed, match=r"unexpected tensors.*blk\.0\.attn_q\.bias"):
        packed(tmp_path, change=change)


def test_read_index_refuses_one_part_of_a_split_file(tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_uint16("split.no", 1)
        writer.add_uint16("split.count", 2)

    with pytest.raises(LoadFailed, match=r"m\.gguf is part 2 of a GGUF file that was split into 2"):
        packed(tmp_path, change=change)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda writer: writer.add_float32("llama.attention.clamp_kqv", 8.0), "llama.attention.clamp_kqv"),
        (lambda writer: writer.add_uint32("llama.attention.key_length", 32), "llama.attention.key_length"),
        (lambda writer: writer.add_uint32("llama.attention.sliding_window", 16), "llama.attention.sliding_window"),
        (lambda writer: writer.add_uint32("llama.expert_count", 8), "llama.expert_count"),
        (lambda writer: writer.add_float32("llama.logit_scale", 0.5), "llama.logit_scale"),
        (lambda writer: writer.add_string("llama.rope.scaling.type", "longrope"), "longrope"),
        (lambda writer: writer.add_string("llama.invented", "x"), "llama.invented"),
        (lambda writer: writer.add_bool("tokenizer.ggml.remove_extra_whitespaces", True), "remove_extra_whitespaces"),
        (lambda writer: writer.add_type("adapter"), "general.type"),
        (lambda writer: writer.add_tensor("rope_freqs.weight", np.full(8, 3.0, np.float32)), "rope_freqs.weight"),
    ],
)
def test_pack_refuses_gguf_metadata_that_changes_the_computation(
    tmp_path: Path, change: Callable[[gguf.GGUFWriter], None], named: str
) -> None:
    with pytest.raises(LoadFailed, match=named.replace(".", r"\.")):
        packed(tmp_path, change=change)


def test_pack_accepts_gguf_metadata_that_changes_nothing(tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_uint32("llama.attention.key_length", 16)
        writer.add_uint32("llama.expert_count", 0)
        writer.add_uint32("llama.attention.sliding_window", 4096)
        writer.add_string("vendor.note", "anything")
        writer.add_uint16("split.count", 1)

    assert (packed(tmp_path, change=change) / PACKED_NAME).is_file()


def test_pack_keeps_linear_rope_scaling(tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_string("llama.rope.scaling.type", "linear")
        writer.add_float32("llama.rope.scaling.factor", 8.0)

    rope = config(packed(tmp_path, change=change))["rope_parameters"]
    assert (rope["rope_type"], rope["factor"]) == ("linear", 8.0)


def test_pack_keeps_yarn_rope_scaling(tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_string("llama.rope.scaling.type", "yarn")
        writer.add_float32("llama.rope.scaling.factor", 4.0)
        writer.add_uint32("llama.rope.scaling.original_context_length", 64)

    rope = config(packed(tmp_path, change=change))["rope_parameters"]
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", 4.0, 64)


def test_pack_recognises_the_rope_divisors_of_llama_3(tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    stated = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    stated |= {"original_max_position_embeddings": 8192, "rope_theta": 10000.0}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](
        LlamaConfig(hidden_size=64, num_attention_heads=4, rope_parameters=stated), torch.device("cpu")
    )
    plain = 10000.0 ** -(torch.arange(0, 16, 2).float() / 16)

    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", (plain / scaled).numpy())

    rope = config(packed(tmp_path, change=change))["rope_parameters"]
    assert rope.items() >= {key: value for key, value in stated.items() if key != "factor"}.items()
    assert rope["factor"] == pytest.approx(8.0, rel=1e-4)


def test_pack_ends_turns_at_all_end_tokens_of_a_gguf_file(tmp_path: Path) -> None:
    out = packed(tmp_path, change=lambda writer: writer.add_eot_token_id(2))
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [1, 2]


@pytest.mark.parametrize("pre", [None, "default", "invented"])
def test_pack_refuses_an_unknown_pre_tokenizer(tmp_path: Path, pre: str | None) -> None:
    with pytest.raises(LoadFailed, match=r"tokenizer\.ggml\.pre"):
        packed(tmp_path, pre=pre)


@pytest.mark.parametrize(
    ("pre", "stated", "begins"),
    [("gpt-2", None, False), ("gpt-2", True, True), ("llama-bpe", None, True), ("llama-bpe", False, False)],
)
def test_pack_adds_bos_by_the_pre_tokenizers_rule(tmp_path: Path, pre: str, stated: bool | None, begins: bool) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        if stated is not None:
            writer.add_add_bos_token(stated)

    tokenizer = Tokenizer.from_file(str(packed(tmp_path, pre=pre, change=change) / "tokenizer.json"))
    assert (tokenizer.encode("x").ids[0] == 0) is begins


def test_pack_keeps_added_tokens_whole(tmp_path: Path) -> None:
    extra = ("ñandú", "<tool call>", "<｜end▁of▁turn｜>")
    tokenizer = Tokenizer.from_file(str(packed(tmp_path, extra=extra) / "tokenizer.json"))
    assert tokenizer.encode("".join(extra)).ids == [3, 4, 5]
    assert tokenizer.get_vocab_size() == 300


def test_convert_gguf_tokenizer_splits_digits_by_the_stated_rule(tmp_path: Path) -> None:
    path = gguf_path()
    convert_gguf_tokenizer(gguf.GGUFReader(str(path)), read_index(path), path, tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("in 2024").tokens == ["in", "Ġ", "2", "0", "2", "4"]
    assert tokenizer.decode(tokenizer.encode("read once").ids) == "read once"
