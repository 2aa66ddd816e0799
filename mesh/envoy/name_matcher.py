"""Writes the matcher that routes gRPC calls for the names of the table by one look-up, before the list of routes is tried."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

Json = dict[str, Any]

_TYPE = "type.googleapis.com/envoy."
_ANY_BYTES = r"\C*"  # a dot would not match bytes that are not UTF-8, and the header would count as absent


def name_matcher(
    header: str,
    routes: Mapping[str, Json],
    others: Sequence[Json],
    *,
    absent: Sequence[str],
    present: Sequence[str],
    other_paths: Sequence[str],
) -> Json:
    """Return a matcher that takes the route of the name in `header`, and the first fitting one of `others` for calls that are not plain.

    Calls are plain if they have none of the headers `absent` and all of `present`, and their path begins with none of `other_paths`.
    """
    listed = {"action": _action("RouteList", {"routes": list(others)})}
    prefixes = "|".join(map(re.escape, other_paths))
    predicates = [
        *(_holds(name, _ANY_BYTES) for name in absent),
        *({"not_matcher": _holds(name, _ANY_BYTES)} for name in present),
        _holds(":path", f"(?:{prefixes}){_ANY_BYTES}"),
    ]
    tree = {
        "input": _value_of(header),
        "exact_match_map": {"map": {name: {"action": _action("Route", route)} for name, route in routes.items()}},
    }
    return {
        "matcher_list": {"matchers": [{"predicate": {"or_matcher": {"predicate": predicates}}, "on_match": listed}]},
        "on_no_match": {"matcher": {"matcher_tree": tree, "on_no_match": listed}},
    }


def _holds(header: str, regex: str) -> Json:
    """Return the predicate that a header is there and matches an expression as a whole."""
    value = {"safe_regex": {"google_re2": {}, "regex": regex}}
    return {"single_predicate": {"input": _value_of(header), "value_match": value}}


def _value_of(header: str) -> Json:
    kind = f"{_TYPE}type.matcher.v3.HttpRequestHeaderMatchInput"
    return {"name": header, "typed_config": {"@type": kind, "header_name": header}}


def _action(kind: str, content: Json) -> Json:
    return {"name": kind, "typed_config": {"@type": f"{_TYPE}config.route.v3.{kind}", **content}}
