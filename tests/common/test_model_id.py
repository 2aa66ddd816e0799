"""The naming rule: what ModelMesh registers passes, what breaks log lines, headers or messages does not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.http_path import is_ambiguous
from common.model_id import MAX_ID_LENGTH, InvalidModelId, check_model_id, shown_id


@pytest.mark.parametrize(
    "model_id",
    [
        "r/4 %20:é",
        "org/model",
        "a.b",
        "example__isvc-6b2f8b1d0e",
        "模型",
        "***GETSTATE***",
        "m,n",
        "..",
        "a" * MAX_ID_LENGTH,
    ],
)
def test_check_model_id_accepts_modelmeshs_ids(model_id: str) -> None:
    check_model_id(model_id)


@pytest.mark.parametrize("bad", ["\r", "\n", "\0", "\x1b[2J", "\x7f", "\x9b", "\u2028", "\u202e", "\ufeff"])
def test_check_model_id_refuses_control_characters_and_shows_them_escaped(bad: str) -> None:
    with pytest.raises(InvalidModelId) as refused:
        check_model_id(f"a{bad}b", "vmodel id")
    assert str(refused.value).startswith("vmodel id 'a")
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("model_id", ["", "a" * (MAX_ID_LENGTH + 1), "a" * 5000])
def test_check_model_id_refuses_empty_and_long_ids_briefly(model_id: str) -> None:
    with pytest.raises(InvalidModelId) as refused:
        check_model_id(model_id)
    assert len(str(refused.value)) < 200


@given(st.text(max_size=600))
def test_check_model_id_accepts_exactly_printable_ids_within_the_limit(model_id: str) -> None:
    assert shown_id(model_id).isprintable()
    if 0 < len(model_id) <= MAX_ID_LENGTH and model_id.isprintable():
        check_model_id(model_id)
        return
    with pytest.raises(InvalidModelId) as refused:
        check_model_id(model_id)
    assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    "path", ["/v1/../admin", "/v1/%2e%2E/admin", "/v1/.", "/v1/a\\b", "/v1/a%5cb", "/v1/%0d%0aX", "/v1/%00", "/..?q"]
)
def test_is_ambiguous_recognises_encoded_segments(path: str) -> None:
    assert is_ambiguous(path)


@pytest.mark.parametrize(
    "path", ["/v1/models/a..b", "/v1/models/org%2Fm.1", "/v1/x?path=../y", "/", "/v1/models/r%204:%C3%A9"]
)
def test_is_ambiguous_accepts_plain_paths(path: str) -> None:
    assert not is_ambiguous(path)
