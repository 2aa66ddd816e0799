"""ModelMesh's storage configuration: a directory with one JSON file a key, mounted from a secret. Reads it and lays a request's parameters over it.

What it returns may hold secrets: it is used and forgotten, never logged, stored or sent.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from runtime.errors import InvalidRequest, LoadFailed


def storage_options(config_dir: str, storage_key: str | None, params: Mapping[str, str]) -> dict[str, str]:
    """The named configuration with `params` over it. Without a key: `default_<type>` or `default`, if there is one.

    Raises InvalidRequest for a key that is no name, LoadFailed for one that has no configuration.
    """
    options: dict[str, str] = {}
    if storage_key is not None:
        if not storage_key or "/" in storage_key or storage_key.startswith("."):
            raise InvalidRequest(f"storage_key {storage_key!r} is not a name", param="storage_key")
        if not config_dir:
            raise LoadFailed(f"storage key {storage_key!r} is given, and the runtime has no storage_config_dir")
        path = Path(config_dir) / storage_key
        if not path.is_file():
            raise LoadFailed(f"Did not find storage config for key {storage_key}")
        options = _read(path)
    elif config_dir:
        for name in (f"default_{params['type']}" if params.get("type") else "default", "default"):
            if (Path(config_dir) / name).is_file():
                options = _read(Path(config_dir) / name)
                break
    return {**options, **params}


def _read(path: Path) -> dict[str, str]:
    try:
        values = json.loads(path.read_text())
        return {str(name): value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    except (OSError, ValueError, AttributeError):
        # the cause may quote the content, which is secret
        raise LoadFailed(f"storage config {path.name!r} is not a readable JSON object") from None
