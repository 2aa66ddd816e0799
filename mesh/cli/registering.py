"""Implements `repertory register`: one model or a whole file, with what changed and what the model takes."""

import argparse
import sys

from common.model_fit import unpacking_text
from common.units import size
from mesh.cli.render import waiting
from mesh.client.admin import AdminClient, Model
from mesh.errors import MeshError
from mesh.registry.models_file import read_models_file

_NOT_FOUND = 404
_LOAD_FAILED = 424


def register_one(client: AdminClient, request: dict[str, object]) -> tuple[Model, str]:
    """Register a model. Return it and what changed, such as `registered (new)`."""
    before = _find(client, str(request["name"]))
    after = client.register(request)
    if before is None:
        return after, "registered (new)"
    if after.moving_to:
        return after, f"replaced: {before.uri} answers until {after.moving_to} is loaded"
    if after.model_id != before.model_id:
        return after, f"replaced (it was {before.uri})"
    return after, "registered already, with the same files and settings"


def register_file(client: AdminClient, args: argparse.Namespace) -> int:
    """Register everything that a models file declares. The whole file is checked first.

    Raises ConfigError for the file, and the error of the first registration that fails.
    """
    declared = read_models_file(args.file)
    for model in declared.models:
        request = {"name": model.name, "uri": model.uri, "type": model.type, **model.settings}
        registered, change = register_one(client, request)
        if registered.fit is not None and (unpacking := unpacking_text(model.name, registered.fit, _flag)):
            print(unpacking, file=sys.stderr)
        if model.load or args.load:
            client.load(model.name)
            change += "; its load has begun"
        if not args.json:
            print(f"{model.name} is {change}", flush=True)
    for alias, target in declared.aliases.items():
        client.set_alias(alias, target)
        if not args.json:
            print(f"{alias} → {target}", flush=True)
    return 0


def print_size(client: AdminClient, request: dict[str, object]) -> None:
    """Print to stderr what the weights of a model to be registered will take, and a warning if it cannot be loaded.

    Prints nothing if that is not known.
    """
    name = str(request["name"])
    try:
        with waiting(f"inspecting the files of {name}", enabled=True):
            fit = client.fit({**{key: value for key, value in request.items() if key != "name"}, "sizes_only": True})
    except MeshError as error:
        if error.http_status == _LOAD_FAILED:
            print(f"warning: {name} cannot be loaded: {error.message}", file=sys.stderr)
        return
    if unpacking := unpacking_text(name, fit, _flag):
        print(unpacking, file=sys.stderr)
    if not fit.fits:
        print(f"warning: {name} cannot be loaded here: {fit.reason}", file=sys.stderr)
    elif fit.weight_bytes:
        kv = f", {size(fit.kv_bytes_per_token)} of KV per token" if fit.kv_bytes_per_token else ""
        quantization = f" as {fit.quantization}" if fit.quantization not in ("", "none") else ""
        print(
            f"{name}: {size(fit.weight_bytes)} of weights{quantization}{kv}; budget {size(fit.capacity_bytes)}",
            file=sys.stderr,
        )


def _flag(setting: str, value: str) -> str:
    return f"--{setting.replace('_', '-')} {value}"


def _find(client: AdminClient, name: str) -> Model | None:
    try:
        return client.model(name)
    except MeshError as error:
        if error.http_status != _NOT_FOUND:
            raise
        return None
