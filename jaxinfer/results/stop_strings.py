"""Stop strings, found while text streams: nothing that may become one is let out before it is decided."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Stop strings as an Aho-Corasick automaton (Aho and Corasick, 1975): constant time a character.

    States are the prefixes of the strings, 0 the empty one. After some text, the state is the longest suffix
    of the text that begins a stop string: exactly what must be held back. Immutable; shared by all samples of
    a request.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        """Build it in time and memory proportional to the characters of `strings`; none may be empty."""
        self._next: list[dict[str, int]] = [{}]
        self._match: list[str | None] = [None]
        depth = [0]
        for string in strings:
            state = 0
            for char in string:
                if char not in self._next[state]:
                    self._next[state][char] = len(self._next)
                    self._next.append({})
                    self._match.append(None)
                    depth.append(depth[state] + 1)
                state = self._next[state][char]
            self._match[state] = string
        self._fail = [0] * len(self._next)
        self._link()
        self._held = self._hold_lengths(depth)

    def _link(self) -> None:
        """Breadth first: a state's failure is the longest proper suffix of it that is a state, too."""
        queue = list(self._next[0].values())
        for state in queue:
            for char, child in self._next[state].items():
                queue.append(child)
                self._fail[child] = self.step(self._fail[state], char)
                # The longest string that ends here wins: the one that began first.
                if self._match[child] is None:
                    self._match[child] = self._match[self._fail[child]]
        self._order = queue

    def _hold_lengths(self, depth: list[int]) -> list[int]:
        """A state that nothing continues (a whole stop string, not acted on) holds what its failure does."""
        held = [0] * len(depth)
        for state in self._order:
            held[state] = depth[state] if self._next[state] else held[self._fail[state]]
        return held

    def step(self, state: int, char: str) -> int:
        """The state after one more character."""
        while state and char not in self._next[state]:
            state = self._fail[state]
        return self._next[state].get(char, 0)

    def match(self, state: int) -> str | None:
        """The longest stop string that ends in this state."""
        return self._match[state]

    def held(self, state: int) -> int:
        """Characters at the end of the text that may still become part of a stop string."""
        return self._held[state]


class StopChecker:
    """Lets the text of one sequence through up to its first stop string, holding back what may become one.

    The text may have hidden parts: special tokens that are left out of what is shown. A stop string is found both in
    the text with its hidden parts, as transformers' `stop_strings` are, and in the shown text alone, as vLLM's `stop`.

    The first match is the one that ends first; of those that end together, the one that began first. So the
    cut does not depend on how the text was divided into pushes.
    """

    def __init__(self, strings: StopStrings, *, include_stop: bool = False) -> None:
        """Check against `strings`; `include_stop` lets the matched string itself through, too."""
        self._strings = strings
        self._include = include_stop
        self._whole = self._shown = 0
        """States after all text, and after the shown text."""
        self._held: list[str] = []
        """The characters at the end of the text that are held back; a hidden one is an empty string."""
        self.matched: str | None = None
        """The stop string that was found."""

    def push(self, text: str, *, act: bool = True, hidden: bool = False) -> str:
        """Take new text and return what may be shown. After a match, everything is dropped.

        Args:
            text: what follows the text pushed before.
            act: whether a stop string that ends in this text counts (not before `min_tokens`).
            hidden: whether the text is left out of what is shown.
        """
        if self.matched is not None:
            return ""
        strings = self._strings
        for char in text:
            self._held.append("" if hidden else char)
            same = self._whole == self._shown
            self._whole = strings.step(self._whole, char)
            if not hidden:
                self._shown = self._whole if same else strings.step(self._shown, char)
            if act:
                whole, shown = strings.match(self._whole), None if hidden else strings.match(self._shown)
                if whole is not None or shown is not None:
                    return self._end(whole, shown)
        whole, shown = strings.held(self._whole), strings.held(self._shown)
        return self._let(min(len(self._held) - whole, self._start_of_shown(shown)))

    def finish(self) -> str:
        """Return what was held back, once no more text comes."""
        return self._let(len(self._held))

    def _end(self, whole: str | None, shown: str | None) -> str:
        """Cut the text before the stop string that ends with it: of the two found, the one that began first."""
        starts = {}
        if shown is not None:
            starts[self._start_of_shown(len(shown))] = shown
        if whole is not None:
            starts[len(self._held) - len(whole)] = whole
        self.matched = starts[min(starts)]
        text = self._let(min(starts))
        self._held.clear()
        return text + self.matched if self._include else text

    def _start_of_shown(self, count: int) -> int:
        """The place among the held characters where the last `count` shown ones begin."""
        at = len(self._held)
        while count > 0:
            at -= 1
            count -= len(self._held[at])
        return at

    def _let(self, count: int) -> str:
        """Let the first held characters through."""
        text = "".join(self._held[:count])
        del self._held[:count]
        return text
