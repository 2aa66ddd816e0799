"""Completions on the wire: log-likelihoods, echo, offsets, several prompts, truncation and banned words."""

from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support import tokenizers as tiny
from tests.support.openai_server import TEXT, Server, chat, events, post, serve
from tests.support.scripted_engine import ScriptedEngine, served


async def test_completions_log_likelihood_request(http: aiohttp.ClientSession, server: Server) -> None:
    """What lm-eval sends for multiple choice."""
    prompt = server.script("The quick brown fox")
    for given in ([prompt], prompt, "The quick brown fox", ["The quick brown fox"]):
        body = {
            "model": "m1",
            "prompt": given,
            "temperature": 0,
            "max_tokens": 1,
            "logprobs": 1,
            "echo": True,
            "seed": 1234,
        }
        status, answer, _ = await post(http, server, "/v1/completions", body, Authorization="Bearer ")
        assert status == 200, answer
        choice = answer["choices"][0]
        found = choice["logprobs"]
        assert choice["text"] == "The quick brown fox" + server.model.text.decode(server.script(TEXT)[:1])
        assert (
            len(found["tokens"])
            == len(found["token_logprobs"])
            == len(found["top_logprobs"])
            == len(found["text_offset"])
        )
        assert len(found["tokens"]) == len(prompt) + 1
        assert found["token_logprobs"][0] is None
        assert found["top_logprobs"][0] is None
        assert found["token_logprobs"][1:] == [-1.5] * len(prompt)
        assert all(
            len(best) == 2 and found["tokens"][i + 1] in best for i, best in enumerate(found["top_logprobs"][1:])
        )
        for offset, token in zip(found["text_offset"], found["tokens"], strict=True):
            assert choice["text"].startswith(token, offset)
        assert found["text_offset"] == sorted(set(found["text_offset"]))
        assert found["text_offset"][-1] == len("The quick brown fox")


@pytest.mark.parametrize("kind", [tiny.byte_level, tiny.sentencepiece])
async def test_completions_offsets_count_special_tokens_in_the_prompt(
    http: aiohttp.ClientSession, tmp_path: Path, kind: Any
) -> None:
    model = served(kind(tmp_path), "m2")
    mark = "<|im_end|>" if kind is tiny.byte_level else "</s>"
    prompt = f"the dog{mark}{mark}the dog"
    async with serve(ScriptedEngine(lambda asked: [50]), model) as server:
        for form in (prompt, model.text.encode(prompt)):
            body = {
                "model": "m2",
                "prompt": form,
                "echo": True,
                "logprobs": 0,
                "max_tokens": 1,
                "skip_special_tokens": False,
            }
            _, answer, _ = await post(http, server, "/v1/completions", body)
            text, found = answer["choices"][0]["text"], answer["choices"][0]["logprobs"]
            own = [pair for pair in zip(found["text_offset"], found["tokens"], strict=True) if pair != (0, "<s>")]
            assert [token for _, token in own].count(mark) == 2
            assert all(text[offset:].startswith((token, token.removeprefix(" "))) for offset, token in own), own
            assert found["text_offset"] == sorted(found["text_offset"])


async def test_completions_many_log_probabilities_equal_few(http: aiohttp.ClientSession, server: Server) -> None:
    """They are written out beside the other requests; nothing of the answer differs."""
    prompt = server.script("The quick brown fox")
    body = {"model": "m1", "prompt": prompt, "max_tokens": 1, "logprobs": 20, "echo": True, "seed": 1}
    _, few, _ = await post(http, server, "/v1/completions", body)
    status, many, _ = await post(http, server, "/v1/completions", {**body, "n": 20})
    assert status == 200
    assert [choice["logprobs"] for choice in many["choices"]] == [few["choices"][0]["logprobs"]] * 20


async def test_completions_echo_without_output(http: aiohttp.ClientSession, server: Server) -> None:
    body = {"model": "m1", "prompt": "The fox", "max_tokens": 0, "logprobs": 0, "echo": True}
    status, answer, _ = await post(http, server, "/v1/completions", body)
    assert status == 200
    assert answer["choices"][0]["text"] == "The fox"
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == len(server.script("The fox"))
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0
    lines = await events(http, server, "/v1/completions", {**body, "stream": True})
    assert "".join(line["choices"][0]["text"] for line in lines) == "The fox"
    assert lines[0]["choices"][0]["logprobs"]["token_logprobs"][0] is None


