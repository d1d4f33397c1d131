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

    The first match is the one that ends first; of those that end together, the one that began first. So the
    cut does not depend on how the text was divided into pushes.
    """

    def __init__(self, strings: StopStrings, *, include_stop: bool = False) -> None:
        """Check against `strings`; `include_stop` lets the matched string itself through, too."""
        self._strings = strings
        self._include = include_stop
        self._state = 0
        self._held = ""
        self.matched: str | None = None
        """The stop string that was found."""

    def push(self, text: str, *, act: bool = True) -> str:
        """Take new text, give back what may be shown. After a match, everything is dropped.

        Args:
            text: what follows the text pushed before.
            act: whether a stop string that ends in this text counts (not before `min_tokens`).
        """
        if self.matched is not None:
            return ""
        pending = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            self._state = self._strings.step(self._state, char)
            self.matched = self._strings.match(self._state) if act else None
            if self.matched is not None:
                self._held = ""
                return pending[: end if self._include else end - len(self.matched)]
        keep = self._strings.held(self._state)
        self._held = pending[len(pending) - keep :]
        return pending[: len(pending) - keep]

    def finish(self) -> str:
        """What was held back, once no more text comes."""
        rest, self._held = self._held, ""
        return rest
