"""Tokenizes and plans the prompts of a request of the Open Inference Protocol, and generates whole texts."""

from runtime.api.grammars import guide_answer
from runtime.api.oip.plan import plan_inference
from runtime.api.openai.responses import finish_word
from runtime.api.openai.structured import wanted_of
from runtime.api.openai.types import Shared
from runtime.api.tokenization import encode_texts
from runtime.generation.generator import Generator
from runtime.generation.limits import check_chars, check_count
from runtime.interfaces import ServedModel
from runtime.types import GenerationRequest


async def plan_texts(model: ServedModel, texts: list[str], body: Shared) -> list[GenerationRequest]:
    """Return one request per prompt. Raises InvalidRequest naming the field."""
    check_count(model, len(texts))
    check_chars(model, texts)
    prompts = await encode_texts(model, texts, add_special_tokens=body.add_special_tokens is not False)
    requests = plan_inference(model, body, prompts)
    return (await guide_answer(model, wanted_of(body))).apply(requests)


async def complete_texts(generator: Generator, model: ServedModel, texts: list[str], body: Shared) -> list[str]:
    """Return one text per prompt. Raises InvalidRequest, and Unavailable if the runtime ended a sequence."""
    if not texts:
        return []
    results = await generator.complete(model, await plan_texts(model, texts, body))
    for result in results:
        finish_word(model, result.finish)
    return [result.text for result in results]
