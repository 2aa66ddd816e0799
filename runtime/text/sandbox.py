"""Provides the Jinja environment for a checkpoint's chat templates: transformers' filters and helpers, with bounds on time and memory.

A template is code from the checkpoint's author. Jinja's sandbox keeps it away from Python objects, but bounds neither its time nor its
memory. So each iteration of a loop and each call is counted and timed, and operators that make large texts from small ones are bounded. Single
filters and methods (`join`, `replace`, the text of nested lists) are not. docs/decisions/0002-template-sandbox.md has the alternatives.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

BUDGET = "the render's budget"  # the variable's name, which no template can set
_COUNTED, _JOINED = "__counted", "__joined"
_MOST_STEPS = 4_000_000  # a chat of 100,000 turns takes a quarter of it; some seconds
_CALL_STEPS = 4
_MOST_S = 30.0  # a step may sort a long list
_MOST_CHARACTERS = 64 * 1024 * 1024
_MOST_DIGITS = 4_000


class Budget:
    """The steps and the time that one render has left. Raises jinja2.TemplateError when they are used up."""

    def __init__(self) -> None:
        self._left = _MOST_STEPS
        self._ends_s = time.monotonic() + _MOST_S

    def step(self, count: int = 1) -> None:
        self._left -= count
        if self._left < 0:
            raise jinja2.TemplateRuntimeError(f"it takes more than {_MOST_STEPS} steps")
        if time.monotonic() > self._ends_s:
            raise jinja2.TemplateRuntimeError(f"it takes more than {_MOST_S:g} s")


def _bounded(pieces: Iterable[str]) -> str:
    parts = list(pieces)
    if sum(map(len, parts)) > _MOST_CHARACTERS:
        raise jinja2.TemplateRuntimeError(f"it builds a text of more than {_MOST_CHARACTERS} characters")
    return "".join(parts)


class Sandbox(ImmutableSandboxedEnvironment):
    """Every render needs a Budget as the variable BUDGET."""

    intercepted_binops = frozenset({"*", "**", "%", "+"})
    concat = staticmethod(_bounded)  # joins the output of a macro, and of a block that is set or filtered

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationBlock, jinja2.ext.loopcontrols],
            keep_trailing_newline=False,
        )
        self.filters["tojson"] = _to_json
        self.filters[_COUNTED] = _counted
        self.filters[_JOINED] = _joined
        del self.globals["lipsum"]
        helpers: dict[str, Callable[..., Any]] = {"raise_exception": _raise, "strftime_now": _strftime_now}
        self.globals.update(helpers)

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(jinja2.nodes.For):
            loop.iter = jinja2.nodes.Filter(loop.iter, _COUNTED, [], [], None, None, lineno=loop.lineno)
        for tilde in tree.find_all(jinja2.nodes.Concat):
            operands = jinja2.nodes.List(tilde.nodes, lineno=tilde.lineno)
            tilde.nodes = [jinja2.nodes.Filter(operands, _JOINED, [], [], None, None, lineno=tilde.lineno)]
        return tree

    def call(self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __context[BUDGET].step(_CALL_STEPS)
        if isinstance(__obj, LoopContext) and args:  # of a recursive loop
            args = (_counted(__context, args[0]), *args[1:])
        for value in args:
            if isinstance(value, int) and value > _MOST_CHARACTERS:  # widths
                raise jinja2.TemplateRuntimeError(f"a call has the argument {value}, more than {_MOST_CHARACTERS}")
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str) and any(len(digits) > 5 for digits in _numbers(left)):
            raise jinja2.TemplateRuntimeError("it formats a value with a width of more than 5 digits")
        if (
            operator == "**"
            and isinstance(left, int)
            and isinstance(right, int)
            and left.bit_length() * abs(right) > 4 * _MOST_DIGITS
        ):
            raise jinja2.TemplateRuntimeError(f"it computes a number of more than {_MOST_DIGITS} digits")
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if (
                    isinstance(one, str | bytes | list | tuple)
                    and isinstance(other, int)
                    and len(one) * other > _MOST_CHARACTERS
                ):
                    raise jinja2.TemplateRuntimeError(f"it builds a text of more than {_MOST_CHARACTERS} characters")
        if (
            operator == "+"
            and isinstance(left, str | list)
            and isinstance(right, str | list)
            and len(left) + len(right) > _MOST_CHARACTERS
        ):
            raise jinja2.TemplateRuntimeError(f"it builds a text of more than {_MOST_CHARACTERS} characters")
        return super().call_binop(context, operator, left, right)


def render(template: jinja2.Template, variables: dict[str, Any]) -> str:
    """Return the rendered text. Raises jinja2.TemplateError, and any error of the template's own arithmetic."""
    pieces: list[str] = []
    length = 0
    for piece in template.generate(**variables, **{BUDGET: Budget()}):
        pieces.append(piece)
        length += len(piece)
        if length > _MOST_CHARACTERS:
            raise jinja2.TemplateRuntimeError(f"its output has more than {_MOST_CHARACTERS} characters")
    return "".join(pieces)


class _Counted:
    """The values of a loop. Each iteration takes a step from the budget."""

    def __init__(self, values: Any, budget: Budget) -> None:
        self._values = values
        self._budget = budget

    def __iter__(self) -> Iterator[Any]:
        for value in self._values:
            self._budget.step()
            yield value

    def __len__(self) -> int:
        return len(self._values)


@jinja2.pass_context
def _counted(context: Context, values: Any) -> _Counted:
    return _Counted(values, context[BUDGET])


def _joined(values: list[Any]) -> str:
    return _bounded(map(str, values))


class _GenerationBlock(jinja2.ext.Extension):
    """Renders the content of `{% generation %}`, which marks the assistant's part for training."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's interface)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _numbers(pattern: str) -> list[str]:
    return "".join(char if char.isdigit() else " " for char in pattern).split()


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Encode JSON without escaping HTML as Jinja's own filter does: models were not trained on that."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
