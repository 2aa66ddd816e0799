"""The Lua that Envoy runs: what is left to the mesh, and how values are written."""

from hypothesis import given
from hypothesis import strategies as st

from mesh.access.api_keys import ApiKey
from mesh.access.scopes import Scope
from mesh.envoy.lua import admit_script, is_recognisable, quoted

INFERENCE = frozenset({Scope.INFERENCE})


def test_is_recognisable_leaves_limits_and_rights_to_the_mesh() -> None:
    digests = frozenset({"0" * 64})
    assert is_recognisable(ApiKey("k", digests, INFERENCE, ("org/*", "smol")))
    assert not is_recognisable(ApiKey("k", digests, frozenset({Scope.MANAGEMENT})))
    assert not is_recognisable(ApiKey("k", digests, INFERENCE, requests_per_minute=1))
    assert not is_recognisable(ApiKey("k", digests, INFERENCE, max_concurrent=1))
    assert not is_recognisable(ApiKey("k", digests, INFERENCE, ("a?",)))
    assert not is_recognisable(ApiKey("k", digests, INFERENCE, ("[ab]",)))


@given(st.text())
def test_quoted_text_cannot_end_its_string(text: str) -> None:
    inner = quoted(text)[1:-1]
    rest = inner.encode()
    read = bytearray()
    while rest:
        is_escape = rest[:1] == b"\\"
        read += bytes([int(rest[1:4])]) if is_escape else rest[:1]
        rest = rest[4:] if is_escape else rest[1:]
    assert read.decode() == text
    assert '"' not in inner


def test_admit_script_holds_hashes_and_no_key_that_the_mesh_must_judge() -> None:
    kept = ApiKey("kept", frozenset({"a" * 64, "b" * 64}), INFERENCE, ("org/*",))
    judged = ApiKey("judged", frozenset({"c" * 64}), INFERENCE, max_concurrent=4)
    script = admit_script("mm-model-id", [kept, judged])
    assert "a" * 64 in script
    assert "b" * 64 in script
    assert "c" * 64 not in script
