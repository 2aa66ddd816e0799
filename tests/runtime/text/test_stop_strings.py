"""Stop strings across parts, against a search in the whole text; and text is held no longer than needed."""

import tracemalloc

from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.text.stop_strings import StopScanner

LETTERS = st.text(alphabet="abc", max_size=30)
STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=3)


def run(parts: list[str], stops: list[str], *, include: bool) -> tuple[list[str], str | None]:
    scanner = StopScanner(stops, include=include)
    shown: list[str] = []
    for part in parts:
        match = scanner.push(part)
        shown.append(match.text)
        if match.stop is not None:
            return shown, match.stop
    return [*shown, scanner.flush()], None


@settings(deadline=None)
@given(text=LETTERS, stops=STOPS, include=st.booleans())
def test_letter_by_letter_the_first_match_ends_the_text(text: str, stops: list[str], include: bool) -> None:
    shown, stop = run(list(text), stops, include=include)
    ends = [(text.find(each) + len(each), each) for each in stops if each in text]
    if not ends:
        assert (stop, "".join(shown)) == (None, text)
        return
    end = min(ends)[0]
    assert stop in stops
    assert text[:end].endswith(stop or "?")
    longest = max((each for position, each in ends if position == end), key=len)
    assert stop == longest, "of matches that end together the one that starts first wins"
    assert "".join(shown) == (text[:end] if include else text[: end - len(longest)])


@settings(deadline=None)
@given(data=st.data(), stops=STOPS, include=st.booleans())
def test_nothing_of_an_excluded_stop_shows_and_nothing_else_is_lost(
    data: st.DataObject, stops: list[str], include: bool
) -> None:
    parts = data.draw(st.lists(LETTERS, max_size=8))
    text = "".join(parts)
    shown, stop = run(parts, stops, include=include)
    assert text.startswith("".join(shown))
    if stop is None:
        assert "".join(shown) == text
        assert not any(each in text for each in stops)
    elif include:
        assert "".join(shown).endswith(stop)
    else:
        assert text.startswith("".join(shown) + stop)


@settings(deadline=None)
@given(parts=st.lists(LETTERS, max_size=8), stops=STOPS)
def test_held_text_is_the_longest_beginning_of_a_stop(parts: list[str], stops: list[str]) -> None:
    scanner = StopScanner(stops)
    seen, shown = "", ""
    for part in parts:
        match = scanner.push(part)
        seen, shown = seen + part, shown + match.text
        if match.stop is not None:
            return
        held = seen[len(shown) :]
        beginnings = [each[:size] for each in stops for size in range(1, len(each)) if seen.endswith(each[:size])]
        assert held == max(beginnings, key=len, default="")


def test_long_stops_cost_little_memory() -> None:
    """A request may bring 64 of 256 characters for each of 2048 sequences."""
    stops = [f"{number:02}" * 128 for number in range(64)]
    tracemalloc.start()
    scanner = StopScanner(stops)
    assert scanner.push("17" * 100).text == ""
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 10_000


def test_included_stops_hold_nothing() -> None:
    scanner = StopScanner(["END"], include=True)
    assert [scanner.push(part).text for part in ("a E", "N", "Dx")] == ["a E", "N", "D"]


def test_by_list_the_first_string_wins_at_its_last_place() -> None:
    assert StopScanner(["b", "a"], by_list=True).push("xaybz") == StopScanner(["b"]).push("xaybz")
    assert StopScanner(["b"], by_list=True, include=True).push("abcbd").text == "abcb"
    assert StopScanner(["b", "a"]).push("xaybz").stop == "a"


def test_before_the_least_length_nothing_ends_and_older_text_is_not_looked_at_again() -> None:
    scanner = StopScanner(["END"])
    assert scanner.push("END E", check=False).text == "END "
    assert scanner.push("N").text == ""
    match = scanner.push("D")
    assert (match.text, match.stop) == ("", "END")
    longer = StopScanner(["END", "something longer"], include=True)
    assert longer.push("END ", check=False).stop is None
    assert longer.push("x").stop is None