async def test_completions_stream_several_prompts_with_echo(http: aiohttp.ClientSession, server: Server) -> None:
    body = {
        "model": "m1",
        "prompt": ["The fox", "a dog"],
        "n": 2,
        "echo": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    lines = await events(http, server, "/v1/completions", body)
    texts = [""] * 4
    for line in lines[:-1]:
        texts[line["choices"][0]["index"]] += line["choices"][0]["text"]
    assert texts == ["The fox" + TEXT, "The fox" + TEXT, "a dog" + TEXT, "a dog" + TEXT]
    assert lines[-1]["choices"] == []
    assert lines[-1]["usage"]["prompt_tokens"] == len(server.script("The fox")) + len(server.script("a dog"))
    assert lines[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] == 2


async def test_completions_offsets_continue_through_a_stream(http: aiohttp.ClientSession, server: Server) -> None:
    body = {"model": "m1", "prompt": "The fox", "logprobs": 1, "echo": True, "stream": True}
    lines = await events(http, server, "/v1/completions", body)
    text = "".join(line["choices"][0]["text"] for line in lines)
    pairs = [
        pair
        for line in lines
        if (found := line["choices"][0]["logprobs"]) is not None
        for pair in zip(found["text_offset"], found["tokens"], strict=True)
    ]
    assert all(text.startswith(token, offset) for offset, token in pairs[:-1])
    assert pairs[-1] == (len(text), "<|end|>")


async def test_bad_words_are_banned_in_both_spellings(http: aiohttp.ClientSession, server: Server) -> None:
    assert (await post(http, server, "/v1/chat/completions", chat(bad_words=["dog", " fox"])))[0] == 200
    wanted = {tuple(server.script(text)) for text in ("dog", " dog", "fox", " fox")}
    assert set(server.engine.asked[0].request.bad_words) == wanted


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"bad_words": [""]}, "1 to 256 characters"),
        ({"bad_words": ["  "]}, "1 to 256 characters"),
        ({"bad_words": ["a"] * 257}, "at most 256 words"),
        ({"bad_words": ["a", 1]}, "Expected `str`"),
    ],
)
async def test_bad_words_refuses_lists_beyond_its_limits(
    http: aiohttp.ClientSession, server: Server, fields: dict[str, Any], words: str
) -> None:
    status, answer, _ = await post(http, server, "/v1/chat/completions", chat(**fields))
    assert (status, answer["error"]["param"].split("[")[0]) == (400, "bad_words")
    assert words in answer["error"]["message"]


async def test_bad_words_must_leave_an_allowed_token(http: aiohttp.ClientSession, server: Server) -> None:
    [letter] = server.script("a")
    body = chat(bad_words=["a"], allowed_token_ids=[letter])
    status, answer, _ = await post(http, server, "/v1/chat/completions", body)
    assert (status, answer["error"]["param"]) == (400, "bad_words")


async def test_completions_truncation_keeps_the_end_and_bos(
    http: aiohttp.ClientSession, server: Server, tmp_path: Path
) -> None:
    body = {"prompt": "the dog the dog", "truncate_prompt_tokens": 3, "echo": True, "max_tokens": 2}
    await post(http, server, "/v1/completions", {"model": "m1", **body})
    assert server.engine.asked[0].request.prompt == tuple(server.script("the dog the dog")[-3:])
    with_bos = served(tiny.sentencepiece(tmp_path), "m2")
    async with serve(ScriptedEngine(lambda asked: [5]), with_bos) as other:
        await post(http, other, "/v1/completions", {"model": "m2", **body})
        assert other.engine.asked[0].request.prompt == (1, *other.script("the dog the dog")[-2:])


async def test_check_chars_refuses_a_huge_prompt_untokenized(http: aiohttp.ClientSession, server: Server) -> None:
    text = "the dog " * 1000
    for path, body, param in (
        ("/v1/completions", {"model": "m1", "prompt": text}, "prompt"),
        ("/v1/chat/completions", chat(messages=[{"role": "user", "content": text}]), "messages"),
    ):
        status, answer, _ = await post(http, server, path, body)
        assert (status, answer["error"]["param"], "characters" in answer["error"]["message"]) == (400, param, True)
        assert (await post(http, server, path, {**body, "truncate_prompt_tokens": 5}))[0] == 200


async def test_completions_many_prompts(http: aiohttp.ClientSession, server: Server) -> None:
    status, answer, _ = await post(
        http, server, "/v1/completions", {"model": "m1", "prompt": [[5, 6]] * 300, "max_tokens": 1}
    )
    assert status == 200
    assert len(answer["choices"]) == 300
    status, answer, _ = await post(http, server, "/v1/completions", {"model": "m1", "prompt": [[5, 6]] * 2049})
    assert status == 400
    assert "2048" in answer["error"]["message"]


@pytest.mark.parametrize("prompt", [[], [[]], "", [1, "a"], ["a", [1]], [100_000], [[-1]], ["a", ""], [1] * 200])
async def test_completions_refuses_bad_prompts(http: aiohttp.ClientSession, server: Server, prompt: Any) -> None:
    status, answer, _ = await post(http, server, "/v1/completions", {"model": "m1", "prompt": prompt})
    assert status == 400, answer
    assert answer["error"]["param"] == "prompt"
