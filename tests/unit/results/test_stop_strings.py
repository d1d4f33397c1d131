import time

from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.results.stop_strings import StopChecker, StopStrings

letters = st.text(alphabet="abc", max_size=30)
stop_lists = st.lists(st.text(alphabet="abc", min_size=1, max_size=5), min_size=1, max_size=4)


def first_match(text, stops, after=0):
    """Return the match by definition: the occurrence that ends first after `after`; of those, the first to begin."""
    ends = [
        (at + len(stop), at)
        for stop in stops
        for at in range(len(text))
        if text.startswith(stop, at) and at + len(stop) > after
    ]
    return min(ends, default=None)


@given(text=letters, stops=stop_lists, cut=st.integers(0, 30), include=st.booleans())
def test_cut_equals_the_definition_however_the_text_is_divided(text, stops, cut, include):
    for pieces in ([text], list(text), [text[:cut], text[cut:]]):
        checker = StopChecker(StopStrings(stops), include_stop=include)
        shown = "".join(checker.push(piece) for piece in pieces) + checker.finish()
        match = first_match(text, stops)
        assert shown == (text if match is None else text[: match[0] if include else match[1]])
        assert checker.matched == (None if match is None else text[match[1] : match[0]])


@given(text=letters, stops=stop_lists, after=st.integers(0, 30))
def test_matches_that_end_in_text_not_acted_on_do_not_count(text, stops, after):
    checker = StopChecker(StopStrings(stops))
    shown = checker.push(text[:after], act=False) + checker.push(text[after:]) + checker.finish()
    match = first_match(text, stops, after)
    # No match can begin in text already shown, since that text would have been held back.
    assert shown == (text if match is None else text[: match[1]])


@given(text=letters, stops=stop_lists)
def test_no_more_is_held_back_than_may_become_a_stop_string(text, stops):
    checker, shown = StopChecker(StopStrings(stops)), ""
    for end, char in enumerate(text, start=1):
        shown += checker.push(char)
        if checker.matched is not None:
            return
        held = text[len(shown) : end]
        starts = {stop[:length] for stop in stops for length in range(len(stop))}
        assert held == max((start for start in starts if text[:end].endswith(start)), key=len)


def test_nothing_comes_after_a_match():
    checker = StopChecker(StopStrings(["b"]))
    assert checker.push("abc") == "a"
    assert checker.push("def") == checker.finish() == ""


def test_the_largest_allowed_set_of_strings_is_cheap():
    start = time.perf_counter()
    checker = StopChecker(StopStrings(["a" * 1000 + f"{i:02d}" for i in range(64)]))
    assert checker.push("a" * 100_000) == "a" * 99_000
    assert time.perf_counter() - start < 60
