"""Compiled grammars and the state of a sequence in one, by llguidance."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future
from typing import Any, TypeVar

import numpy as np

STACK_BYTES = 256 << 20
"""Stack of a thread that compiles: llguidance recurses over rules, and a process whose stack overflows dies. Only
pages of it that are used take memory."""
LIMITS = {
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
    "max_lexer_states": 50_000,
    "verbose_errors": False,
}
"""Limits of computing one mask (about 10 ms; most take 0.1 ms) and of one grammar's lexer (about 100 MB). llguidance's
limits of grammar size keep their defaults."""
MAX_REASON = 200
"""Maximum number of characters of a reason in an error."""

_T = TypeVar("_T")
_lock = threading.Lock()


def with_large_stack(function: Callable[..., _T], *arguments: Any) -> _T:
    """Call a function on a new thread with a stack of `STACK_BYTES`, and wait for it."""
    result: Future[_T] = Future()

    def run() -> None:
        try:
            result.set_result(function(*arguments))
        except BaseException as error:
            result.set_exception(error)

    thread = threading.Thread(target=run, name="jaxinfer grammar", daemon=True)
    with _lock:  # the size is that of all threads started meanwhile
        before = threading.stack_size(STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(before)
    return result.result()


class Grammar:
    """A compiled grammar, shared by the sequences that must match it.

    Matchers of one grammar share a lexer of llguidance, which caches its states, so that later sequences reuse them.
    When its limit of states is reached, the next sequence starts a new lexer, which replaces it.

    Args:
        tokenizer: llguidance's tokenizer of the model.
        source: grammar in llguidance's own form.

    Raises:
        ValueError: the grammar is invalid or too large, or nothing can satisfy it; the message is the reason.
    """

    def __init__(self, tokenizer: Any, source: str):
        self._tokenizer, self._source = tokenizer, source
        self.end_ids = frozenset(tokenizer.eos_tokens)
        """Token ids by which llguidance's masks say that the output may end."""
        self.mask_words = -(-tokenizer.vocab_size // 32)
        """Number of 32-bit words of a mask."""
        self.generation = 0
        """Number of times that the lexer was made again."""
        self.uses = 0
        """Number of sequences that have used the present lexer."""
        self._first = with_large_stack(self._compile)

    def _compile(self) -> Any:
        from llguidance import LLMatcher, LLParserLimits

        made = LLMatcher(self._tokenizer, self._source, log_level=0, limits=LLParserLimits(**LIMITS))
        if not made.is_error():
            made.compute_bitmask()  # the first mask takes much longer than the others
        if made.is_error():
            raise ValueError("no text satisfies it" if _dead(made) else reason(made))
        if made.is_stopped() and not made.is_accepting():
            raise ValueError("no text satisfies it")
        return made

    def start(self) -> Any:
        """Return a matcher at the start of the grammar."""
        self.uses += 1
        return self._first.deep_copy()

    def restart(self, generation: int) -> Any:
        """Return a matcher at the start whose lexer is newer than that of `generation`."""
        if generation == self.generation:
            self._first, self.uses = with_large_stack(self._compile), 0
            self.generation += 1
        return self.start()


def _dead(matcher: Any) -> bool:
    """Return whether a matcher failed because no token can follow."""
    return matcher.get_error().startswith("NoExtensionBias")


def reason(matcher: Any) -> str:
    """Return why a matcher failed, in one line."""
    if _dead(matcher):
        return "no token can follow"
    text = " ".join(matcher.get_error().replace("<non-verbose/>", "").split())
    return text if len(text) <= MAX_REASON else text[: MAX_REASON - 3] + "..."


class Matcher:
    """State of one sequence in its grammar.

    Args:
        grammar: the sequence's grammar.
        skip: number of first output tokens that are not part of the structure, because the model forces them.
    """

    def __init__(self, grammar: Grammar, skip: int = 0):
        self.grammar, self._skip = grammar, skip
        self.state = grammar.start()
        """llguidance's matcher."""
        self.error: str | None = None
        """Why the sequence cannot be continued, or None."""
        self._taken = 0
        """Number of output tokens that the state includes."""
        self._generation, self._restarted_at = grammar.generation, -1

    @property
    def accepting(self) -> bool:
        """Whether the output may end here."""
        return self.error is None and self.state.is_accepting()

    @property
    def stopped(self) -> bool:
        """Whether the output is complete, and nothing may follow."""
        return self.error is None and self.state.is_stopped() and self.state.is_accepting()

    def advance(self, output: np.ndarray) -> None:
        """Include the output tokens `[made]` that the state does not include yet.

        After an interrupt, tokens may be missing from the state, or be in it although they were removed from the
        output.
        """
        if self.error is not None or len(output) == self._taken:
            return
        if len(output) < self._taken:
            self.state, self._taken, self._generation = self.grammar.start(), 0, self.grammar.generation
        new = output[max(self._taken, self._skip) :].tolist()
        self._taken = len(output)
        if not self.state.consume_tokens(new):
            self.recover(output)

    def recover(self, output: np.ndarray) -> bool:
        """Rebuild the state after an error: states that other sequences added may have filled the shared lexer.

        If the sequence was the only one with this lexer, or fails at the same token again, its own output is the cause,
        and `error` is set.

        Returns:
            Whether the state includes the output; `error` is set if not.
        """
        failed, grammar = self.state, self.grammar
        alone = grammar.generation == self._generation and grammar.uses == 1
        if not alone and self._restarted_at != len(output):
            self._restarted_at = len(output)
            try:
                self.state = grammar.restart(self._generation)
                self._generation = grammar.generation
                if self.state.consume_tokens(output[self._skip :].tolist()):
                    return True
            except ValueError:  # compiling the grammar again exceeds the limits
                pass
        self.error = f"structured_outputs: the output cannot be continued: {reason(failed)}"
        return False


def allow_ends(mask: np.ndarray, end_ids: Collection[int], stop_ids: Collection[int]) -> None:
    """Replace llguidance's end tokens in a row of a mask `[W]` by the stop tokens of the request, in place."""
    if not any(_bit(mask, token) for token in end_ids):
        return
    for token in end_ids:
        mask[token // 32] &= ~np.uint32(1 << token % 32)
    for token in stop_ids:
        if token < 32 * len(mask):
            mask[token // 32] |= np.uint32(1 << token % 32)


def _bit(mask: np.ndarray, token: int) -> bool:
    return bool(mask[token // 32] >> np.uint32(token % 32) & 1)
