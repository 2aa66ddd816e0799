"""Formats the output of the command line for a terminal: tables, sizes, ages and progress."""

import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from common.model_fit import ModelFit
from common.units import size
from mesh.cli.columns import Column, lines
from mesh.client.admin import Copy, Model, Pod

_COLOURS = {"loaded": "green", "failed": "red", "quarantined": "red", "not loaded": "dim"}


def console() -> Console:
    """Return a console that does not wrap lines on a pipe, where a script reads them."""
    return Console(width=None if sys.stdout.isatty() else 1000)


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


def print_columns(console: Console, columns: Sequence[Column]) -> None:
    """Print a table whose lines the console neither folds nor cuts."""
    for line in lines(columns, console.width):
        console.print(line, soft_wrap=True)


def model_columns(models: Sequence[Model], now_s: float) -> list[Column]:
    """Return the columns of `ps` and `list`. The pods are shown if the models have copies on more than one."""
    loaded = [[copy for copy in model.copies if copy.status == "LOADED"] for model in models]
    pods = {copy.instance_id for model in models for copy in model.copies}
    devices = {(copy.instance_id, copy.devices) for model in models for copy in model.copies if copy.devices}
    shows_devices = len(devices) > len(pods) or any("," in names for _, names in devices)
    return [
        Column("NAME", [model.name for model in models]),
        Column("STATE", [_state_cell(model) for model in models], rank=1),
        Column("TIER", [model.tier for model in models], rank=3),
        Column("WEIGHTS", [size(model.weight_bytes) for model in models], rank=4, right=True),
        Column("IN DEVICE", [size(model.device_bytes) for model in models], rank=4, right=True),
        Column("QUANT", [model.quantization for model in models], rank=7),
        Column("RUN", [str(model.running or "") for model in models], rank=6, right=True),
        Column("WAIT", [str(model.waiting or "") for model in models], rank=6, right=True),
        Column("LAST USED", [ago(model.last_used_ms, now_s) for model in models], rank=2),
        Column("ALIAS OF", [model.alias_of for model in models], rank=5),
        Column(
            "COPIES", [str(len(copies) or "") for copies in loaded] if len(pods) > 1 else [""] * len(models), 8, True
        ),
        Column("DEVICES", [_places_of(model) if shows_devices else "" for model in models], rank=9),
        Column("PODS", [_pods_of(model) if len(pods) > 1 else "" for model in models], rank=9),
    ]


def pod_columns(pods: Sequence[Pod], now_s: float) -> list[Column]:
    return [
        Column("POD", [pod.instance_id for pod in pods]),
        Column("STATE", ["stopping" if pod.shutting_down else "ready" for pod in pods], rank=1),
        Column("MODELS", [str(pod.num_models) for pod in pods], rank=2, right=True),
        Column("IN DEVICE", [size(pod.device_used_bytes) or "0 B" for pod in pods], rank=3, right=True),
        Column("BUDGET", [size(pod.device_budget_bytes) for pod in pods], rank=3, right=True),
        Column("LOADED", [f"{size(pod.used_bytes) or '0 B'} of {size(pod.capacity_bytes)}" for pod in pods], rank=6),
        Column("LOADING", [str(pod.loading or "") for pod in pods], rank=5, right=True),
        Column("RUN", [str(pod.running or "") for pod in pods], rank=5, right=True),
        Column("WAIT", [str(pod.waiting or "") for pod in pods], rank=5, right=True),
        Column("HTTP", [pod.http_address for pod in pods], rank=4),
        Column("GRPC", [pod.grpc_address for pod in pods], rank=8),
        Column("STARTED", [ago(pod.start_time_ms, now_s) for pod in pods], rank=7),
        Column("LABELS", [",".join(pod.labels) for pod in pods], rank=9),
        Column("DEVICES", [_devices_of(pod) for pod in pods], rank=10),
    ]


def _devices_of(pod: Pod) -> str:
    """Return what is used on each device of a pod with several; empty for one."""
    if len(pod.devices) < 2:
        return ""
    return ", ".join(
        f"{device.name} {size(device.used_bytes) or '0 B'} of {size(device.budget_bytes)}" for device in pod.devices
    )


def _state_cell(model: Model) -> Text:
    state = state_of(model)
    return Text(state, style=_COLOURS.get(state, "yellow" if model.progress else ""))


def _pods_of(model: Model) -> str:
    return ",".join(sorted(copy.instance_id for copy in model.copies if copy.status in ("LOADED", "LOADING")))


