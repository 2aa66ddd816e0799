"""Implements `repertory cache` and `rm --files`: lists the disk cache, and drops files that no name needs."""

import argparse
import sys
import time
from collections.abc import Sequence

import msgspec

from common.units import size
from mesh.cli import render
from mesh.cli.columns import Column
from mesh.client.admin import AdminClient, CacheEntry, CacheListing, PodCache
from mesh.errors import InvalidRequest


def cache(client: AdminClient, args: argparse.Namespace) -> int:
    """List the caches of all pods; with --prune drop the files that no registered name needs."""
    listing = client.cache()
    if args.prune:
        unneeded = {entry.key: None for entry in listing.entries if not entry.names and not entry.in_use}
        dropped = client.drop_files([*unneeded])
        print(f"{size(dropped.freed_bytes) or '0 B'} freed")
        return _say_failed(dropped.failed, "nothing was dropped")
    if args.json:
        print(msgspec.json.format(msgspec.json.encode(listing), indent=2).decode())
        return 0
    if listing.entries:
        render.print_columns(render.console(), columns(listing, time.time()))
        for line in _totals(listing):
            print(line)
    else:
        print("the cache is empty")
    return _say_failed([pod for pod in listing.pods if pod.error], "its cache is not listed")


def columns(listing: CacheListing, now_s: float) -> list[Column]:
    entries = listing.entries
    return [
        Column("SOURCE", [entry.uri or entry.key for entry in entries]),
        Column("SIZE", [size(entry.size_bytes) for entry in entries], rank=1, right=True),
        Column("NEEDED BY", [_needed_by(entry) for entry in entries], rank=2),
        Column("POD", [entry.pod if len(listing.pods) > 1 else "" for entry in entries], rank=3),
        Column("KIND", [entry.kind for entry in entries], rank=4),
        Column("LAST USED", [render.ago(entry.last_used_ms, now_s) for entry in entries], rank=5),
    ]


def _totals(listing: CacheListing) -> list[str]:
    """Return a line for the used and the allowed bytes, one per pod if there are several, and how to free some."""
    hint = "`repertory cache --prune` frees what no name needs"
    pods = [pod for pod in listing.pods if not pod.error]
    if len(listing.pods) > 1:
        lines = [f"{pod.instance_id}: {_share(pod.used_bytes, pod.budget_bytes)}" for pod in pods]
        return [*lines, hint]
    used_bytes = sum(entry.size_bytes for entry in listing.entries)
    return [f"{_share(used_bytes, listing.budget_bytes)}; {hint}"]


def _share(used_bytes: int, budget_bytes: int) -> str:
    return f"{size(used_bytes) or '0 B'} of {size(budget_bytes)}"


def _say_failed(pods: Sequence[PodCache], what: str) -> int:
    """Print the errors of pods that failed. Return the exit status: 1 if there are any."""
    for pod in pods:
        print(f"{pod.instance_id}: {what}: {pod.error}", file=sys.stderr)
    return 1 if pods else 0


def remove_files(client: AdminClient, uri: str) -> str:
    """Drop the files of a source that no registered name needs any more, on all pods. Return what happened as a clause of a sentence."""
    entries = [entry for entry in client.cache().entries if entry.uri == uri.partition("?")[0]]
    others = sorted({name for entry in entries for name in entry.names})
    if others:
        return f"its files stay, because {', '.join(others)} has the same source"
    if not entries:
        return "the cache holds no files of it"
    dropped = client.drop_files([*dict.fromkeys(entry.key for entry in entries)])
    left = f"; {dropped.num_in_use} of them are in use and stay" if dropped.num_in_use else ""
    failed = "".join(f"; {pod.instance_id} dropped nothing: {pod.error}" for pod in dropped.failed)
    return f"{size(dropped.freed_bytes) or '0 B'} of files dropped{left}{failed}"


def remove(client: AdminClient, args: argparse.Namespace) -> int:
    """Remove a name, and with --files what the cache holds of its source. Files outside the cache are never touched.

    A warning names the adapters that lose their base.
    """
    if args.files and args.json:
        raise InvalidRequest("rm: --files prints no JSON")
    uri = client.model(args.name).uri if args.files else ""
    client.remove(args.name)
    if args.json:
        return 0
    print(f"{args.name} is removed")
    if adapters := [model.name for model in client.models() if model.settings.get("adapter_of") == args.name]:
        print(
            f"warning: {', '.join(adapters)} cannot be loaded until {args.name} is registered again: it was the base",
            file=sys.stderr,
        )
    if args.files:
        print(remove_files(client, uri), file=sys.stderr)
    return 0


def _needed_by(entry: CacheEntry) -> str:
    if entry.names:
        return ", ".join(entry.names)
    return "a load" if entry.in_use else "nothing: may go"
