"""Implements the verbs of the command line that call a running mesh."""

import argparse
import sys
import time
from fnmatch import fnmatchcase
from pathlib import Path

import msgspec

from common.model_fit import ModelFit
from mesh.cli import chat, registering, render, settings_flags
from mesh.cli.chat_settings import ChatSettings, number
from mesh.client.admin import AdminClient, Model
from mesh.errors import InvalidRequest, LoadFailed, MeshError, NotFound

_FINAL_STATES = ("loaded", "failed", "quarantined")
_FACTS_TIMEOUT_S = 0.5  # a runtime of another make reports none
_LOAD_START_TIMEOUT_S = 10.0  # a requested load that is not in progress after this time has been abandoned


def register(client: AdminClient, args: argparse.Namespace) -> int:
    if args.file:
        return registering.register_file(client, args)
    if not args.name or not args.uri:
        raise InvalidRequest("register: give a name and a URI, or --file FILE")
    settings = settings_flags.given(args)
    in_storage = ("storage_key" in settings or "storage_params" in settings) and not args.uri.startswith(".")
    request: dict[str, object] = {
        "name": args.name,
        "uri": args.uri if in_storage else _absolute(args.uri),
        **({"type": args.type} if args.type else {}),
        **settings,
    }
    if not args.json:
        registering.print_size(client, request)
    model, change = registering.register_one(client, request)
    if args.load:
        model = _wait_loaded(client, args.name, quiet=args.json)
    _print_model(model, args.json, f"{model.name} is {f'loaded{_cut_of(model)}' if args.load else change}")
    return 0


def fit(client: AdminClient, args: argparse.Namespace) -> int:
    settings = settings_flags.given(args)
    # Reading remote metadata and checking whether the architecture is supported may take seconds.
    with render.waiting(f"inspecting {args.name}", enabled=not args.json):
        answer = _fit(client, args.name, settings)
    if args.json:
        _print_json(answer)
    else:
        render.show_fit(render.console(), args.name, answer)
    return 0 if answer.fits else 1


def _fit(client: AdminClient, name_or_uri: str, settings: dict[str, object]) -> ModelFit:
    """Inspect a source, or a registered name, which comes before a file of the same name in the current directory."""
    if "://" in name_or_uri or name_or_uri.startswith(("/", "./", "../")):
        return client.fit({"uri": _absolute(name_or_uri), **settings})
    try:
        return client.fit({"name": name_or_uri, **settings})
    except MeshError as error:
        if error.http_status != NotFound.http_status or not Path(name_or_uri).exists():
            raise
    return client.fit({"uri": _absolute(name_or_uri), **settings})


def ps(client: AdminClient, args: argparse.Namespace) -> int:
    """List the models that a pod holds or loads, or failed to load; with --all every registered name."""
    everything = client.models()
    models = [model for model in everything if args.all or _is_active(model)]
    models = [model for model in models if _matches(model, args)]
    if args.json:
        _print_json(models)
        return 0
    if models:
        console = render.console()
        render.print_columns(console, render.model_columns(models, time.time()))
    elif not everything:
        print("no models are registered; add one with `repertory register NAME URI`")
    elif args.all or args.names or args.state or args.pod:
        print("no model matches")
    else:
        print("no model is loaded")
    hidden = sum(not _is_active(model) for model in everything)
    if hidden and not args.all:
        names = "name is" if hidden == 1 else "names are"
        print(f"{hidden} more registered {names} not loaded; `repertory list` shows all", file=sys.stderr)
    return 0


def pods(client: AdminClient, args: argparse.Namespace) -> int:
    found = client.pods()
    if args.json:
        _print_json(found)
    else:
        render.print_columns(render.console(), render.pod_columns(found, time.time()))
    return 0


def run(client: AdminClient, args: argparse.Namespace) -> int:
    prompt = " ".join(args.prompt)
    if not prompt and not sys.stdin.isatty():
        prompt = sys.stdin.read()
        if not prompt.strip():
            raise InvalidRequest(
                f"run {args.name}: the prompt is empty; pass it as an argument or through a pipe, or run the command in a terminal"
            )
    settings = ChatSettings(args.system or "", _parameters(args), args.verbose)
    if args.json:
        if not prompt:
            raise InvalidRequest(f"run {args.name}: --json needs a prompt")
        return chat.answer_as_json(client, args.name, prompt, settings)
    if prompt:
        return chat.answer(client, args.name, prompt, settings)
    return chat.converse(client, args.name, settings)


def _parameters(args: argparse.Namespace) -> dict[str, float]:
    """Return the sampling parameters on the command line. Raises InvalidRequest."""
    pairs = settings_flags.pairs(args.sampling or [])
    given = {name: number(name, text) for name, text in pairs.items()}
    named = {name: getattr(args, name) for name in ("max_tokens", "temperature", "seed")}
    return given | {name: value for name, value in named.items() if value is not None}