def _places_of(model: Model) -> str:
    """Return the devices of the model's copies, those of one copy joined by +."""
    return ",".join(copy.devices.replace(",", "+") for copy in model.copies if copy.devices)


def context_of(max_model_len: int, wanted_model_len: int, unit: str = " tokens") -> str:
    """Return a context's length, with the one that was asked for if memory holds less; empty if it is unknown."""
    if not max_model_len:
        return ""
    cut = f", cut from {wanted_model_len:,} to fit the device memory" if wanted_model_len > max_model_len else ""
    return f"{max_model_len:,}{unit}{cut}"


def show_model(console: Console, model: Model) -> None:
    """Print the details of a model. Values that are wider than the terminal are folded, so that nothing is cut."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
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
    for copy in model.copies[:1]:
        rows += [
            ("context", context_of(copy.max_model_len, copy.wanted_model_len)),
            ("architecture", copy.architecture),
            ("arithmetic", copy.dtype),
            ("forward pass", copy.path),
            ("devices", _share_of(copy)),
        ]
    rows += [(key, _shown(value)) for key, value in sorted(model.settings.items())]
    rows += [
        (f"on {copy.instance_id}", f"{copy.state or copy.status} {copy.tier} {copy.error}".strip())
        for copy in model.copies
    ]
    for key, value in rows:
        if value:
            table.add_row(key, Text(value))
    console.print(table)


def _share_of(copy: Copy) -> str:
    """Return a copy's devices, with its bytes on each if several share it."""
    names = copy.devices.split(",")
    if len(names) < 2:
        return copy.devices
    each = f"{size(copy.weight_bytes // len(names))} of weights"
    return f"{', '.join(names)}: on each {each}, {size(copy.device_bytes // len(names)) or '0 B'} in device memory"


def _shown(value: object) -> str:
    """Return a setting's value; a mapping as `key=value` pairs."""
    if isinstance(value, dict):
        return ", ".join(f"{key}={part}" for key, part in value.items())
    return str(value).lower() if isinstance(value, bool) else str(value)


def show_fit(console: Console, name: str, fit: ModelFit) -> None:
    """Print what a model needs, what the pod has, and whether the model fits."""
    context = context_of(fit.max_model_len, fit.wanted_model_len, unit="") or "0"
    kv = f"{size(fit.min_kv_bytes) or '0'} at least ({size(fit.kv_bytes_per_token)} per token, context {context})"
    if not fit.kv_bytes_per_token:
        kv = "that of its base" + (f" (context {context})" if fit.max_model_len else "")
    sure = "" if fit.exact else "  (estimated from the configuration)"
    console.print(
        f"[bold]{name}[/bold]\n  {fit.architecture}  {fit.num_parameters / 1e6:,.{0 if fit.num_parameters > 10e6 else 1}f} M parameters  {fit.quantization}"
    )
    console.print(f"  weights    {size(fit.weight_bytes)}{sure}")
    if fit.unpacked_blocks:
        smaller = f"; as nf4 {size(fit.nf4_weight_bytes)}" if fit.nf4_weight_bytes else ""
        smaller += f"; kept {size(fit.kept_weight_bytes)}" if fit.kept_weight_bytes else ""
        console.print(
            f"  file       {size(fit.stored_bytes)} of {fit.unpacked_blocks} blocks, which are unpacked{smaller}"
        )
    console.print(f"  KV cache   {kv}")
    console.print(f"  workspace  {size(fit.workspace_bytes) or '0'}")
    console.print(f"  budget     {size(fit.capacity_bytes)}")
    if fit.num_devices > 1:
        console.print(f"  devices    {fit.num_devices}, each with these sizes")
    verdict = "[green]fits[/green]" if fit.fits else "[red]does not fit[/red]"
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
            TextColumn("{task.fields[percent]}"),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=not self._live,
        )
        self._task = self._progress.add_task(name, total=None, note="", percent="")

    def __enter__(self) -> "LoadBar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, state: str, fraction: float, note: str) -> None:
        """Show a state. The bar pulses while the progress in it is unknown (0)."""
        if state != self._last:
            self._progress.remove_task(self._task)
            self._task = self._progress.add_task(f"{self._name}: {state}", total=None, note=note, percent="")
            if self._enabled and not self._live:
                print(f"{self._name}: {state}{', ' + note if note else ''}", file=sys.stderr, flush=True)
        self._last = state
        percent = f"{fraction:>4.0%}".replace("%", " %") if fraction else ""
        if fraction:
            self._progress.update(self._task, total=1.0, completed=fraction)
        self._progress.update(self._task, note=note, percent=percent)
