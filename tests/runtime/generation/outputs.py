"""What models of each family write: reasoning, an answer and tool calls in the family's published format."""

from dataclasses import dataclass
from typing import Any

from runtime.text import output_format as formats
from runtime.text.output_format import OutputFormat

TOOLS: dict[str, dict[str, Any]] = {
    "weather": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "exact": {"type": "boolean"}},
    },
    "now": {"type": "object", "properties": {}},
}
PARIS = {"city": 'Paris "}]\n— 東京', "days": 3, "exact": True}


@dataclass(frozen=True)
class Written:
    format: OutputFormat
    text: str
    calls: tuple[tuple[str, dict[str, Any]], ...] = (("weather", PARIS), ("now", {}))
    answer: str = ""
    reasoning: str = ""


_JSON = r'{"city": "Paris \"}]\n— 東京", "days": 3, "exact": true}'
_R1_CALL = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>%s\n```json\n%s\n```<｜tool▁call▁end｜>"
_KIMI_CALL = "<|tool_call_begin|>functions.%s:%d<|tool_call_argument_begin|>%s<|tool_call_end|>"

OUTPUTS = {
    "hermes": Written(
        formats.HERMES,
        '<think>\nHm, <tool_call>?\n</think>\n\nI look.\n<tool_call>\n{"name": "weather", "arguments": JSON}\n</tool_call>\n'
        '<tool_call>{"arguments": "{}", "name": "now"}</tool_call>'.replace("JSON", _JSON),
        answer="I look.",
        reasoning="Hm, <tool_call>?",
    ),
    "qwen_xml": Written(
        formats.QWEN_XML,
        '\n\n<tool_call>\n<function=weather>\n<parameter=city>\nParis "}]\n— 東京\n</parameter>\n<parameter=days>\n3\n</parameter>\n'
        "<parameter=exact>\nTrue\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
    ),
    "glm": Written(
        formats.GLM,
        '<think>a</think>\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris "}]\n— 東京</arg_value>\n'
        "<arg_key>days</arg_key><arg_value>3</arg_value><arg_key>exact</arg_key><arg_value>true</arg_value></tool_call>"
        "<tool_call>now</tool_call><|observation|>",
        reasoning="a",
    ),
    "llama_json": Written(
        formats.LLAMA_JSON,
        '<|python_tag|>{"name": "weather", "parameters": JSON}'.replace("JSON", _JSON),
        (("weather", PARIS),),
    ),
    "llama_python": Written(
        formats.LLAMA_PYTHON, "[weather(city='Paris \"}]\\n— 東京', days=3, exact=True), now()]<|python_end|>"
    ),
    "mistral_list": Written(
        formats.MISTRAL,
        'So:[TOOL_CALLS][{"name": "weather", "arguments": JSON}, {"name": "now", "arguments": {}}]'.replace(
            "JSON", _JSON
        ),
        answer="So:",
    ),
    "mistral_args": Written(
        formats.MISTRAL,
        "[THINK]b[/THINK]So: [TOOL_CALLS]weather[ARGS]JSON[TOOL_CALLS]now[CALL_ID]123456789[ARGS]{}".replace(
            "JSON", _JSON
        ),
        answer="So:",
        reasoning="b",
    ),
    "deepseek": Written(
        formats.DEEPSEEK,
        "Yes.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>JSON<｜tool▁call▁end｜>"
        "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>".replace("JSON", _JSON),
        answer="Yes.",
    ),
    "deepseek_r1": Written(
        formats.DEEPSEEK_R1,
        f"<｜tool▁calls▁begin｜>{_R1_CALL % ('weather', _JSON)}\n{_R1_CALL % ('now', '{}')}<｜tool▁calls▁end｜>",
    ),
    "granite": Written(
        formats.GRANITE,
        '<|tool_call|>[{"name": "weather", "arguments": JSON}, {"name": "now", "arguments": {}}]'.replace(
            "JSON", _JSON
        ),
    ),
    "phi": Written(
        formats.PHI,
        '<|tool_call|>[{"name": "weather", "arguments": JSON}, {"name": "now", "arguments": {}}]<|/tool_call|>'.replace(
            "JSON", _JSON
        ),
    ),
    "phi_functools": Written(
        formats.PHI, 'functools[{"name": "weather", "arguments": JSON}]'.replace("JSON", _JSON), (("weather", PARIS),)
    ),
    "kimi": Written(
        formats.KIMI,
        f"Look: <|tool_calls_section_begin|>{_KIMI_CALL % ('weather', 0, _JSON)}{_KIMI_CALL % ('now', 1, '{}')}"
        "<|tool_calls_section_end|>",
        answer="Look:",
    ),
    "gemma": Written(
        formats.GEMMA,
        '<|channel>thought\nc\n<channel|><|tool_call>call:weather{city:<|"|>Paris "}]\n— 東京<|"|>,days:3,exact:true}<tool_call|>'
        "<|tool_call>call:now{}<tool_call|>",
        reasoning="c",
    ),
    "harmony": Written(
        formats.HARMONY,
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|> Now.<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>JSON<|call|>"
        "<|start|>assistant to=functions.now<|channel|>commentary json<|message|>{}<|call|>".replace("JSON", _JSON),
        answer="I look.",
        reasoning="Hm.Now.",
    ),
    "harmony_final": Written(
        formats.HARMONY,
        '<|channel|>final <|constrain|>json<|message|>{"a": 1}<|return|>',
        (),
        answer='{"a": 1}',
    ),
}
