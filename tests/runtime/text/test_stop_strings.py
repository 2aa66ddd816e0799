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
def test_scanner_ends_at_the_first_match(text: str, stops: list[str], include: bool) -> None:
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
def test_scanner_hides_only_the_stop_string(data: st.DataObject, stops: list[str], include: bool) -> None:
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
def test_scanner_holds_the_longest_beginning_of_a_stop(parts: list[str], stops: list[str]) -> None:
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


def test_scanner_memory_with_long_stops() -> None:
    """A request may bring 64 of 256 characters for each of 2048 sequences."""
    stops = [f"{number:02}" * 128 for number in range(64)]
    tracemalloc.start()
    scanner = StopScanner(stops)
    assert scanner.push("17" * 100).text == ""
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 10_000


def test_scanner_with_included_stops_holds_nothing() -> None:
    scanner = StopScanner(["END"], include=True)
    assert [scanner.push(part).text for part in ("a E", "N", "Dx")] == ["a E", "N", "D"]


def test_scanner_by_list_prefers_the_first_string_at_its_last_position() -> None:
    assert StopScanner(["b", "a"], by_list=True).push("xaybz") == StopScanner(["b"]).push("xaybz")
    assert StopScanner(["b"], by_list=True, include=True).push("abcbd").text == "abcb"
    assert StopScanner(["b", "a"]).push("xaybz").stop == "a"


def test_scanner_without_check_never_ends() -> None:
    scanner = StopScanner(["END"])
    assert scanner.push("END E", check=False).text == "END "
    assert scanner.push("N").text == ""
    match = scanner.push("D")
    assert (match.text, match.stop) == ("", "END")
    longer = StopScanner(["END", "something longer"], include=True)
    assert longer.push("END ", check=False).stop is None
    assert longer.push("x").stop is None
