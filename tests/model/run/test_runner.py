"""The runner's promises beside its text: sizes refused, many blocks at once, no wait for the device in a step."""

from typing import cast

import pytest
import torch

from runtime.config.schema import EngineConfig
from runtime.engine.interfaces import RowSetup, StepPlan
from runtime.engine.model.run.device_state import DeviceState
from runtime.engine.model.run.result_ring import StepLaunched
from runtime.engine.model.run.runner import ModelRunner
from runtime.errors import EngineFault
from runtime.types import LogprobParams, SamplingParams
from tests.support.driving import Ask, Driver, facts_of, hooked
from tests.support.families import family
from tests.support.graphs import capture_all, launch

GREEDY = SamplingParams(temperature=0.0)


def test_runner_refuses_a_step_beyond_its_buffers_and_runs_the_next() -> None:
    driver = Driver(*hooked(family("llama")), max_rows=4, max_tokens=32, chaos=False)
    too_long = StepPlan([0], [0], [33], [False], [1], [1] * 33, [(0, 0, 0), (0, 1, 3), (0, 2, 6)])
    with pytest.raises(EngineFault, match="33 tokens"):
        driver.runner.launch(too_long)
    assert len(driver.run([Ask([1, 2, 3], 4)])[0].tokens) == 4


def test_runner_uploads_more_blocks_than_one_buffer_holds() -> None:
    """Rows admitted with long prefix hits bring all their pages in one step."""
    built, pages = hooked(family("llama"), num_slabs=60)
    config = EngineConfig(max_rows=2, max_batch_tokens=32)
    prompt = [(5 * i + 1) % 190 for i in range(400)]
    blocks = [(1, i, pages.ids[3 * i + 1]) for i in range(26)]

    def text(first_blocks: int) -> list[int]:
        """The prompt's chunks with `first_blocks` blocks at the first step and the rest at the second."""
        runner = ModelRunner(built, facts_of(built), config, DeviceState.create(built.device, config))
        runner.open_row(RowSetup(1, GREEDY, LogprobParams(), prompt, len(prompt)))
        for start in range(0, 400, 25):
            new = blocks[:first_blocks] if start == 0 else blocks[first_blocks:] if start == 25 else []
            last = start == 375
            plan = StepPlan([1], [start], [25], [False], [int(last)], prompt[start : start + 25], new)
            tokens = runner.launch(plan).collect().tokens
        for position in range(400, 410):
            tokens += runner.launch(StepPlan([1], [position], [1], [True], [1], [])).collect().tokens
        return tokens

    assert DeviceState.create(built.device, config).uploads.max_blocks < 26
    assert text(26) == text(2)


def test_results_are_in_the_order_of_the_rows_that_sample() -> None:
    model = family("llama")
    driver = Driver(*hooked(model), max_rows=4, chaos=False)
    for row in range(3):
        driver.runner.open_row(RowSetup(row, GREEDY, LogprobParams(), [row], 1))
    plan = StepPlan(
        [2, 0, 1],
        [0, 0, 0],
        [2, 1, 3],
        [False] * 3,
        [1, 0, 1],
        [3, 4, 5, 6, 7, 8],
        [(r, 0, 3 * r * 4) for r in range(3)],
    )
    launched = driver.runner.launch(plan)
    assert launched.ready()
    result = launched.collect()
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        expected = [int(model(torch.tensor([ids])).logits[0, -1].argmax()) for ids in ([3, 4], [6, 7, 8])]
    assert result.tokens == expected
    assert result.device_us > 0
    assert result.logprobs is None


def test_steps_launched_ahead_keep_their_results() -> None:
    """The loop collects one step late; no tokens are lost if it is later still."""
    rules = SamplingParams(temperature=1.0, seed=5)
    built, pages = hooked(family("llama"))
    texts = []
    for late in (False, True):
        driver = Driver(built, pages, max_rows=2)
        driver.runner.open_row(RowSetup(1, rules, LogprobParams(generated=1), [4, 5], 2))
        blocks = [(1, i, page) for i, page in enumerate(pages.ids[:4])]
        plans = [StepPlan([1], [0], [2], [False], [1], [4, 5], blocks)]
        plans += [StepPlan([1], [position], [1], [True], [1], []) for position in range(2, 30)]
        launched = [driver.runner.launch(plan) for plan in plans] if late else []
        results = (
            [step.collect() for step in launched] if late else [driver.runner.launch(plan).collect() for plan in plans]
        )
        texts.append([(result.tokens, result.logprobs) for result in results])
    assert texts[0] == texts[1]
    assert len({tokens[0] for tokens, _ in texts[0]}) > 5


@pytest.mark.gpu
@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY, SamplingParams(temperature=0.8, top_p=0.9, seed=1),
        SamplingParams(temperature=0.9, repetition_penalty=1.2, logit_bias=((4, 1.0),), seed=2),
    ],
)  # fmt: skip
@pytest.mark.parametrize("logprobs", [LogprobParams(), LogprobParams(generated=3, prompt=1)])
def test_runner_step_never_waits_for_the_device(sampling: SamplingParams, logprobs: LogprobParams) -> None:
    built, pages = hooked(family("llama").cuda(), device="cuda")
    driver = Driver(built, pages, max_rows=8)
    prompts = [[1 + i, 2, 3, 4] for i in range(4)]

    def steps() -> None:
        """Prefill, decode and a prompt's chunk, launched end to end."""
        launched = []
        rows = list(range(4))
        for row in rows:
            driver.runner.open_row(RowSetup(row, sampling, logprobs, prompts[row], 4, 2, (7,)))
        tokens = [t for prompt in prompts for t in prompt]
        wants = rows if logprobs.prompt is not None else []
        blocks = [(row, 0, pages.ids[row]) for row in rows]
        launched.append(
            launch(driver.runner, StepPlan(rows, [0] * 4, [4] * 4, [False] * 4, [1] * 4, tokens, blocks, wants))
        )
        decodes = [StepPlan(rows, [4 + step] * 4, [1] * 4, [True] * 4, [1] * 4, []) for step in range(4)]
        launched += [launch(driver.runner, plan) for plan in decodes]
        torch.cuda.set_sync_debug_mode("default")
        for each in launched:
            assert len(each.collect().tokens) == 4
        for row in rows:
            driver.runner.close_row(row)

    steps()  # compiles kernels, fills torch's pinned memory
    for _ in range(3):
        torch.cuda.set_sync_debug_mode("error")
        try:
            steps()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        capture_all(driver.state.graphs, {"tiny": driver.runner})


def test_runner_step_that_failed_is_ready_and_raises_when_collected() -> None:
    """A lost device shows at whatever asks first; the loop must learn whose step it was."""

    class Lost:
        def query(self) -> bool:
            raise RuntimeError("an illegal memory access was encountered")

        def synchronize(self) -> None:
            self.query()

    event = cast("torch.cuda.Event", Lost())
    launched = StepLaunched(torch.zeros(1, dtype=torch.int64), None, None, (event, event, event), 0.0)
    assert launched.ready()
    with pytest.raises(RuntimeError, match="illegal memory access"):
        launched.collect()
