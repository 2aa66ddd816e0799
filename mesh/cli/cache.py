"""Implements `repertory cache` and `rm --files`: what the disk cache holds, what may go, and dropping it."""

import argparse
import sys
import time

import msgspec

from mesh.cli import render
from mesh.cli.columns import Column
from mesh.client.admin import AdminClient, CacheEntry, CacheListing
from mesh.errors import InvalidRequest


def cache(client: AdminClient, args: argparse.Namespace) -> int:
    """List the cache of the server's pod; with --prune drop the files that no registered name needs."""
    listing = client.cache()
    if args.prune:
        unneeded = [entry.key for entry in listing.entries if not entry.names and not entry.in_use]
        print(f"{render.size(client.drop_files(unneeded).freed_bytes) or '0 B'} freed")
        return 0
    if args.json:
        print(msgspec.json.format(msgspec.json.encode(listing), indent=2).decode())
        return 0
    if not listing.entries:
        print("the cache is empty")
        return 0
    console = render.console()
    render.print_columns(console, columns(listing, time.time()))
    used = sum(entry.size_bytes for entry in listing.entries)
    print(
        f"{render.size(used)} of {render.size(listing.budget_bytes)}; `repertory cache --prune` frees what no name needs"
    )
    return 0


def columns(listing: CacheListing, now_s: float) -> list[Column]:
    entries = listing.entries
    return [
        Column("SOURCE", [entry.uri or entry.key for entry in entries]),
        Column("SIZE", [render.size(entry.size_bytes) for entry in entries], rank=1, right=True),
        Column("NEEDED BY", [_needed_by(entry) for entry in entries], rank=2),
        Column("KIND", [entry.kind for entry in entries], rank=3),
        Column("LAST USED", [render.ago(entry.last_used_ms, now_s) for entry in entries], rank=4),
    ]


def remove_files(client: AdminClient, uri: str) -> str:
    """Drop the files of a source that no registered name needs any more. Return what happened as a clause of a sentence."""
    entries = [entry for entry in client.cache().entries if entry.uri == uri.partition("?")[0]]
    others = sorted({name for entry in entries for name in entry.names})
    if others:
        return f"its files stay, because {', '.join(others)} has the same source"
    if not entries:
        return "the cache holds no files of it"
    dropped = client.drop_files([entry.key for entry in entries])
    left = f"; {dropped.num_in_use} of them are in use and stay" if dropped.num_in_use else ""
    return f"{render.size(dropped.freed_bytes) or '0 B'} of files dropped{left}"


def remove(client: AdminClient, args: argparse.Namespace) -> int:
    """Remove a name, and with --files what the cache holds of its source. Files outside the cache are never touched."""
    if args.files and args.json:
        raise InvalidRequest("rm: --files prints no JSON")
    uri = client.model(args.name).uri if args.files else ""
    client.remove(args.name)
    if args.json:
        return 0
    print(f"{args.name} is removed")
    if args.files:
        print(remove_files(client, uri), file=sys.stderr)
    return 0


def _needed_by(entry: CacheEntry) -> str:
    if entry.names:
        return ", ".join(entry.names)
    return "a load" if entry.in_use else "nothing: may go"
