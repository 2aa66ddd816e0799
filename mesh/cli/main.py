"""`repertory`: parses the command line and hands each verb to its doer. Errors end as one line on stderr, status 1 (2 for usage)."""

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from common.config import add_flags, load
from common.errors import ConfigError
from common.version import package_version
from mesh.cli import commands, serve, serve_flags, settings_flags
from mesh.client.admin import DEFAULT_SERVER, AdminClient
from mesh.config import MeshConfig
from mesh.errors import InvalidRequest, MeshError

Verb = Callable[[AdminClient, argparse.Namespace], int]

_INTRO = """\
Many language models by name on one GPU.

  repertory serve                                    start everything on this machine
  repertory register smol hf://HuggingFaceTB/SmolLM2-135M-Instruct --quantize nf4
  repertory run smol "What is a repertory company?"
  repertory ps
"""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["serve-runtime"]:
        # The runtime is a program of its own, with flags of its own: the mesh doesn't know them.
        os.execv(sys.executable, [sys.executable, "-m", "runtime", *arguments[1:]])
    args = _parse(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that can't show a character gets a `?`, and the rest
    try:
        status = _run(args)
        sys.stdout.flush()  # what is still to be written may fail too
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
        print(f"repertory: {error}", file=sys.stderr)  # the output's disk is full, most likely
        _drop_output()
        return 1


def _drop_output() -> None:
    """What is left of it would fail once more at the interpreter's end, and take the exit status with it."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: it is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(args: argparse.Namespace) -> int:
    if args.verb == "serve":
        return serve.serve(args)
    if args.verb == "serve-mesh":
        from mesh.pod import run_pod  # the client verbs start faster without the server's imports

        return run_pod(load(MeshConfig, flags=vars(args), env=os.environ, file=args.config))
    verb: Verb = args.do
    return verb(AdminClient(args.server, args.api_key), args)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    if rest and (args.verb != "run" or any(word.startswith("-") for word in rest)):
        args.usage_error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        # argparse takes a list of words before the first option as all there is; a prompt may also come after the options
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
    text = "mesh, runtime and engine on this machine, supervised"
    everything = verbs.add_parser(
        "serve", help=text, description=f"{text}. Stop it with Ctrl-C or SIGTERM: running answers may finish."
    )
    serve_flags.add_flags(everything)
    everything.set_defaults(usage_error=everything.error)
    mesh = verbs.add_parser("serve-mesh", help="one pod's mesh, in front of any ModelMesh serving runtime")
    mesh.add_argument("--config", type=Path, help="YAML file with any of the fields below")
    add_flags(mesh, MeshConfig)
    mesh.set_defaults(usage_error=mesh.error)
    runtime = verbs.add_parser(
        "serve-runtime",
        help="the serving runtime alone, to put under a mesh (flags: serve-runtime --help)",
        add_help=False,
    )
    runtime.set_defaults(usage_error=runtime.error)


def _add_client_verbs(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--server",
        default=os.environ.get("REPERTORY_SERVER", DEFAULT_SERVER),
        metavar="URL",
        help=f"the mesh's HTTP address (default {DEFAULT_SERVER}) [REPERTORY_SERVER]",
    )
    common.add_argument(
        "--api-key",
        default=os.environ.get("REPERTORY_API_KEY", ""),
        metavar="KEY",
        help="bearer key, if the mesh wants one [REPERTORY_API_KEY]",
    )
    common.add_argument("--json", action="store_true", help="print JSON for a script")

    def verb(name: str, do: Verb, text: str, *, aliases: Sequence[str] = ()) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, parents=[common], help=text, description=text, aliases=list(aliases))
        sub.set_defaults(do=do, usage_error=sub.error)
        return sub

    sub = verb(
        "register",
        commands.register,
        "give a model a name; the same name with another source replaces it without a gap",
    )
    sub.add_argument("name")
    sub.add_argument("uri", help="hf://ORG/MODEL[:REV], s3://, gs://, az://, https://, pvc://, or a path")
    settings_flags.add_flags(sub)
    sub.add_argument("--type", help="ModelMesh model type; default: llm")
    sub.add_argument("--load", action="store_true", help="load it now and wait")
    sub = verb(
        "fit",
        commands.fit,
        "before loading: how many bytes it needs, does it fit, whom would it evict (exit 1 if it doesn't fit)",
    )
    sub.add_argument("name", metavar="NAME|URI")
    settings_flags.add_flags(sub)
    verb("ps", commands.ps, "the registered models and where they are", aliases=["ls", "list"])
    sub = verb("run", commands.run, "ask a model; without a prompt, talk to it")
    sub.add_argument("name")
    sub.add_argument(
        "prompt", nargs="*", help="the question; without one it is read from a pipe, or asked for in a conversation"
    )
    sub.add_argument("--max-tokens", type=int, metavar="N", help="of the answer; default: what fits the context")
    sub.add_argument(
        "--temperature", type=float, metavar="X", help="0 = always the likeliest token; default: the registration's"
    )
    sub.add_argument("--seed", type=int, metavar="N", help="the same answer again")
    sub.add_argument("--system", metavar="TEXT", help="system prompt")
    sub = verb("load", commands.load, "load a model now and wait")
    sub.add_argument("name")
    sub = verb("stop", commands.stop, "unload a model; its registration stays", aliases=["unload"])
    sub.add_argument("name")
    sub = verb("show", commands.show, "everything known of one model")
    sub.add_argument("name")
    sub = verb("rm", commands.remove, "forget a model")
    sub.add_argument("name")
    sub = verb("alias", commands.alias, "another, stable name for a model, movable without a gap (ModelMesh's vmodel)")
    sub.add_argument("alias")
    sub.add_argument("target", nargs="?", help="a registered name: the alias stands for what that stands for now")
    sub.add_argument("--delete", action="store_true", help="forget the alias; the model stays")


if __name__ == "__main__":
    sys.exit(main())
