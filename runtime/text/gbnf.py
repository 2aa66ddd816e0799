"""Translates GBNF, llama.cpp's notation of grammars (`root ::= …`), to Lark."""

from runtime.errors import InvalidRequest, NotSupported

MAX_CHARS = 65_536  # the translation is Python, and its time grows with the square of a rule's length


def gbnf_to_lark(text: str) -> str:
    """Return the grammar in Lark. Raises InvalidRequest with the place of a syntax error."""
    if len(text) > MAX_CHARS:
        raise InvalidRequest(
            f"the grammar has {len(text)} characters; the limit is {MAX_CHARS}", limit=MAX_CHARS, value=len(text)
        )
    try:
        from llguidance.gbnf_to_lark import gbnf_to_lark as translate
    except ImportError as error:
        raise NotSupported("grammars need the package llguidance, which is not installed here") from error
    try:
        return str(translate(text))
    except RecursionError as error:
        raise InvalidRequest("the grammar is nested too deeply") from error
    except Exception as error:  # the library raises bare Exception for an unknown rule
        raise InvalidRequest(f"the grammar has a syntax error: {error}") from error
