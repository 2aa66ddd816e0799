"""A drafter that proposes two tokens per step, over a whole engine with a real model: the text is transformers' own."""

from pathlib import Path

import msgspec
import pytest

from runtime.types import Checkpoint, GenerationRequest, SamplingParams, StopParams
from tests.support.drafting import TextDrafter
from tests.support.families import family
from tests.support.oracle import prompts, reference
from tests.support.real_engine import run_engine

GREEDY = SamplingParams(temperature=0.0)
SAMPLED = SamplingParams(temperature=0.8, top_p=0.9, logit_bias=((4, 1.0),), seed=3)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_text_with_drafts_equals_plain_greedy_text(name: str, device: str, tmp_path: Path) -> None:
    model = family(name)
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint(str(tmp_path), tuple(map(str, tmp_path.glob("*.safetensors"))), dtype="float32")
    stop = StopParams(24, ignore_eos=True)
    asked = [GenerationRequest(prompt=tuple(prompt), sampling=GREEDY, stop=stop) for prompt in prompts(3, 4)]
    asked.append(msgspec.structs.replace(asked[0], sampling=SAMPLED, prompt=(9, 8, 7)))
    plain = run_engine(checkpoint, asked, device=device)
    texts = plain.texts()
    assert texts[:4] == [reference(model, list(request.prompt), 24) for request in asked[:4]]
    drafter = TextDrafter([[*request.prompt, *text] for request, text in zip(asked, texts, strict=True)])
    speculated = run_engine(checkpoint, asked, device=device, drafter=drafter)
    assert speculated.texts() == texts
    assert drafter.num_proposed > 60
    assert speculated.num_steps < 0.8 * plain.num_steps
