"""GGUF files that are cut, damaged or made to mislead: told with their sizes before the format's library takes their word for anything."""

import random
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from runtime.errors import LoadFailed
from runtime.puller.gguf_index import read_index, read_remote_index
from runtime.puller.gguf_metadata import read_gguf
from tests.support.smollm2 import gguf_path


def text(content: str) -> bytes:
    return struct.pack("<Q", len(content)) + content.encode()


def file_of(*values: bytes, tensors: int = 0, count: int | None = None) -> bytes:
    return (
        b"GGUF"
        + struct.pack("<IQQ", 3, tensors, len(values) if count is None else count)
        + b"".join(values)
        + bytes(4096)
    )


@pytest.mark.parametrize(
    "content",
    [
        file_of(text("x") + struct.pack("<IIQ", 9, 0, 1 << 40)),  # numbers without end
        file_of(text("x") + struct.pack("<IIQ", 9, 8, 1 << 40)),  # texts without end
        file_of(text("x") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 10_000),
        file_of(text("x") + struct.pack("<I", 77)),
        file_of(struct.pack("<Q", 1 << 62) + b"abc"),
        file_of(count=1 << 60),
        file_of(tensors=1 << 60),
        file_of(text("t") + struct.pack("<IQQ", 2, 1 << 30, 1 << 30) + struct.pack("<IQ", 0, 0), tensors=1, count=0),
        file_of(text("t") + struct.pack("<I", 1 << 31), tensors=1, count=0),
        b"GGUF" + struct.pack("<I", 1),
        b"GGUF",
        b"",
    ],
)
def test_read_gguf_refuses_a_misleading_index(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(LoadFailed, match=r"^m\.gguf"):
        read_gguf(tmp_path / "m.gguf")


def small(path: Path) -> None:
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_array("tokenizer.ggml.tokens", [f"token-{number}" for number in range(50)])
    writer.add_array("tokenizer.ggml.scores", [float(number) for number in range(50)])
    writer.add_tensor("token_embd.weight", np.ones((50, 64), np.float32))
    writer.add_tensor("blk.0.attn_q.weight", np.ones((64, 64), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_read_index_names_the_sizes_of_a_truncated_file(tmp_path: Path) -> None:
    small(tmp_path / "whole.gguf")
    whole = (tmp_path / "whole.gguf").read_bytes()
    config, tensors = read_gguf(tmp_path / "whole.gguf")
    assert (config["num_hidden_layers"], len(tensors)) == (1, 2)
    rng = random.Random(0)
    for size in (*rng.sample(range(4, len(whole)), 60), len(whole) - 64):
        (tmp_path / "m.gguf").write_bytes(whole[:size])
        with pytest.raises(
            LoadFailed, match=rf"^m\.gguf is truncated or damaged: {size} bytes, its index describes \d+"
        ):
            read_index(tmp_path / "m.gguf")


def test_read_gguf_reads_or_refuses_flipped_bits(tmp_path: Path) -> None:
    small(tmp_path / "whole.gguf")
    whole = (tmp_path / "whole.gguf").read_bytes()
    rng = random.Random(1)
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[rng.randrange(4, 2500)] ^= 1 << rng.randrange(8)
        (tmp_path / "m.gguf").write_bytes(damaged)
        try:
            read_gguf(tmp_path / "m.gguf")
        except LoadFailed:
            refused += 1
    assert refused > 20


def test_read_index_describes_a_real_file() -> None:
    index = read_index(gguf_path())
    assert (index.architecture, index.number("llama.block_count")) == ("llama", 30)
    assert index.num_items["tokenizer.ggml.tokens"] == 49152
    assert len(index.tensors) == 272


def test_read_remote_index_reads_the_beginning_of_the_file_alone() -> None:
    """SmolLM2's index is 1.7 MiB of 98 MiB; a first read that is too short is repeated with more."""
    path, asked = gguf_path(), list[int]()

    def read(count: int) -> bytes:
        asked.append(count)
        with path.open("rb") as file:
            return file.read(count)

    size_bytes = path.stat().st_size
    assert read_remote_index("m.gguf", size_bytes, read) == read_index(path)
    assert max(asked) < size_bytes / 4


def test_read_remote_index_reads_on_while_the_index_is_longer(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    writer.add_array("tokenizer.ggml.tokens", ["token" * 10] * 100_000)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    content, asked = (tmp_path / "m.gguf").read_bytes(), list[int]()

    def read(count: int) -> bytes:
        asked.append(count)
        return content[:count]

    assert read_remote_index("m.gguf", len(content), read) == read_index(tmp_path / "m.gguf")
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"<html>" + bytes(100), "m.gguf is not a GGUF file"),
        (file_of(count=1 << 60), "truncated or damaged"),
        (b"GGUF", "truncated or damaged"),
    ],
)
def test_read_remote_index_refuses_what_is_no_index(content: bytes, cause: str) -> None:
    with pytest.raises(LoadFailed, match=cause):
        read_remote_index("m.gguf", len(content), lambda count: content[:count])
