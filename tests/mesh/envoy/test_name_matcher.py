"""The matcher of listed names, with a reading of its own of the parts of Envoy's matching API that it uses."""

import re
from collections.abc import Mapping
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from mesh.envoy.name_matcher import name_matcher

ROUTES = {"m": {"route": {"cluster": "grpc/m"}}, "a.b": {"route": {"cluster": "grpc/a.b"}}}
MATCHER = name_matcher(
    "model", ROUTES, [{"others": True}], absent=("odd", "odder"), present=("admitted",), other_paths=("/grpc.", "/own/")
)
HEADERS = st.dictionaries(
    st.sampled_from(["odd", "odder", "admitted", "else"]), st.sampled_from(["", "1", "x\xff"]), max_size=4
)
MODELS = st.sampled_from(["m", "a.b", "axb", "mm", "", "m,a.b"])
PATHS = st.sampled_from(["/grpc.health/Check", "/grpcx/Call", "/own/Call", "/its.own/Call", "/own"])


def holds(predicate: Mapping[str, Any], headers: Mapping[str, str]) -> bool:
    match predicate:
        case {"or_matcher": {"predicate": parts}}:
            return any(holds(part, headers) for part in parts)
        case {"not_matcher": part}:
            return not holds(part, headers)
        case {"single_predicate": {"input": wanted, "value_match": {"safe_regex": {"regex": regex}}}}:
            value = headers.get(wanted["typed_config"]["header_name"])
            return value is not None and re.fullmatch(regex.replace(r"\C", r"[\s\S]"), value) is not None
    raise AssertionError(predicate)


def chosen(matcher: Mapping[str, Any], headers: Mapping[str, str]) -> dict[str, Any]:
    """Return the configuration of the action that the matcher takes."""
    if "matcher_tree" in matcher:
        tree = matcher["matcher_tree"]
        found = tree["exact_match_map"]["map"].get(headers.get(tree["input"]["typed_config"]["header_name"]))
    else:
        rules = matcher["matcher_list"]["matchers"]
        found = next((rule["on_match"] for rule in rules if holds(rule["predicate"], headers)), None)
    found = found or matcher["on_no_match"]
    return chosen(found["matcher"], headers) if "matcher" in found else found["action"]["typed_config"]


@given(HEADERS, MODELS, PATHS)
def test_name_matcher_looks_up_only_plain_calls(headers: dict[str, str], model: str, path: str) -> None:
    is_plain = "odd" not in headers and "odder" not in headers and "admitted" in headers
    is_own = path.startswith(("/grpc.", "/own/"))
    action = chosen(MATCHER, {**headers, "model": model, ":path": path})
    if is_plain and not is_own and model in ROUTES:
        assert action["@type"].endswith(".Route")
        assert action["route"] == ROUTES[model]["route"]
    else:
        assert action["@type"].endswith(".RouteList")
        assert action["routes"] == [{"others": True}]


@given(HEADERS, PATHS)
def test_name_matcher_leaves_calls_without_a_name_to_the_other_routes(headers: dict[str, str], path: str) -> None:
    assert chosen(MATCHER, {**headers, ":path": path})["routes"] == [{"others": True}]
