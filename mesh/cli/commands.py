"""What each verb of the command line does with a running mesh. Parsing is mesh.cli.main's, looks are render's."""

import argparse
import sys
import time
from pathlib import Path

import msgspec

from mesh.cli import chat, render, settings_flags
from mesh.client.admin import AdminClient, Model
from mesh.errors import InvalidRequest, LoadFailed

_ENDED = ("loaded", "failed", "quarantined")
_NO_LOAD_S = 10.0  # a load that was asked for and isn't under way after this long was given up, or never begun


def register(client: AdminClient, args: argparse.Namespace) -> int:
    settings = settings_flags.given(args)
    in_storage = ("storage_key" in settings or "storage_params" in settings) and not args.uri.startswith(".")
    request: dict[str, object] = {
        "name": args.name,
        "uri": args.uri if in_storage else _absolute(args.uri),
        **({"type": args.type} if args.type else {}),
        **settings,
    }
    model = client.register(request)
    if args.load:
        model = _wait_loaded(client, args.name, quiet=args.json)
    _print_model(model, args.json, f"{model.name} is {'loaded' if args.load else 'registered'}")
    return 0


def fit(client: AdminClient, args: argparse.Namespace) -> int:
    settings = settings_flags.given(args)
    is_uri = "://" in args.name or args.name.startswith(("/", "./", "../"))
    # reading a checkpoint's metadata from afar, or finding out whether it can be run, may take seconds
    with render.waiting(f"looking at {args.name}", enabled=not args.json):
        answer = client.fit({"uri": _absolute(args.name), **settings} if is_uri else {"name": args.name, **settings})
    if args.json:
        _print_json(answer)
    else:
        render.show_fit(render.console(), args.name, answer)
    return 0 if answer.fits else 1


def ps(client: AdminClient, args: argparse.Namespace) -> int:
    models = client.models()
    if args.json:
        _print_json(models)
    elif not models:
        print("no models are registered; add one with `repertory register NAME URI`")
    else:
        render.console().print(render.model_table(models, time.time()))
    return 0


def run(client: AdminClient, args: argparse.Namespace) -> int:
    prompt = " ".join(args.prompt)
    if not prompt and not sys.stdin.isatty():
        prompt = sys.stdin.read()
        if not prompt.strip():
            raise InvalidRequest(f"run {args.name}: no prompt was given, and there is no terminal to talk at")
    options = chat.Options(max_tokens=args.max_tokens, temperature=args.temperature, system=args.system, seed=args.seed)
    if args.json:
        if not prompt:
            raise InvalidRequest(f"run {args.name}: --json needs a prompt")
        return chat.answer_as_json(client, args.name, prompt, options)
    if prompt:
        return chat.answer(client, args.name, prompt, options)
    return chat.converse(client, args.name, options)


def load(client: AdminClient, args: argparse.Namespace) -> int:
    _print_model(_wait_loaded(client, args.name, quiet=args.json), args.json, f"{args.name} is loaded")
    return 0


def stop(client: AdminClient, args: argparse.Namespace) -> int:
    client.unload(args.name)
    _print_model(client.model(args.name), args.json, f"{args.name} is unloaded; its registration stays")
    return 0


def show(client: AdminClient, args: argparse.Namespace) -> int:
    model = client.model(args.name)
    if args.json:
        _print_json(model)
    else:
        render.show_model(render.console(), model)
    return 0


def remove(client: AdminClient, args: argparse.Namespace) -> int:
    client.remove(args.name)
    if not args.json:
        print(f"{args.name} is removed")
    return 0


def alias(client: AdminClient, args: argparse.Namespace) -> int:
    if args.delete:
        client.remove_alias(args.alias)
        if not args.json:
            print(f"alias {args.alias} is removed")
        return 0
    if not args.target:
        raise InvalidRequest(f"alias {args.alias}: name the model it points at, or give --delete")
    client.set_alias(args.alias, args.target)
    if args.json:
        _print_json({"alias": args.alias, "target": args.target})
    else:
        print(f"{args.alias} → {args.target}")
    return 0


def _wait_loaded(client: AdminClient, name: str, *, quiet: bool) -> Model:
    """Ask for a load and watch it to its end. Raises LoadFailed with the cause."""
    client.load(name)
    try:
        model = _watch_load(client, name, quiet=quiet)
    except KeyboardInterrupt:
        print(f"{name}: the load goes on; `repertory stop {name}` ends it", file=sys.stderr)
        raise
    if model.state != "loaded" or model.moving_to:
        raise LoadFailed(f"{name}: {model.error or model.state}")
    return model


def _watch_load(client: AdminClient, name: str, *, quiet: bool) -> Model:
    """The model as it is when its load has ended. Raises LoadFailed if none is under way."""
    under_way_s = time.monotonic()
    with render.LoadBar(name, enabled=not quiet) as bar:
        while True:
            model = client.model(name)
            if model.state in _ENDED and (not model.moving_to or model.error):
                return model
            if model.state:
                under_way_s = time.monotonic()
            elif time.monotonic() - under_way_s > _NO_LOAD_S:
                raise LoadFailed(
                    f"{name}: it is not being loaded; there may be no room for it beside models in use (the server's log says more)"
                )
            bar.update(model.state or "queued", model.progress, model.progress_text)
            time.sleep(0.2)


def _print_model(model: Model, as_json: bool, sentence: str) -> None:
    if as_json:
        _print_json(model)
    else:
        print(sentence)


def _print_json(value: object) -> None:
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def _absolute(uri: str) -> str:
    """A path from here is no path to the server, which runs elsewhere. Raises InvalidRequest for one that leads nowhere from here."""
    if "://" in uri or uri.startswith("/"):
        return uri
    if not Path(uri).exists():
        hint = (
            f"; a model of the Hugging Face hub is written hf://{uri}"
            if uri.count("/") == 1 and not uri.startswith(".")
            else ""
        )
        raise InvalidRequest(f"{uri}: no such file or directory{hint}")
    return str(Path(uri).absolute())
