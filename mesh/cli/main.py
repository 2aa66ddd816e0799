"""Parses the command line of `repertory` and runs a verb. An error is one line on stderr and exit status 1, or 2 for invalid input."""

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from common.config import add_flags, load
from common.errors import ConfigError
from common.model_state import CopyState
from common.version import package_version
from mesh.cli import cache, commands, new_key, serve, serve_envoy, serve_flags, settings_flags
from mesh.cli.chat_settings import PARAMETERS
from mesh.client.admin import DEFAULT_SERVER, AdminClient
from mesh.config.modelmesh_environment import translate
from mesh.config.schema import MeshConfig
from mesh.errors import InvalidRequest, MeshError

_SERVERS = ("serve", "serve-mesh", "serve-runtime")
_CLIENTS = (
    "register",
    "fit",
    "ps",
    "list",
    "ls",
    "pods",
    "run",
    "load",
    "stop",
    "unload",
    "show",
    "rm",
    "cache",
    "alias",
    "new-key",
)
VERBS = frozenset(_SERVERS + _CLIENTS)

Verb = Callable[[AdminClient, argparse.Namespace], int]


class AddVerb(Protocol):
    def __call__(self, name: str, do: Verb, text: str, *, aliases: Sequence[str] = ()) -> argparse.ArgumentParser: ...


