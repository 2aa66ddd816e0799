"""Reading and writing a string inside an encoded message: against protobuf itself."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.api.protobuf_field import extract, inject
from wire.fmaas import generation_pb2 as fmaas
from wire.mmesh import model_mesh_pb2 as mm

TEXT = st.text(min_size=1, max_size=300)


@given(TEXT, st.lists(TEXT, max_size=3), st.integers(0, 2**31))
def test_inject_top_level_field(name: str, texts: list[str], tokens: int) -> None:
    message = fmaas.BatchedGenerationRequest(
        model_id=name, requests=[fmaas.GenerationRequest(text=text) for text in texts]
    )
    message.params.stopping.max_new_tokens = tokens
    data = message.SerializeToString()
    assert extract(data, (1,)) == name
    written = fmaas.BatchedGenerationRequest.FromString(inject(data, (1,), "other"))
    message.model_id = "other"
    assert written == message


@given(TEXT, TEXT, st.booleans())
def test_inject_nested_field_present_or_absent(path: str, key: str, present: bool) -> None:
    message = mm.RegisterModelRequest(modelId="m", loadNow=True)
    if present:
        message.modelInfo.key = key
        message.modelInfo.path = "before"
    data = message.SerializeToString()
    assert extract(data, (2, 2)) == ("before" if present else None)
    written = mm.RegisterModelRequest.FromString(inject(data, (2, 2), path))
    message.modelInfo.path = path
    assert written == message


def test_inject_writes_into_all_merged_occurrences() -> None:
    one = mm.RegisterModelRequest(modelInfo=mm.ModelInfo(path="a")).SerializeToString()
    two = mm.RegisterModelRequest(modelInfo=mm.ModelInfo(path="b")).SerializeToString()
    assert mm.RegisterModelRequest.FromString(inject(one + two, (2, 2), "x")).modelInfo.path == "x"


@given(st.binary(max_size=60))
def test_extract_malformed_bytes_are_an_error_or_absent(data: bytes) -> None:
    try:
        found = extract(data, (1, 2))
    except ValueError:
        return
    assert found is None or found


def test_extract_truncated_message() -> None:
    data = fmaas.ModelInfoRequest(model_id="abcdef").SerializeToString()
    with pytest.raises(ValueError, match="truncated"):
        extract(data[:-1], (1,))
