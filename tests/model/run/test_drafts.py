"""A drafter that proposes two tokens per step, over a whole engine with a real model: the text is transformers' own."""

import queue
from pathlib import Path

import msgspec
import pytest

from runtime.config.schema import EngineConfig
from runtime.engine.core.loop import EngineLoop
from runtime.engine.device.backend import make_backend
from runtime.engine.interfaces import Drafter
from runtime.engine.operations import Operation, RunStep
from runtime.ipc.messages import Add, Command, Event, Load, LoadFailed, Tokens
from runtime.types import Checkpoint, GenerationRequest, SamplingParams, StopParams
from tests.model.test_oracle import prompts, reference
from tests.support.drafting import TextDrafter
from tests.support.families import family

SAMPLED = SamplingParams(temperature=0.8, top_p=0.9, logit_bias=((4, 1.0),), seed=3)


def texts(
    checkpoint: Checkpoint, requests: list[GenerationRequest], device: str, drafter: Drafter | None
) -> tuple[list[list[int]], int]:
    """What the engine answers, and in how many steps."""
    config = EngineConfig(
        device=device,
        max_rows=16,
        max_batch_tokens=64,
        slab_bytes=1 << 21,
        device_budget_bytes=128 << 20,
        debug_checks=True,
    )
    inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
    now, events, operations = [0.0], list[Event](), list[Operation]()
    loop = EngineLoop(
        config,
        make_backend(config),
        inbox,
        events.append,
        lambda _: None,
        lambda: now[0],
        operations.append,
        drafter=drafter,
    )
    inbox.put(Load("m", checkpoint))
    while not loop.table.models:
        loop.turn()
        assert not any(isinstance(event, LoadFailed) for event in events), events
    for number, request in enumerate(requests):
        inbox.put(Add(number, "m", request))
    said: dict[int, list[int]] = {number: [] for number in range(len(requests))}
    ended = 0
    while ended < len(requests):
        loop.turn()
        now[0] += 0.01
        for event in events:
            for row in event.rows if isinstance(event, Tokens) else ():
                assert row.error is None, row.error
                said[row.request_id] += row.tokens
                ended += row.finish is not None
        events.clear()
    inbox.put(None)
    loop.run()
    return [said[number] for number in range(len(requests))], sum(isinstance(o, RunStep) for o in operations)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_text_with_drafts_equals_plain_greedy_text(name: str, device: str, tmp_path: Path) -> None:
    model = family(name)
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint(str(tmp_path), tuple(map(str, tmp_path.glob("*.safetensors"))), dtype="float32")
    stop = StopParams(24, ignore_eos=True)
    asked = [
        GenerationRequest(prompt=tuple(p), sampling=SamplingParams(temperature=0.0), stop=stop) for p in prompts(3, 4)
    ]
    asked.append(msgspec.structs.replace(asked[0], sampling=SAMPLED, prompt=(9, 8, 7)))
    plain, plain_steps = texts(checkpoint, asked, device, None)
    if device == "cpu":
        assert plain[:4] == [reference(model, list(request.prompt), 24) for request in asked[:4]]
    drafter = TextDrafter([[*request.prompt, *text] for request, text in zip(asked, plain, strict=True)])
    speculated, steps = texts(checkpoint, asked, device, drafter)
    assert speculated == plain
    assert drafter.num_proposed > 60
    assert steps < 0.8 * plain_steps
