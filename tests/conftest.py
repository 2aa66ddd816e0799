"""Provides what all areas share: a real etcd, Triton's interpreter where there is no GPU, the order of files, and the cases that coverage measures."""

import gc
import importlib
import os
import pkgutil
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import hypothesis.internal
import pytest
import torch

from tests.support.etcd import EtcdServer

# Until the tests are collected. Nearly every object that imports and collection make stays, and looking for garbage among them took a third of the time.
gc.disable()

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton's own library is imported, by whichever module comes first

# Measuring branches makes Python code up to 2.6 times as slow. Many tests have a case for each family of models, whose branches count, so the limit
# is above their number; it leaves out most cases of the schemas. Cases that differ in a random seed run the same code. Those of the kernels mostly run
# Triton's interpreter, whose work is not measured.
_MEASURED_CASES, _MEASURED_KERNEL_CASES, _MEASURED_SEEDS = 10, 2, 1
_KERNELS = Path(__file__).parent / "kernels"


def pytest_configure(config: pytest.Config) -> None:
    """Give the worker of the files that wait the cores before the others: its tests have timeouts of a second or less."""
    worker = getattr(config, "workerinput", None)
    if worker is not None:
        from tests.support.lanes import is_waiting_worker

        if not is_waiting_worker(worker["workerid"], worker["workercount"]):
            os.nice(5)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Replace `--dist loadfile` by lanes of files that compute and files that wait."""
    from tests.support.lanes import LaneScheduling

    return LaneScheduling(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also run the cases marked long, and longer random lives")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out long cases without `--long`, begin with slow files, and measure coverage in the first cases of each parametrised test only.

    A worker that begins a slow file last would keep the others waiting for it.
    """
    if not config.getoption("--long"):
        config.hook.pytest_deselected(items=[item for item in items if _is_long(item)])
        items[:] = [item for item in items if not _is_long(item)]
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    num_cases: Counter[str] = Counter()
    for item in items:
        function = item.nodeid.partition("[")[0]
        num_cases[function] += 1
        if num_cases[function] > _num_measured(item):
            item.add_marker(pytest.mark.no_cover)


def _num_measured(item: pytest.Item) -> int:
    """Return how many cases of the item's test are measured."""
    if isinstance(item, pytest.Function) and hasattr(item, "callspec") and "seed" in item.callspec.params:
        return _MEASURED_SEEDS
    return _MEASURED_KERNEL_CASES if _KERNELS in item.path.parents else _MEASURED_CASES


def _is_long(item: pytest.Item) -> bool:
    """Whether a case is left out without `--long`. On a GPU the cases that run there take moments."""
    is_native = torch.cuda.is_available() and item.get_closest_marker("gpu") is not None
    return item.get_closest_marker("long") is not None and not is_native


def pytest_collection_finish() -> None:
    """Exempt what was imported and collected from garbage collection, which would look through its two million objects again and again.

    Hypothesis imports some of its modules when a test needs them. pytest parses them, which can fail like that in `pytest_runtest_makereport`.
    """
    for module in pkgutil.walk_packages(hypothesis.internal.__path__, f"{hypothesis.internal.__name__}."):
        importlib.import_module(module.name)
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish() -> None:
    """Collect garbage before plugins summarise. They import modules, which parses source text; see `pytest_runtest_makereport`."""
    gc.collect()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    call: pytest.CallInfo[None],
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Collect garbage before a failure is shown, and not meanwhile.

    Showing a failure parses source text. On Python 3.11 `ast.parse` raises SystemError if a finalizer that it triggers logs a traceback, as that of a
    failed task does, since that parses, too. pytest then ends with an internal error, and the remaining tests do not run.
    """
    if call.excinfo is not None and not call.excinfo.errisinstance(pytest.skip.Exception):
        gc.collect()
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.fixture(scope="session")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """Shared: tests keep to prefixes of their own, and do not kill it."""
    server = EtcdServer(tmp_path_factory.mktemp("etcd"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def own_etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """One test's own, to be killed and brought back."""
    server = EtcdServer(tmp_path_factory.mktemp("etcd"))
    server.start()
    yield server
    server.kill()
