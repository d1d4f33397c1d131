"""Compile the structures of requests to grammars over a model's tokens, with llguidance."""

import importlib
import json
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import cached_property
from typing import Any

from jaxinfer.engine.structured.grammar import Grammar, with_large_stack
from jaxinfer.inputs.tokenizer import id_bound
from jaxinfer.structured_outputs import StructuredOutputsParams

log = logging.getLogger(__name__)

WHITESPACE = r"\x20|\r?\n[\x20\t]{0,40}"
"""Whitespace between the parts of JSON: one space, or a line break and an indentation. Small models that
may write any whitespace repeat it without end."""
MAX_GRAMMARS = 32
"""Maximum number of compiled grammars that are kept for later requests, the least recently used dropped first."""
MAX_REASON = 200
"""Maximum number of characters of a reason in an error."""


class Grammars:
    """Grammars of a model's requests, compiled once each. Thread-safe.

    Args:
        tokenizer: transformers tokenizer; None if the model was loaded without one.
        vocab_size: V, rows of the output layer.
        end_ids: token ids that end an output.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, end_ids: Sequence[int]):
        self._hf, self._vocab_size, self._end_ids = tokenizer, vocab_size, end_ids
        self._lock, self._tokenizer_lock = threading.Lock(), threading.Lock()
        self._made: OrderedDict[StructuredOutputsParams, Future[Grammar]] = OrderedDict()

    def get(self, params: StructuredOutputsParams) -> Grammar:
        """Return the compiled grammar of a structure; it takes from a millisecond to a second the first time.

        Raises:
            ValueError: the structure is invalid, too large, or cannot be satisfied, or llguidance or a fast tokenizer
                is missing; the error names the field.
        """
        with self._lock:
            mine = params not in self._made
            future = self._made.setdefault(params, Future())
            self._made.move_to_end(params)
            while len(self._made) > MAX_GRAMMARS:
                self._made.popitem(last=False)
        if not mine:
            return future.result()
        try:
            future.set_result(self._compile(params))
        except BaseException as error:
            with self._lock:
                if self._made.get(params) is future:
                    del self._made[params]
            future.set_exception(error)
        return future.result()

    def _compile(self, params: StructuredOutputsParams) -> Grammar:
        with self._tokenizer_lock:
            tokenizer = self._tokenizer
        try:
            return Grammar(tokenizer, with_large_stack(_source, params))
        except (ValueError, RecursionError) as error:
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
            raise ValueError(f"{params.field(params.kind)} cannot be used: {_cut(reason)}.") from None

    @cached_property
    def _tokenizer(self) -> Any:
        """llguidance's form of the tokenizer: a tree of the bytes of all tokens."""
        backend, hf = getattr(self._hf, "backend_tokenizer", None), _library("llguidance.hf")
        if self._hf is None:
            raise ValueError("structured_outputs needs the tokenizer, which was skipped; pass tokenizer=.")
        if backend is None:
            raise ValueError(
                "structured_outputs needs a tokenizer of the library tokenizers (tokenizer.json), and this model's is "
                f"a {type(self._hf).__name__}."
            )
        started, bound = time.perf_counter(), id_bound(self._hf)
        ends = [token for token in self._end_ids if token < bound] or [self._stand_in()]
        made = hf.from_tokenizer(self._hf, n_vocab=max(bound, self._vocab_size), eos_token=ends)
        log.info("structured output: %d tokens read in %.1f s", bound, time.perf_counter() - started)
        return made

    def _stand_in(self) -> int:
        """Return a token id, never sampled, that llguidance takes for EOS, as this model has no EOS token."""
        own = self._hf.eos_token_id
        if own is not None:
            return own
        vocabulary = self._hf.get_vocab()
        return min(self._hf.all_special_ids or [vocabulary[max(vocabulary, key=len)]])


def _source(params: StructuredOutputsParams) -> str:
    """Convert a structure to llguidance's grammar format; raises ValueError if it is invalid."""
    matcher = _library("llguidance").LLMatcher
    if params.kind in ("json", "json_object"):
        options: dict[str, Any] = {"whitespace_pattern": WHITESPACE}
        if params.disable_any_whitespace:
            options = {"whitespace_flexible": False}
        return matcher.grammar_from_json_schema(params.text, overrides=options)
    if params.kind == "regex":
        return matcher.grammar_from_regex(params.text)
    if params.kind == "choice":
        return matcher.grammar_from_lark("start: " + " | ".join(json.dumps(one) for one in params.choice or ()))
    to_lark: Callable[[str], str] = _library("llguidance.gbnf_to_lark").any_to_lark
    try:
        return matcher.grammar_from_lark(to_lark(params.text))
    except RecursionError:
        raise
    except Exception as error:  # the conversion raises plain exceptions
        raise ValueError(str(error)) from None


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(
            "structured_outputs needs the package llguidance: pip install 'jaxinfer[structured]'."
        ) from None


def _cut(reason: str) -> str:
    reason = reason.rstrip(".")
    return reason if len(reason) <= MAX_REASON else reason[: MAX_REASON - 3] + "..."
