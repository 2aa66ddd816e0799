"""Implements `repertory new-key`: makes a random API key and the entry of the key file that accepts it."""

import argparse
import sys

import yaml

from mesh.access.api_keys import digest_of, new_secret
from mesh.access.scopes import Scope
from mesh.client.admin import AdminClient


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="name of the key in logs and metrics")
    parser.add_argument(
        "--scope",
        action="append",
        choices=[scope.value for scope in Scope],
        help="what the key may do (default inference); may be repeated",
    )
    parser.add_argument(
        "--model", action="append", metavar="PATTERN", help="names that the key may use, such as org/* (default all)"
    )
    parser.add_argument("--requests-per-minute", type=int, metavar="N", help="limit of inference requests per pod")
    parser.add_argument("--max-concurrent", type=int, metavar="N", help="limit of running inference requests per pod")


def new_key(_: AdminClient, args: argparse.Namespace) -> int:
    """Print the entry on stdout, so that it can be appended to the file, and the key itself on stderr."""
    secret = new_secret()
    entry: dict[str, object] = {
        "name": args.name,
        "sha256": digest_of(secret),
        "scopes": args.scope or [Scope.INFERENCE.value],
        "models": args.model or ["*"],
    }
    entry |= {
        name: value for name in ("requests_per_minute", "max_concurrent") if (value := getattr(args, name)) is not None
    }
    print(f"the key, which is shown only now: {secret}", file=sys.stderr)
    print("# an entry of the list `keys:`")
    print(yaml.safe_dump([entry], sort_keys=False, default_flow_style=None, width=200), end="")
    return 0
