"""`/set` and `/show` of a conversation: what they change, and what they refuse."""

import pytest

from mesh.cli.chat_settings import ChatSettings, describe, number, with_command
from mesh.errors import InvalidRequest


def test_set_changes_one_parameter_and_keeps_the_others() -> None:
    settings = with_command(ChatSettings(parameters={"seed": 7}), "temperature 0.5")
    assert settings.parameters == {"seed": 7, "temperature": 0.5}
    assert with_command(settings, "parameter top_k 20").parameters == {"seed": 7, "temperature": 0.5, "top_k": 20}


def test_set_system_takes_the_rest_of_the_line() -> None:
    settings = with_command(ChatSettings(), 'system "Answer in French."')
    assert settings.opening() == [{"role": "system", "content": "Answer in French."}]
    assert with_command(settings, "system").opening() == []


def test_set_verbose_and_quiet_switch_the_statistics() -> None:
    verbose = with_command(ChatSettings(), "verbose")
    assert (verbose.verbose, with_command(verbose, "quiet").verbose) == (True, False)


@pytest.mark.parametrize(
    "words", ["", "temperature", "temperature warm", "colour 3", "top_k 1.5", "seed true", "verbose 3"]
)
def test_set_refuses_what_sets_nothing(words: str) -> None:
    with pytest.raises(InvalidRequest, match=r"expected|unknown"):
        with_command(ChatSettings(), words)


def test_number_refuses_an_unknown_parameter() -> None:
    with pytest.raises(InvalidRequest, match="'heat' is unknown; known: temperature"):
        number("heat", "1")


def test_describe_shows_the_system_prompt_and_the_parameters() -> None:
    assert describe(ChatSettings("Be brief.", {"top_p": 0.9})) == "system  Be brief.\ntop_p  0.9"
    assert describe(ChatSettings()).startswith("system  (none)\nparameters  those of the registration")