_INTRO = """\
Many language models by name on one GPU.

  repertory serve                          start everything on this machine
  repertory register smol hf://HuggingFaceTB/SmolLM2-135M-Instruct
  repertory run smol "What is the capital of France?"
  repertory ps
"""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _verb_first(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["serve-runtime"]:
        # The runtime is a separate program that parses its own flags.
        os.execv(sys.executable, [sys.executable, "-m", "runtime", *arguments[1:]])
    args = _parse(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a character that the terminal cannot encode becomes `?`
    try:
        status = _run(args)
        sys.stdout.flush()  # buffered output may fail to be written, too
        return status
    except (MeshError, ConfigError) as error:
        print(f"repertory: {error.message}", file=sys.stderr)
        return 2 if isinstance(error, InvalidRequest | ConfigError) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _drop_output()
        return 141
    except OSError as error:
        print(f"repertory: {error}", file=sys.stderr)  # most likely, the disk that receives the output is full
        _drop_output()
        return 1


def _drop_output() -> None:
    """Discard buffered output, whose failure at the interpreter's exit would replace the exit status."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: stdout is not a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(args: argparse.Namespace) -> int:
    if args.verb == "serve":
        return serve.serve(args)
    if args.verb == "serve-mesh":
        from mesh.pod.process import run_pod  # the client verbs start faster without the server's imports

        modelmesh = translate(os.environ)
        environment = {**modelmesh.variables, **os.environ}
        config = load(MeshConfig, flags=vars(args), env=environment, file=args.config)
        if serve_envoy.starts_envoy(config):
            return serve_envoy.serve_mesh_with_envoy(config, warnings=modelmesh.warnings)
        return run_pod(config, warnings=modelmesh.warnings)
    verb: Verb = args.do
    return verb(AdminClient(args.server, args.api_key), args)


def _verb_first(arguments: Sequence[str]) -> list[str]:
    """Move the options that come before the verb behind it: `repertory --json ps` is `repertory ps --json`."""
    position = next((place for place, word in enumerate(arguments) if word in VERBS), 0)
    leading = arguments[:position]
    if not leading or not leading[0].startswith("-") or {"-h", "--help", "--version"} & set(leading):
        return list(arguments)
    return [arguments[position], *leading, *arguments[position + 1 :]]


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    if rest and (args.verb != "run" or any(word.startswith("-") for word in rest)):
        args.usage_error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        # argparse ends a list of words at the first option, but a prompt may also follow the options.
        args.prompt += rest
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="repertory", description=_INTRO, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"repertory {package_version()}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_serve(verbs)
    _add_client_verbs(verbs)
    return parser


def _add_serve(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "start mesh, runtime and engine on this machine and restart them if they fail"
    everything = verbs.add_parser(
        "serve", help=text, description=f"{text}. Stop it with Ctrl-C or SIGTERM; running requests get time to finish."
    )
    serve_flags.add_flags(everything)
    everything.set_defaults(usage_error=everything.error)
    mesh = verbs.add_parser("serve-mesh", help="start one pod's mesh in front of any ModelMesh serving runtime")
    mesh.add_argument("--config", type=Path, help="YAML file with any of the fields below")
    add_flags(mesh, MeshConfig)
    mesh.set_defaults(usage_error=mesh.error)
    runtime = verbs.add_parser(
        "serve-runtime",
        help="start the serving runtime without a mesh (flags: serve-runtime --help)",
        add_help=False,
    )
    runtime.set_defaults(usage_error=runtime.error)


def _add_client_verbs(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--server",
        default=os.environ.get("REPERTORY_SERVER", DEFAULT_SERVER),
        metavar="URL",
        help=f"HTTP address of the mesh (default {DEFAULT_SERVER}) [REPERTORY_SERVER]",
    )
    common.add_argument(
        "--api-key",
        default=os.environ.get("REPERTORY_API_KEY", ""),
        metavar="KEY",
        help="bearer key, if the mesh requires one [REPERTORY_API_KEY]",
    )
    common.add_argument("--json", action="store_true", help="print JSON")

    def verb(name: str, do: Verb, text: str, *, aliases: Sequence[str] = ()) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, parents=[common], help=text, description=text, aliases=list(aliases))
        sub.set_defaults(do=do, usage_error=sub.error)
        return sub

    _add_registering(verb)
    _add_listing(
        verb(
            "ps", commands.ps, "list the models that are loaded, are being loaded or failed to load; --all: every name"
        )
    )
    listing = verb("list", commands.ps, "list all registered models and their states", aliases=["ls"])
    _add_listing(listing)
    listing.set_defaults(all=True)
    verb("pods", commands.pods, "list the pods of the mesh with their memory and load")
    _add_run(verb)
    sub = verb("load", commands.load, "load a model now and wait")
    sub.add_argument("name")
    sub = verb("stop", commands.stop, "unload a model; its registration stays", aliases=["unload"])
    sub.add_argument("name")
    sub.add_argument("--now", action="store_true", help="end running requests instead of waiting for them")
    sub = verb("show", commands.show, "show the details of one model")
    sub.add_argument("name")
    _add_name_verbs(verb)
    sub = verb("new-key", new_key.new_key, "make an API key, and print the entry for the server's --api-keys-file")
    new_key.add_flags(sub)


def _add_registering(verb: AddVerb) -> None:
    sub = verb(
        "register",
        commands.register,
        "register a model under a name; registering the name again with another source replaces the model without downtime",
    )
    sub.add_argument("name", nargs="?")
    sub.add_argument(
        "uri",
        nargs="?",
        help="hf://ORG/MODEL[:REV], s3://, gs://, az://, https://, pvc://, or a path below the server's --model-roots",
    )
    sub.add_argument(
        "-f", "--file", metavar="FILE", help="register the models and aliases of a YAML file (see docs/registering.md)"
    )
    settings_flags.add_flags(sub)
    sub.add_argument("--type", help="ModelMesh model type (default llm)")
    sub.add_argument("--load", action="store_true", help="load the model now and wait")
    sub = verb(
        "fit",
        commands.fit,
        "estimate the memory that a model needs and the models that loading it would evict (exit status 1 if it does not fit)",
    )
    sub.add_argument("name", metavar="NAME|URI")
    settings_flags.add_flags(sub)


def _add_run(verb: AddVerb) -> None:
    sub = verb("run", commands.run, "send a prompt to a model; without a prompt, start a conversation")
    sub.add_argument("name")
    sub.add_argument(
        "prompt", nargs="*", help="prompt; by default it is read from a pipe, or a conversation starts in the terminal"
    )
    sub.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="largest number of tokens in the answer (default: what the context has room for)",
    )
    sub.add_argument(
        "--temperature", type=float, metavar="X", help="sampling temperature; 0 = greedy (default: the registration's)"
    )
    sub.add_argument("--seed", type=int, metavar="N", help="seed of the sampling, for a reproducible answer")
    sub.add_argument(
        "--sampling", action="append", metavar="NAME=NUMBER", help=f"sampling parameter ({', '.join(PARAMETERS)})"
    )
    sub.add_argument("--system", metavar="TEXT", help="system prompt")
    sub.add_argument("--verbose", action="store_true", help="show tokens and tokens per second after an answer")


def _add_name_verbs(verb: AddVerb) -> None:
    """Add the verbs that remove, move and inspect names and the files behind them."""
    sub = verb("rm", cache.remove, "remove a model's registration")
    sub.add_argument("name")
    sub.add_argument(
        "--files", action="store_true", help="also drop the pulled and packed files of its source from the cache"
    )
    sub = verb(
        "cache", cache.cache, "list the pulled and packed files on the disks of all pods, and which names need them"
    )
    sub.add_argument("--prune", action="store_true", help="drop the files that no registered name needs")
    sub = verb(
        "alias",
        commands.alias,
        "set a stable name that can be moved to another model without downtime (ModelMesh's vmodel)",
    )
    sub.add_argument("alias")
    sub.add_argument(
        "target", nargs="?", help="registered name; the alias points at the model that this name currently stands for"
    )
    sub.add_argument("--delete", action="store_true", help="remove the alias and keep the model")


def _add_listing(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("names", nargs="*", metavar="NAME", help="only these names; * and ? match any characters")
    sub.add_argument("-a", "--all", action="store_true", help="also names that are registered and not loaded")
    sub.add_argument(
        "--state",
        action="append",
        choices=(*(state.value for state in CopyState if state.value), "unloaded"),
        metavar="STATE",
        help="only this state, such as loaded, failed or unloaded; may be repeated",
    )
    sub.add_argument("--pod", metavar="ID", help="only models with a copy on this pod")