def load(client: AdminClient, args: argparse.Namespace) -> int:
    model = _wait_loaded(client, args.name, quiet=args.json)
    _print_model(model, args.json, f"{args.name} is loaded{_cut_of(model)}")
    return 0


def stop(client: AdminClient, args: argparse.Namespace) -> int:
    if not args.now:
        _say_what_runs(client.model(args.name))
    try:
        client.unload(args.name, now=args.now)
    except KeyboardInterrupt:
        print(f"{args.name}: unloading continues on the server", file=sys.stderr)
        raise
    _print_model(client.model(args.name), args.json, f"{args.name} is unloaded; its registration stays")
    return 0


def show(client: AdminClient, args: argparse.Namespace) -> int:
    model = client.model(args.name)
    if args.json:
        _print_json(model)
    else:
        render.show_model(render.console(), model)
    return 0


def alias(client: AdminClient, args: argparse.Namespace) -> int:
    if args.delete:
        client.remove_alias(args.alias)
        if not args.json:
            print(f"alias {args.alias} is removed")
        return 0
    if not args.target:
        raise InvalidRequest(f"alias {args.alias}: give the name of a model as the target, or --delete")
    client.set_alias(args.alias, args.target)
    if args.json:
        _print_json({"alias": args.alias, "target": args.target})
    else:
        print(f"{args.alias} → {args.target}")
    return 0


def _is_active(model: Model) -> bool:
    """Return whether a pod holds, loads or failed to load the model, or its name is moving to another one."""
    return bool(model.copies or model.moving_to)


def _matches(model: Model, args: argparse.Namespace) -> bool:
    names = (model.name, *model.aliases)
    if args.names and not any(fnmatchcase(name, pattern) for name in names for pattern in args.names):
        return False
    if args.state and (model.state or "unloaded") not in args.state:
        return False
    return not args.pod or any(copy.instance_id == args.pod for copy in model.copies)


def _say_what_runs(model: Model) -> None:
    count = model.running + model.waiting
    if count:
        requests = "request" if count == 1 else "requests"
        print(
            f"{model.name}: waiting for {count} running {requests} to finish, at most for the server's grace period (--grace); "
            f"`repertory stop --now {model.name}` ends them at once",
            file=sys.stderr,
        )


def _wait_loaded(client: AdminClient, name: str, *, quiet: bool) -> Model:
    """Request a load and wait until it ends. Raises LoadFailed with the cause."""
    client.load(name)
    try:
        model = _watch_load(client, name, quiet=quiet)
    except KeyboardInterrupt:
        print(f"{name}: loading continues on the server; `repertory stop {name}` cancels it", file=sys.stderr)
        raise
    if model.state != "loaded" or model.moving_to:
        raise LoadFailed(f"{name}: {model.error or model.state}")
    return _with_facts(client, model)


def _with_facts(client: AdminClient, model: Model) -> Model:
    """Return the model with what its runtime reports of it, which the server may learn a moment after the end of the load."""
    give_up_s = time.monotonic() + _FACTS_TIMEOUT_S
    while not any(copy.max_model_len for copy in model.copies) and time.monotonic() < give_up_s:
        time.sleep(0.05)
        model = client.model(model.name)
    return model


def _watch_load(client: AdminClient, name: str, *, quiet: bool) -> Model:
    """Return the model once its load has ended. Raises LoadFailed if no load is in progress."""
    in_progress_s = time.monotonic()
    with render.LoadBar(name, enabled=not quiet) as bar:
        while True:
            model = client.model(name)
            if model.state in _FINAL_STATES and (not model.moving_to or model.error):
                return model
            if model.state:
                in_progress_s = time.monotonic()
            elif time.monotonic() - in_progress_s > _LOAD_START_TIMEOUT_S:
                raise LoadFailed(
                    f"{name}: the model is not being loaded; the models in use may leave too little memory for it. See the server's log"
                )
            bar.update(model.state or "queued", model.progress, model.progress_text)
            time.sleep(0.2)


def _cut_of(model: Model) -> str:
    """Return the note on a context that was cut to what memory holds; empty if it was not."""
    cut = next((copy for copy in model.copies if copy.wanted_model_len > copy.max_model_len > 0), None)
    return "" if cut is None else f", with a context of {render.context_of(cut.max_model_len, cut.wanted_model_len)}"


def _print_model(model: Model, as_json: bool, sentence: str) -> None:
    if as_json:
        _print_json(model)
    else:
        print(sentence)


def _print_json(value: object) -> None:
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def _absolute(uri: str) -> str:
    """Make a relative path absolute, because the server runs in another directory. Raises InvalidRequest if it does not exist."""
    if "://" in uri or uri.startswith("/"):
        return uri
    if not Path(uri).exists():
        hint = (
            f"; for a model on the Hugging Face hub, write hf://{uri}"
            if uri.count("/") == 1 and not uri.startswith(".")
            else ""
        )
        raise InvalidRequest(f"{uri}: no such file or directory{hint}")
    return str(Path(uri).absolute())
