"""Chat templates of unknown authors: none may run endlessly, fill the memory or reach out of the sandbox."""

import pytest

from runtime.errors import InvalidRequest
from runtime.text.chat import ChatMessage, ChatOptions, ChatTemplates
from runtime.text.sandbox import BUDGET

CHAT = [ChatMessage("user", "hello"), ChatMessage("assistant", "yes")]


def rendered(template: str, chat: list[ChatMessage] | None = None) -> str:
    return ChatTemplates({"default": template}, {}).render("m", chat or CHAT, ChatOptions())


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in 'x' * 60000 %}{% for b in 'x' * 60000 %}{{ a }}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{{ 'x' * 10 ** 11 }}",
        "{{ 10 ** 11 * ['x'] }}",
        "{{ '%99999999999d' % 1 }}",
        "{{ 9 ** 999999999 }}",
        "{{ 'x'.ljust(99999999999) }}",
        "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set x %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = x %}{% endfor %}",
        "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = f(ns.x) %}{% endfor %}",
        "{% for i in range(99999) %}{{ 'x' * 100000 }}{% endfor %}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_render_refuses_unbounded_templates(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.text.sandbox._MOST_STEPS", 40_000)
    with pytest.raises(InvalidRequest, match="model m: its chat template"):
        rendered(template)


@pytest.mark.parametrize(
    "template",
    [
        "{% set a = range(99999)|list %}{% for i in range(9999) %}{{ a|sort|length }}{% endfor %}",
        "{% set a = range(99999)|list %}{% for i in [a] recursive %}{{ a|sort|length }}{{ loop(a) if loop.depth == 1 }}{% endfor %}",
    ],
)
def test_render_ends_long_steps_by_the_clock(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.text.sandbox._MOST_S", 0.1)
    with pytest.raises(InvalidRequest, match=r"it takes more than 0\.1 s"):
        rendered(template)


def test_render_allows_recursive_loops() -> None:
    template = "{% for x in [1, [2, 3]] recursive %}{% if x is sequence %}{{ loop(x) }}{% else %}{{ x }}{{ loop.length }}{% endif %}{% endfor %}"
    assert rendered(template) == "122232"


@pytest.mark.no_cover
def test_render_hides_the_budget_from_the_template() -> None:
    names = ("{% set __budget = namespace(step=dict) %}", f"{{% set {BUDGET} = 1 %}}")
    with pytest.raises(InvalidRequest, match="more than 4000000 steps"):
        rendered(names[0] + "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}")
    with pytest.raises(InvalidRequest, match="its chat template"):
        rendered(names[1])


def test_render_tilde_joins_any_values() -> None:
    assert rendered("{% set a = 1 ~ 'b' ~ absent ~ none ~ (2 ~ [3]) %}{{ a ~ '\n' }}") == "1bNone2[3]\n"


def test_render_keeps_loop_variables() -> None:
    template = (
        "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.first }}{{ loop.last }}{{ loop.nextitem is defined }}{% endfor %}"
        "{% for k, v in {'a': 1}.items() if v %}{{ k }}{{ v }}{% else %}none{% endfor %}{% for x in absent %}{% else %}empty{% endfor %}"
    )
    assert rendered(template) == "1/2TrueFalseTrue2/2FalseTrueFalsea1empty"


@pytest.mark.no_cover
def test_render_accepts_a_long_chat() -> None:
    template = "{% for m in messages %}{{ m.role.strip() + ': ' + m['content'].strip() }}\n{% endfor %}"
    assert rendered(template, CHAT * 50_000).count("\n") == 100_000
