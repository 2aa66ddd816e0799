"""Chat templates against transformers' own rendering; special-token rules of the configuration files; broken files."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from common.model_key import DefaultSampling, ModelSettings
from runtime.errors import InvalidRequest, LoadFailed
from runtime.text.chat import ChatMessage, ChatOptions
from runtime.text.text_model import load_text
from tests.support import tokenizers as tiny

TEMPLATES = {
    "chatml": tiny.CHATML,
    "trims": "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m['content'] | trim }} {{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}",
    "loops": "{%- for m in messages -%}\n    {%- if loop.index0 > 5 -%}{%- break -%}{%- endif -%}\n    {{ m.role ~ ': ' ~ m.content ~ '\\n' }}\n"
    "{%- endfor %}\n    {% set ns = namespace(found=false) %}\n{% if not ns.found and tools is none %}none{% endif %}{{ extra | default('x') }}",
    "json": "{{ messages | tojson }}|{{ messages | tojson(indent=2) }}|{{ {'k': '<é>'} | tojson }}{% generation %}g{% endgeneration %}",
    "dates": "{{ strftime_now('%Y') }}{% if messages[0].role == 'system' %}S{% endif %}{{ messages[-1].content }}",
}
CHATS = [
    [("user", "hi <b> é")],
    [("system", "be brief"), ("user", " two\nlines "), ("assistant", "ok"), ("user", "more")],
]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.byte_level(tmp_path_factory.mktemp("m"), bos_token="<|im_start|>")


@pytest.fixture(scope="module")
def theirs(model_dir: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(model_dir))


def turns(chat: list[tuple[str, str]]) -> list[ChatMessage]:
    return [ChatMessage(role, content) for role, content in chat]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("prompt", [True, False])
def test_render_equals_transformers(
    model_dir: Path, theirs: Any, name: str, chat: list[tuple[str, str]], prompt: bool
) -> None:
    ours = load_text(model_dir, ModelSettings(chat_template=TEMPLATES[name]))
    wanted = theirs.apply_chat_template(
        [{"role": role, "content": content} for role, content in chat],
        chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=prompt, extra="y",
    )  # fmt: skip
    assert (
        ours.render_chat("m", turns(chat), ChatOptions(add_generation_prompt=prompt, variables={"extra": "y"}))
        == wanted
    )


@pytest.mark.parametrize("name", ["chatml", "trims"])
@pytest.mark.parametrize("start", ["Well, ", "Well"])
def test_render_continues_the_last_message_like_transformers(
    model_dir: Path, theirs: Any, name: str, start: str
) -> None:
    chat = [("user", "hi"), ("assistant", start)]
    ours = load_text(model_dir, ModelSettings(chat_template=TEMPLATES[name]))
    wanted = theirs.apply_chat_template(
        [{"role": role, "content": content} for role, content in chat],
        chat_template=TEMPLATES[name], tokenize=False, continue_final_message=True,
    )  # fmt: skip
    assert ours.render_chat("m", turns(chat), ChatOptions(continue_final=True)) == wanted


def test_render_maps_developer_to_system(model_dir: Path) -> None:
    ours = load_text(model_dir, ModelSettings())
    assert ours.render_chat("m", [ChatMessage("developer", "x")], ChatOptions()).startswith("<|im_start|>system")
    knows = load_text(model_dir, ModelSettings(chat_template="{{ messages[0].role }}{# developer #}"))
    assert knows.render_chat("m", [ChatMessage("developer", "x")], ChatOptions()) == "developer"


@pytest.mark.parametrize("content", [None, "I look."])
def test_render_writes_calls_as_text_for_a_template_without_a_place_for_them(
    model_dir: Path, content: str | None
) -> None:
    calls = [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"city": "Köln", "days": [1, 2]}}},
        {"id": "2", "type": "function", "function": {"name": 'a"b', "arguments": "{cut"}},
    ]
    chat = [ChatMessage("assistant", content, {"tool_calls": calls}), ChatMessage("assistant", None, {})]
    rendered = load_text(model_dir, ModelSettings()).render_chat("m", chat, ChatOptions(add_generation_prompt=False))
    text = '[{"name": "f", "parameters": {"city": "Köln", "days": [1, 2]}}, {"name": "a\\"b", "parameters": {cut}]'
    before = f"{content}\n" if content else ""
    assert rendered == f"<|im_start|>assistant\n{before}{text}<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[7].content }}",
        "{{ 1 / 0 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{% if %}",
        "{{ undefined_thing() }}",
        "{{ 'a' + 1 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_render_raises_invalid_request_if_the_template_fails(model_dir: Path, template: str) -> None:
    ours = load_text(model_dir, ModelSettings(chat_template=template))
    with pytest.raises(InvalidRequest, match="model m: its chat template"):
        ours.render_chat("m", turns(CHATS[0]), ChatOptions())


def test_read_chat_templates_prefers_files(tmp_path: Path) -> None:
    model_dir = tiny.byte_level(tmp_path / "m")
    (model_dir / "chat_template.jinja").write_text("file")
    (model_dir / "additional_chat_templates").mkdir()
    (model_dir / "additional_chat_templates" / "rag.jinja").write_text("rag")
    ours = load_text(model_dir, ModelSettings())
    assert ours.render_chat("m", turns(CHATS[0]), ChatOptions()) == "file"
    assert ours.render_chat("m", turns(CHATS[0]), ChatOptions(template="rag")) == "rag"
    with pytest.raises(InvalidRequest, match="no chat template 'other'"):
        ours.render_chat("m", turns(CHATS[0]), ChatOptions(template="other"))


def test_render_named_and_missing_templates(tmp_path: Path) -> None:
    named = tiny.byte_level(
        tmp_path / "n", chat_template=[{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    )
    assert load_text(named, ModelSettings()).render_chat("m", turns(CHATS[0]), ChatOptions()) == "d"
    none = load_text(tiny.byte_level(tmp_path / "o", chat_template=None), ModelSettings())
    assert not none.has_chat_template
    with pytest.raises(InvalidRequest, match="model m: it has no chat template"):
        none.render_chat("m", turns(CHATS[0]), ChatOptions())


@pytest.mark.parametrize(("bos", "eos"), [(True, True), (True, False), (False, False), (None, None)])
def test_encode_bos_and_eos_like_transformers(tmp_path: Path, bos: bool | None, eos: bool | None) -> None:
    from transformers import PreTrainedTokenizerFast

    rules: dict[str, Any] = {} if bos is None else {"add_bos_token": bos, "add_eos_token": eos}
    path = tiny.sentencepiece(tmp_path / "m", **rules)
    ours, theirs = load_text(path, ModelSettings()), PreTrainedTokenizerFast.from_pretrained(str(path))
    assert ours.encode("the dog") == theirs("the dog")["input_ids"]


def test_encode_tokens_that_only_the_configuration_names(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    path = tiny.byte_level(tmp_path / "m", pad_token="<|pad|>", additional_special_tokens=["<|x|>"], chat_template=None)
    ours, theirs = load_text(path, ModelSettings()), PreTrainedTokenizerFast.from_pretrained(str(path))
    text = "a<|x|>b<|pad|>"
    assert ours.decode(ours.encode(text)) == "ab"
    assert ours.decode(ours.encode(text), skip_special_tokens=False) == text == theirs.decode(theirs(text)["input_ids"])
    assert len(ours.encode(text)) == len(theirs(text)["input_ids"]) == 4


def test_decode_skips_special_tokens_by_transformers_5s_names(tmp_path: Path) -> None:
    more = {
        "extra_special_tokens": ["<|y|>"],
        "model_specific_special_tokens": {"image_token": "<|img|>"},
        "chat_template": "{{ image_token }}",
    }
    ours = load_text(tiny.byte_level(tmp_path / "m", **more), ModelSettings())
    assert ours.decode(ours.encode("a<|y|><|img|>b")) == "ab"
    assert ours.render_chat("m", turns(CHATS[0]), ChatOptions()) == "<|img|>"


def test_load_text_prefers_the_registrations_defaults(tmp_path: Path) -> None:
    path = tiny.byte_level(tmp_path / "m")
    (path / "generation_config.json").write_text(
        json.dumps({"temperature": 0.6, "top_k": 20, "eos_token_id": [1, 2], "top_p": 1})
    )
    found = load_text(path, ModelSettings(sampling=DefaultSampling(top_k=5))).sampling
    assert found == DefaultSampling(temperature=0.6, top_k=5, top_p=1.0)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[1]"])
def test_load_text_names_a_broken_file(model_dir: Path, tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / "m"
    shutil.copytree(model_dir, path)
    (path / name).write_bytes(content)
    with pytest.raises(LoadFailed, match=name):
        load_text(path, ModelSettings())


def test_load_text_names_a_missing_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(LoadFailed, match=r"tokenizer\.json"):
        load_text(tmp_path, ModelSettings())


def test_http_app_import_loads_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, runtime.api.http_app, runtime.api.grpc_services; print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"
