"""The schema of a model's settings: accepted ranges, refusals by field name, and the surfaces derived from it."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.model_key import (
    CopySettings,
    DefaultSampling,
    InvalidModelKey,
    ModelKey,
    ModelSettings,
    Quantization,
    Storage,
    parse_model_key,
    read_model_key,
    registrable_fields,
)
from mesh.cli import settings_flags
from mesh.registry.registration import model_info
from runtime.models.model_key import parse_model

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    ("key", "field", "text"),
    [
        ({"quantise": "nf4"}, "quantise", "unknown field 'quantise'; known fields are"),
        ({"quantize": "int3"}, "quantize", "quantize is 'int3'; it must be one of none, int8, nf4, fp4"),
        ({"quantize": "int8", "double_quant": True}, "double_quant", "double_quant needs quantize nf4 or fp4"),
        ({"double_quant": True}, "double_quant", "quantize is none"),
        ({"dtype": "float8"}, "dtype", "dtype is 'float8'"),
        ({"max_model_len": 0}, "max_model_len", "max_model_len is 0; it must be an integer at least 1"),
        ({"max_model_len": 1.5}, "max_model_len", "it must be an integer"),
        ({"tensor_parallel": 0}, "tensor_parallel", "it must be an integer at least 1 and at most 64 or one of auto"),
        ({"tensor_parallel": "all"}, "tensor_parallel", "tensor_parallel is 'all'"),
        ({"tensor_parallel": 2, "adapter_of": "b"}, "tensor_parallel", "an adapter has that of its base, b"),
        ({"max_concurrency": -1}, "max_concurrency", "max_concurrency is -1"),
        ({"sampling": {"temperature": -1}}, "sampling.temperature", "at least 0 and at most 100"),
        ({"sampling": {"temperature": 1000}}, "sampling.temperature", "sampling.temperature is 1000"),
        ({"sampling": {"temprature": 1}}, "sampling.temprature", "unknown field 'sampling.temprature'"),
        ({"sampling": {"top_p": 0}}, "sampling.top_p", "it must be a number above 0 and at most 1"),
        ({"sampling": {"top_p": 1.01}}, "sampling.top_p", "sampling.top_p is 1.01"),
        ({"sampling": {"repetition_penalty": 0}}, "sampling.repetition_penalty", "above 0"),
        ({"sampling": 3}, "sampling", "sampling is 3"),
        ({"storage_params": {"secret": 1}}, "storage_params", "storage_params must be an object of strings"),
    ],
)
def test_model_key_refusal_names_field_and_range(key: dict[str, object], field: str, text: str) -> None:
    with pytest.raises(InvalidModelKey, match=re.escape(text)) as caught:
        parse_model_key(json.dumps(key))
    assert caught.value.field == field


@pytest.mark.parametrize("text", ["{", "[]", "3", '"nf4"'])
def test_model_key_that_is_not_an_object_is_refused(text: str) -> None:
    with pytest.raises(InvalidModelKey, match="JSON") as caught:
        parse_model_key(text)
    assert caught.value.field == ""


def test_model_key_ignores_modelmesh_fields_and_nulls() -> None:
    text = '{"model_type": {"name": "llm"}, "schema_path": "s", "disk_size_bytes": 5, "dtype": null, "bucket": "b"}'
    assert parse_model_key(text) == ModelKey(storage=Storage(bucket="b"))
    assert parse_model_key(" ") == ModelKey()


_settings = st.fixed_dictionaries(
    {},
    optional={
        "quantize": st.sampled_from(["nf4", "fp4"]),
        "dtype": st.sampled_from(["auto", "float16"]),
        "max_model_len": st.none() | st.integers(1, 1 << 40),
        "chat_template": st.text(),
        "sampling": st.fixed_dictionaries(
            {},
            optional={
                "temperature": st.floats(0, 100),
                "top_p": st.floats(0, 1, exclude_min=True),
                "top_k": st.integers(0, 1 << 30),
            },
        ),
        "version": st.text(),
        "storage_key": st.text(min_size=1),
        "storage_params": st.dictionaries(st.text(), st.text()),
    },
)


@given(_settings)
def test_registered_settings_reach_the_runtime_unchanged(settings: dict[str, Any]) -> None:
    info = model_info("smol", "/files", settings)
    source, loaded = parse_model(info.path, info.key)
    key = read_model_key(settings)
    expected = {name: getattr(key.settings, name) for name in ModelSettings.__struct_fields__} | {
        "display_name": "smol"
    }
    assert loaded == ModelSettings(**expected)
    assert (source.uri, source.storage_key, source.storage_params) == (
        "/files",
        key.storage.storage_key,
        key.storage.storage_params,
    )


def test_registration_with_default_settings_equals_one_without() -> None:
    defaults = {"quantize": "none", "double_quant": False, "dtype": "auto", "sampling": {}, "storage_params": {}}
    assert model_info("smol", "/files", defaults) == model_info("smol", "/files", {})
    assert model_info("smol", "/files", {"version": "2"}) != model_info("smol", "/files", {})


def test_model_key_settings_have_a_flag_and_a_documented_row() -> None:
    """A setting is added in the schema and where it takes effect: flags, checks and the table of the manual follow."""
    parser = argparse.ArgumentParser()
    settings_flags.add_flags(parser)
    help_text = parser.format_help()
    page = (ROOT / "docs" / "configuration.md").read_text()
    fields = registrable_fields()
    assert {field.name for field in fields} == (
        {*ModelSettings.__struct_fields__, *CopySettings.__struct_fields__, *Storage.__struct_fields__}
        - {"display_name", "bucket"}
    )
    for field in fields:
        assert f"  {settings_flags.flag_of(field)}" in help_text
        assert f"\n| `{field.name}" in page
        assert field.about


def test_flags_give_the_settings_of_a_registration(tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}")
    parser = argparse.ArgumentParser()
    settings_flags.add_flags(parser)
    arguments = ["--quantize", "nf4", "--double-quant", "--max-model-len", "100", "--chat-template", f"@{template}"]
    arguments += ["--min-copies", "2", "--pinned", "--priority", "-3", "--idle-timeout-s", "90"]
    arguments += ["--sampling", "temperature=0.5", "--sampling", "top_k=5", "--storage-param", "bucket=b=c"]
    found = read_model_key(settings_flags.given(parser.parse_args(arguments)))
    assert found == ModelKey(
        ModelSettings(
            quantize=Quantization.NF4,
            double_quant=True,
            max_model_len=100,
            chat_template="{{ messages }}",
            sampling=DefaultSampling(temperature=0.5, top_k=5),
        ),
        Storage(storage_params={"bucket": "b=c"}),
        CopySettings(min_copies=2, pinned=True, priority=-3, idle_timeout_s=90),
    )
    assert settings_flags.given(parser.parse_args([])) == {}


@pytest.mark.parametrize(("text", "value"), [("2", 2), ("auto", "auto"), ("-1", -1)])
def test_flag_takes_a_number_or_a_word(text: str, value: object) -> None:
    """The schema checks both, as it does for the other surfaces."""
    parser = argparse.ArgumentParser()
    settings_flags.add_flags(parser)
    assert settings_flags.given(parser.parse_args(["--tensor-parallel", text])) == {"tensor_parallel": value}
