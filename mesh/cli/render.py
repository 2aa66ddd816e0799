"""Formats the output of the command line for a terminal: tables, sizes, ages and progress."""

import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from mesh.client.admin import Fit, Model

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_COLOURS = {"loaded": "green", "failed": "red", "quarantined": "red", "not loaded": "dim"}


def console() -> Console:
    """Return a console that does not wrap lines on a pipe, where a script reads them."""
    return Console(width=None if sys.stdout.isatty() else 1000)


def size(num_bytes: int) -> str:
    """Return a size such as `98 MiB`, or an empty string for 0."""
    if num_bytes <= 0:
        return ""
    value, unit = float(num_bytes), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.0f} {_UNITS[unit]}" if value >= 10 or unit == 0 else f"{value:.1f} {_UNITS[unit]}"


def ago(epoch_ms: int, now_s: float) -> str:
    """Return an age such as `3 minutes ago`, or `never` for 0."""
    if epoch_ms <= 0:
        return "never"
    seconds = max(0.0, now_s - epoch_ms / 1000)
    for limit, step, word in (
        (60.0, 1.0, "second"),
        (3600.0, 60.0, "minute"),
        (86400.0, 3600.0, "hour"),
        (float("inf"), 86400.0, "day"),
    ):
        if seconds < limit:
            count = int(seconds / step)
            return "now" if word == "second" and count < 2 else f"{count} {word}{'s' if count != 1 else ''} ago"
    raise AssertionError("unreachable")


def state_of(model: Model) -> str:
    """Return a model's state in one or two words, with the progress of a load."""
    state = model.state or model.status.lower().replace("_", " ")
    if model.progress and state not in ("loaded", "failed"):
        return f"{state} {model.progress:.0%}"
    return state or "not loaded"


def model_table(models: Sequence[Model], now_s: float) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("NAME", "STATE", "TIER", "WEIGHTS", "IN DEVICE", "QUANT", "COPIES", "LAST USED", "RUN", "WAIT"):
        table.add_column(
            heading,
            no_wrap=heading != "NAME",
            justify="right" if heading in ("WEIGHTS", "IN DEVICE", "COPIES", "RUN", "WAIT") else "left",
        )
    for model in models:
        state = state_of(model)
        loaded = [copy for copy in model.copies if copy.state in ("loaded", "") and copy.status == "LOADED"]
        table.add_row(
            f"{model.name} → {model.alias_of}" if model.alias_of else model.name,
            Text(state, style=_COLOURS.get(state, "yellow" if model.progress else "")),
            model.tier,
            size(model.weight_bytes),
            size(model.device_bytes),
            model.quantization,
            str(len(loaded)) if loaded else "",
            ago(model.last_used_ms, now_s),
            str(model.running or ""),
            str(model.waiting or ""),
        )
    return table


def show_model(console: Console, model: Model) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    rows = [
        ("name", model.name),
        ("model id", model.model_id),
        ("source", model.uri),
        ("moving to", model.moving_to),
        ("type", model.type),
        ("state", state_of(model)),
        ("tier", model.tier),
        ("quantisation", model.quantization),
        ("weights", size(model.weight_bytes)),
        ("in device memory", size(model.device_bytes)),
        ("alias of", model.alias_of),
        ("other names", ", ".join(name for name in model.aliases if name != model.alias_of)),
        ("last used", ago(model.last_used_ms, time.time())),
        ("error", model.error),
    ]
    rows += [(f"setting {key}", str(value)) for key, value in sorted(model.settings.items())]
    rows += [
        (f"copy on {copy.instance_id}", f"{copy.state or copy.status} {copy.tier} {copy.error}".strip())
        for copy in model.copies
    ]
    for key, value in rows:
        if value:
            table.add_row(key, value)
    console.print(table)


def show_fit(console: Console, name: str, fit: Fit) -> None:
    """Print what a model needs, what the pod has, and whether the model fits."""
    kv = f"{size(fit.min_kv_bytes)} at least ({size(fit.kv_bytes_per_token)} per token, context {fit.max_model_len:,})"
    sure = "" if fit.exact else "  (estimated from the configuration)"
    console.print(
        f"[bold]{name}[/bold]  {fit.architecture}  {fit.num_parameters / 1e6:,.0f} M parameters  {fit.quantization}"
    )
    console.print(f"  weights    {size(fit.weight_bytes)}{sure}")
    console.print(f"  KV cache   {kv}")
    console.print(f"  workspace  {size(fit.workspace_bytes) or '0'}")
    console.print(f"  budget     {size(fit.capacity_bytes)}")
    verdict = "[green]fits[/green]" if fit.fits else "[red]doesn't fit[/red]"
    evicts = f"; would evict {', '.join(fit.evicts)}" if fit.evicts else ""
    console.print(f"  {verdict}{evicts}{': ' + fit.reason if fit.reason else ''}")


def waiting(what: str, *, enabled: bool) -> AbstractContextManager[object]:
    """Return a context that shows a spinner in a terminal, and nothing on a pipe."""
    console = Console(stderr=True)
    return console.status(f"{what} …") if enabled and console.is_terminal else nullcontext()


class LoadBar:
    """Shows the progress of one model's load: a bar in a terminal, one line per change of state on a pipe."""

    def __init__(self, name: str, *, enabled: bool) -> None:
        self._name = name
        self._last = ""
        self._enabled = enabled
        self._live = enabled and sys.stderr.isatty()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=not self._live,
        )
        self._task = self._progress.add_task(name, total=1.0, note="")

    def __enter__(self) -> "LoadBar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, state: str, fraction: float, note: str) -> None:
        self._progress.update(self._task, description=f"{self._name}: {state}", completed=fraction, note=note)
        if self._enabled and not self._live and state != self._last:
            print(f"{self._name}: {state}{' ' + note if note else ''}", file=sys.stderr, flush=True)
        self._last = state
