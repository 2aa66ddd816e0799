"""Writes the Lua that Envoy runs: the scripts of this folder, each below the values that it needs."""

from collections.abc import Iterable
from importlib.resources import files
from urllib.parse import quote

from mesh.access.api_keys import ApiKey
from mesh.access.scopes import Scope

_MAGIC = frozenset("^$()%.[]*+-?")


def choose_script(header: str, prefix: str, mesh: str, *, limit: int) -> str:
    """Return the script that chooses a call's cluster, whose name is a prefix, a slash and what the header `header` holds.

    `limit`: the calls that a copy may have at once, 0 for any number.
    """
    values = (quoted(header), quoted(prefix), quoted(mesh), str(limit))
    return f"local HEADER, PREFIX, MESH, LIMIT = {', '.join(values)}\n{_script('choose')}"


def admit_script(header: str, keys: Iterable[ApiKey]) -> str:
    """Return the script that recognises callers. Keys that only the mesh can check are left out, so their calls go to the mesh."""
    entries = [
        f"  [{quoted(digest)}] = {{ name = {quoted(quote(key.name))}, models = {{ {', '.join(map(quoted, map(_pattern, key.models)))} }} }},"
        for key in keys
        if is_recognisable(key)
        for digest in sorted(key.digests)
    ]
    return "\n".join([f"local HEADER = {quoted(header)}", "local KEYS = {", *entries, "}", _script("admit")])


def admit_peers_script(digests: Iterable[str]) -> str:
    """Return the script that recognises other pods by the hashes of their shared secret."""
    entries = [f"  [{quoted(digest)}] = true," for digest in sorted(digests)]
    return "\n".join(['local HEADER = ""', "local KEYS = {", *entries, "}", _script("admit")])


def is_recognisable(key: ApiKey) -> bool:
    """Whether Envoy can decide a key's calls by itself: no rate to count, and patterns of which only `*` is special."""
    has_limits = key.requests_per_minute or key.max_concurrent
    return Scope.INFERENCE in key.scopes and not has_limits and not any(set(model) & set("?[") for model in key.models)


def quoted(text: str) -> str:
    """Return a Lua string in which every byte that is not an ASCII letter or digit is escaped."""
    return '"' + "".join(chr(b) if chr(b).isalnum() and b < 128 else f"\\{b:03d}" for b in text.encode()) + '"'


def _pattern(model: str) -> str:
    """Return the Lua pattern of a pattern in which `*` stands for any text."""
    return "^" + "".join(".*" if sign == "*" else f"%{sign}" if sign in _MAGIC else sign for sign in model) + "$"


def _script(name: str) -> str:
    return files("mesh.envoy").joinpath(f"{name}.lua").read_text(encoding="utf-8")
