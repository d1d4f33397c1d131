"""Stop-string matching on streamed text; text that may become part of a stop string is held back."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Stop strings as an Aho-Corasick automaton (Aho and Corasick, 1975): constant time per character.

    States are the prefixes of the strings; state 0 is the empty prefix. After some text, the state is the longest
    suffix of the text that begins a stop string, which is the text to hold back. Immutable; shared by all samples of a
    request.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        """Build the automaton, in time and memory linear in the characters of `strings`; no string may be empty."""
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
        """Compute failure links breadth-first: the link of a state is its longest proper suffix that is a state."""
        queue = list(self._next[0].values())
        for state in queue:
            for char, child in self._next[state].items():
                queue.append(child)
                self._fail[child] = self.step(self._fail[state], char)
                # Of the strings that end here, the longest (which began first) wins.
                if self._match[child] is None:
                    self._match[child] = self._match[self._fail[child]]
        self._order = queue

    def _hold_lengths(self, depth: list[int]) -> list[int]:
        """Return the characters to hold back in each state.

        A state without successors (a complete stop string that was not acted on) holds back what its failure link does.
        """
        held = [0] * len(depth)
        for state in self._order:
            held[state] = depth[state] if self._next[state] else held[self._fail[state]]
        return held

    def step(self, state: int, char: str) -> int:
        """Return the state after one more character."""
        while state and char not in self._next[state]:
            state = self._fail[state]
        return self._next[state].get(char, 0)

    def match(self, state: int) -> str | None:
        """Return the longest stop string that ends in this state; None if none does."""
        return self._match[state]

    def held(self, state: int) -> int:
        """Return how many characters at the end of the text may still become part of a stop string."""
        return self._held[state]


class StopChecker:
    """Filter that passes the text of one sequence up to its first stop string, holding back possible matches.

    The text may have hidden parts: special tokens that are left out of the shown text. Stop strings are matched both in
    the text with hidden parts, like transformers' `stop_strings`, and in the shown text alone, like vLLM's `stop`.

    The first match is the one that ends first; of matches that end together, the one that began first. The cut
    therefore does not depend on how the text is divided into pushes.
    """

    def __init__(self, strings: StopStrings, *, include_stop: bool = False) -> None:
        """Start with no text; `include_stop`: whether the output includes the matched stop string."""
        self._strings = strings
        self._include = include_stop
        self._whole = self._shown = 0
        """Automaton states after the whole text and after the shown text."""
        self._held: list[str] = []
        """Held-back characters at the end of the text; a hidden character is an empty string."""
        self.matched: str | None = None
        """Matched stop string; None before a match."""

    def push(self, text: str, *, act: bool = True, hidden: bool = False) -> str:
        """Append text and return the text that can be shown; after a match, all text is dropped.

        Args:
            text: text that follows the text pushed before.
            act: whether stop strings that end in this text count (False before `min_tokens`).
            hidden: whether this text is left out of the shown text.
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
        return self._release(min(len(self._held) - whole, self._start_of_shown(shown)))

    def finish(self) -> str:
        """Return the held-back text at the end of the sequence."""
        return self._release(len(self._held))

    def _end(self, whole: str | None, shown: str | None) -> str:
        """Cut the text at the matched stop string: of the matches `whole` and `shown`, the one that began first."""
        starts = {}
        if shown is not None:
            starts[self._start_of_shown(len(shown))] = shown
        if whole is not None:
            starts[len(self._held) - len(whole)] = whole
        self.matched = starts[min(starts)]
        text = self._release(min(starts))
        self._held.clear()
        return text + self.matched if self._include else text

    def _start_of_shown(self, count: int) -> int:
        """Return the index in the held-back characters at which the last `count` shown characters begin."""
        at = len(self._held)
        while count > 0:
            at -= 1
            count -= len(self._held[at])
        return at

    def _release(self, count: int) -> str:
        """Release the first `count` held-back characters."""
        text = "".join(self._held[:count])
        del self._held[:count]
        return text
