"""Two models in a budget that holds both and little more: a long answer of one does not hold back the other."""

import threading
from collections.abc import Iterator

import pytest

from tests.support import stack
from tests.support.checkpoints import tiny_llama
from tests.support.edge import Edge

NUM_TOKENS = 2000


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    """Two models of about 30 MiB and 6 KiB of KV cache per token: 12 MiB for the long answer, with which the budget is used up."""
    base = tmp_path_factory.mktemp("shared")
    for seed, name in enumerate(("long", "short")):
        tiny_llama(base / name, seed, hidden=512, layers=3, max_position=4096)
    with stack.serve("--device", "cpu", "--memory", "74MiB", log=base / "serve.log") as running:
        found = Edge(running.url)
        for name in ("long", "short"):
            found.register(name, base / name, load=True)
            assert found.complete(name, max_tokens=1).status == 200
        yield found


def test_short_answer_does_not_wait_for_a_long_one(edge: Edge) -> None:
    """It waited for the whole of it when the long request's KV cache was set aside from the start.

    A request for a model that has left the device waits longer: see test_residency_lets_model_run_for_which_another_was_drained.
    """
    assert edge.complete("short", max_tokens=1).status == 200  # the last long answer may have taken its room
    stream = edge.stream("long", max_tokens=NUM_TOKENS, ignore_eos=True)
    stream.read(100)
    rest: list[bytes] = []
    reading = threading.Thread(target=lambda: rest.append(stream.read()))
    reading.start()
    try:
        answer = edge.complete("short", max_tokens=4, ignore_eos=True)
        is_long_running = reading.is_alive()
    finally:
        reading.join()
    assert answer.status == 200
    assert is_long_running
    assert rest[0].endswith(b"data: [DONE]\n\n")
    assert rest[0].count(b'"text":') > NUM_TOKENS / 2
