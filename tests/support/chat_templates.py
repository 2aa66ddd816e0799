"""Chat templates that write tools, calls and results as the families' own ones do, in few words."""

from dataclasses import dataclass


@dataclass(frozen=True)
class FamilyTemplate:
    """`opens` and `closes` stand around an assistant's turn. `one_call`: the family writes a call alone."""

    text: str
    opens: str
    closes: str
    one_call: bool = False


def _family(
    call: str,
    *,
    opens: str,
    closes: str,
    head: str = "Tools: ",
    before: str = "",
    between: str = "",
    after: str = "",
    user: str = "<|user|>{{ m.content }}",
    tool: str = "<|result|>{{ m.content }}",
    one_call: bool = False,
) -> FamilyTemplate:
    text = (
        f"{{% if tools %}}{head}{{{{ tools | tojson }}}}{{% endif %}}{{% for m in messages %}}{{% if m.role == 'assistant' %}}{opens}"
        f"{{{{ m.content or '' }}}}{{% for c in m.tool_calls or [] %}}{{% if loop.first %}}{before}{{% else %}}{between}{{% endif %}}{call}"
        f"{{% if loop.last %}}{after}{{% endif %}}{{% endfor %}}{closes}{{% elif m.role == 'tool' %}}{tool}{{% else %}}{user}{{% endif %}}"
        f"{{% endfor %}}{{% if add_generation_prompt %}}{opens}{{% endif %}}"
    )
    return FamilyTemplate(text, opens, closes, one_call)


_CHATML = ("<|im_start|>assistant\n", "<|im_end|>\n")
_JSON = '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
_EACH = "{% for k, v in c.function.arguments | items %}"
_PLAIN = "{{ v | tojson if v is mapping or v is boolean else v | string }}"
_NINE = "{% if c.id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif %}"

FAMILIES = {
    "hermes": _family("<tool_call>\n" + _JSON + "\n</tool_call>", between="\n", opens=_CHATML[0],
        closes=_CHATML[1]),
    "qwen_xml": _family(
        "<tool_call>\n<function={{ c.function.name }}>\n" + _EACH + "<parameter={{ k }}>\n" + _PLAIN + "\n</parameter>\n{% endfor %}</function>\n</tool_call>",
        between="\n",
        opens=_CHATML[0],
        closes=_CHATML[1],
    ),
    "glm": _family(
        "\n<tool_call>{{ c.function.name }}\n" + _EACH + "<arg_key>{{ k }}</arg_key>\n<arg_value>" + _PLAIN + "</arg_value>\n{% endfor %}</tool_call>",
        opens="<|assistant|>",
        closes="",
    ),
    "llama_json": _family(
        '{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}',
        opens="<|start_header_id|>assistant<|end_header_id|>\n\n",
        closes="<|eot_id|>",
        head="Answer with the name and parameters of a function: ",
        one_call=True,
    ),
    "llama_python": _family(
        "{{ c.function.name }}(" + _EACH + "{{ k }}={{ v | tojson }}{% if not loop.last %}, {% endif %}{% endfor %})",
        opens="<|header_start|>assistant<|header_end|>\n\n",
        closes="<|eot|>",
        before="[",
        between=", ",
        after="]",
    ),
    "mistral": _family(
        "[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}",
        opens="[/INST]",
        closes="</s>",
        user="[INST]{{ m.content }}",
    ),
    "mistral_list": _family(
        _NINE + '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}',
        opens="[/INST]",
        closes="</s>",
        before="[TOOL_CALLS] [",
        between=", ",
        after="]",
        user="[INST]{{ m.content }}",
    ),
    # The arguments are added to a string, so that an object fails.
    "deepseek": _family(
        "{{ '<｜tool▁call▁begin｜>' + c.function.name + '<｜tool▁sep｜>' + c.function.arguments + '<｜tool▁call▁end｜>' }}",
        after="<｜tool▁calls▁end｜>",
        opens="<｜Assistant｜>",
        before="<｜tool▁calls▁begin｜>",
        closes="<｜end▁of▁sentence｜>",
    ),
    "deepseek_r1": _family(
        "{{ '<｜tool▁call▁begin｜>' + c.type + '<｜tool▁sep｜>' + c.function.name + '\\n```json\\n' + c.function.arguments + '\\n```<｜tool▁call▁end｜>' }}",
        between="\n",
        after="<｜tool▁calls▁end｜>",
        opens="<｜Assistant｜>",
        before="<｜tool▁calls▁begin｜>",
        closes="<｜end▁of▁sentence｜>",
    ),
    "granite": _family(
        _JSON,
        opens="<|start_of_role|>assistant<|end_of_role|>",
        closes="<|end_of_text|>\n",
        before="<|tool_call|>[",
        between=", ",
        after="]",
    ),
    # An object would be written in Python's notation.
    "phi": _family(
        '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments }}}',
        opens="<|assistant|>",
        closes="<|end|>",
        before="<|tool_call|>[",
        between=", ",
        after="]<|/tool_call|>",
    ),
    "kimi": _family(
        "{% if not c.id.startswith('functions') %}{{ raise_exception('ids name the function') }}{% endif %}"
        "<|tool_call_begin|>{{ c.id }}<|tool_call_argument_begin|>{{ c.function.arguments | tojson }}<|tool_call_end|>",
        opens="<|im_assistant|>assistant<|im_middle|>",
        closes="<|im_end|>",
        before="<|tool_calls_section_begin|>",
        after="<|tool_calls_section_end|>",
    ),
    "gemma": _family(
        "<|tool_call>call:{{ c.function.name }}{{ '{' }}" + _EACH + '{{ k }}:{% if v is string %}<|"|>{{ v }}<|"|>{% else %}{{ v | tojson }}{% endif %}'
        "{% if not loop.last %},{% endif %}{% endfor %}{{ '}' }}<tool_call|>",
        opens="<|turn>model\n",
        closes="<turn|>\n",
    ),
    "harmony": _family(
        " to=functions.{{ c.function.name }}<|channel|>commentary json<|message|>{{ c.function.arguments | tojson }}<|call|>",
        opens="<|start|>assistant",
        closes="",
        one_call=True,
    ),
}  # fmt: skip
