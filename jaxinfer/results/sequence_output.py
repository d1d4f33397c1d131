"""Output of one sequence of a request: its text, tokens and log-probabilities so far."""

from collections.abc import Callable, Mapping
from functools import cached_property

from jaxinfer.engine.request import Sequence
from jaxinfer.engine.sequence_state import Status
from jaxinfer.outputs import Logprob
from jaxinfer.results.logprobs import Likely, LogprobTable
from jaxinfer.results.text_stream import TextStream


class SequenceOutput:
    """Output of one sequence: its text so far, and how much of it earlier deltas contained."""

    def __init__(self, sequence: Sequence, stream: Callable[[], TextStream] | None, table: Callable[[], LogprobTable]):
        """Track a sequence.

        Args:
            sequence: engine sequence.
            stream: creates its text stream, on first use; None for an output without text.
            table: creates its log-probability table, on first use.
        """
        self.sequence, self._new_stream, self._new_table = sequence, stream, table
        self._taken = 0
        """Number of tokens passed to the text stream."""
        self._hides_last = False
        """Whether the last token ended the sequence and is not part of the text."""
        self._flushed = False
        self._fresh: list[str] = []
        """Text since the last delta."""
        self._token_ids: list[int] = []
        self._logprobs: list[Mapping[int, Logprob]] = []
        self._listed = 0
        """Number of tokens whose log-probabilities are in earlier deltas or in `_logprobs`."""
        self.given = 0
        """Number of tokens in updates so far."""
        self.ended = False
        """Whether an update has reported the end of the sequence."""

    @cached_property
    def _text(self) -> TextStream | None:
        return None if self._new_stream is None else self._new_stream()

    @cached_property
    def _table(self) -> LogprobTable:
        return self._new_table()

    @property
    def text(self) -> str:
        """Whole text of the sequence so far."""
        return "" if self._text is None else self._text.text

    @property
    def token_ids(self) -> list[int]:
        """All output tokens so far."""
        self._token_ids += self.sequence.output_ids[len(self._token_ids) :].tolist()
        return self._token_ids.copy()

    @property
    def matched(self) -> str | None:
        """Stop string that ended the sequence; None if none did."""
        return None if self._text is None else self._text.matched

    def take(self, reason: str | None) -> None:
        """Pass new tokens to the text stream; flush held-back text if the sequence ends with them.

        Args:
            reason: finish reason of the sequence at the last token, stop strings aside; None if it continues. With
                "stop", a stop token at the end is left out of the text unless `include_stop_str_in_output` is set.
                A complete structure ends with a token of its own, which stays.
        """
        request = self.sequence.request
        tokens = self.sequence.output_ids[self._taken :].tolist()
        self._taken += len(tokens)
        self._hides_last = reason == "stop" and not request.params.include_stop_str_in_output
        if self._hides_last and request.grammar is not None:
            self._hides_last = bool(tokens) and tokens[-1] in request.stop_ids
        ending = tokens.pop() if self._hides_last and tokens else None
        self._fresh.append(self._text.push(tokens))
        if ending is not None:
            self._fresh.append(self._text.end(ending))
        if reason is not None:
            self._flush()

    def settle(self) -> None:
        """If the sequence has finished, process tokens not seen through `on_token` and flush held-back text."""
        if self._text is None or self._flushed or self.sequence.status is not Status.FINISHED:
            return
        if self._taken < self.sequence.made:
            self.take(self.sequence.finish_reason)
        else:
            self._flush()

    def _flush(self) -> None:
        if not self._flushed:
            self._fresh.append(self._text.finish())
            self._flushed = True

    def take_fresh(self) -> str:
        """Return the text since the last call."""
        text = "".join(self._fresh)
        self._fresh.clear()
        return text

    def fresh_logprobs(self) -> list[Mapping[int, Logprob]]:
        """Return the log-probability tables of the tokens since the last call."""
        sequence, start = self.sequence, self._listed
        tokens, ended = sequence.output_ids[start:].tolist(), sequence.status is Status.FINISHED
        rows = []
        for left, token, entry in zip(range(len(tokens), 0, -1), tokens, sequence.logprobs[start:], strict=True):
            last = ended and left == 1
            rows.append(self._table.row(token, Likely(*entry), last=last, in_text=not (last and self._hides_last)))
        self._listed += len(rows)
        return rows

    def logprobs(self) -> list[Mapping[int, Logprob]]:
        """Return the log-probability tables of all output tokens."""
        self._logprobs += self.fresh_logprobs()
        return self._logprobs.copy()
