"""A user's view of one request: its text as it grows, and its results."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxinfer.engine.beams import Finished
from jaxinfer.engine.request import Request, Sequence, Status
from jaxinfer.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from jaxinfer.sampling_params import RequestOutputKind
from jaxinfer.text import Detokenizer, StopStrings, TextStream


class Sample:
    """One sequence as its user sees it: its text as it grows, and what of it was given out."""

    def __init__(self, sequence: Sequence, text: TextStream | None):
        self.sequence, self._text = sequence, text
        self._taken = 0
        """Tokens that the text has taken."""
        self._flushed = False
        self._fresh: list[str] = []
        """Text made since the last delta."""
        self.given = 0
        """Tokens in deltas so far."""
        self.ended = False
        """Whether its end was given out."""

    @property
    def text(self) -> str:
        """All of it."""
        return "" if self._text is None else self._text.text

    @property
    def matched(self) -> str | None:
        """The stop string that ended it."""
        return None if self._text is None else self._text.matched

    def take(self, ending: bool) -> None:
        """Hands new tokens to the text; `ending`: the last of them ends the sequence and is no part of the text."""
        hidden = ending and not self.sequence.request.params.include_stop_str_in_output
        tokens = self.sequence.output_ids[self._taken : self.sequence.made - hidden]
        self._taken = self.sequence.made
        if len(tokens):
            self._fresh.append(self._text.push(tokens.tolist()))

    def settle(self) -> None:
        """Once the sequence has ended: takes what nobody listened to, and flushes what was held back."""
        if self._text is None or self._flushed or self.sequence.status is not Status.FINISHED:
            return
        if self._taken < self.sequence.made:
            self.take(self.sequence.finish_reason == "stop" and not isinstance(self.sequence.stop_reason, str))
        self._fresh.append(self._text.finish())
        self._flushed = True

    def take_fresh(self) -> str:
        """The text made since the last call."""
        text = "".join(self._fresh)
        self._fresh.clear()
        return text


class Handle:
    """Follows a request; listens to its tokens where text is needed before the end."""

    def __init__(self, request: Request, text: str | None, tokenizer: Any, *, streaming: bool):
        self.request, self.text = request, text
        self.read: str | None = None
        """The text that its encoder reads."""
        self._tokenizer = tokenizer
        stop = StopStrings(request.params.stop) if request.params.stop else None
        self._samples = [Sample(sequence, self._stream(stop)) for sequence in request.sequences]
        self._prompt_ids = request.prompt.tolist()
        self._words: dict[int, str] = {}
        if (streaming or stop) and tokenizer is not None and request.params.detokenize:
            request.listener = self

    def _stream(self, stop: StopStrings | None) -> TextStream | None:
        params = self.request.params
        if self._tokenizer is None or not params.detokenize:
            return None
        detokenizer = Detokenizer(
            self._tokenizer, skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
        )  # fmt: skip
        return TextStream(
            detokenizer, stop, include_stop=params.include_stop_str_in_output, min_tokens=params.min_tokens
        )

    @property
    def finished(self) -> bool:
        """Whether every sample has ended."""
        return self.request.finished

    def on_token(self, sequence: Sequence, ending: bool) -> str | None:
        """Called by the engine for each token; a stop string that it completed."""
        sample = self._samples[sequence.index]
        sample.take(ending)
        return sample.matched

    def output(self) -> RequestOutput:
        """Everything so far."""
        return self._wrap([self._completion(sample) for sample in self._samples])

    def update(self, kind: RequestOutputKind) -> RequestOutput | None:
        """What is new since the last update, in the form asked for; None if nothing is."""
        if kind is RequestOutputKind.FINAL_ONLY and not self.finished:
            return None
        fresh = []
        for sample in self._samples:
            made, done = sample.sequence.made, sample.sequence.status is Status.FINISHED
            if made == sample.given and done == sample.ended:
                continue
            fresh.append(self._completion(sample, delta=kind is RequestOutputKind.DELTA))
            sample.given, sample.ended = made, done
        return self._wrap(fresh) if fresh else None

    def _wrap(self, outputs: list[CompletionOutput]) -> RequestOutput:
        request = self.request
        return RequestOutput(
            request_id=request.id, prompt=self.text, prompt_token_ids=self._prompt_ids, outputs=outputs,
            finished=request.finished, prompt_logprobs=self._prompt_logprobs(), metrics=self._metrics(),
            encoder_prompt=self.read, encoder_prompt_token_ids=None if request.cross is None else request.cross.token_ids,
            num_cached_tokens=request.cached_tokens,
        )  # fmt: skip

    def _completion(self, sample: Sample, *, delta: bool = False) -> CompletionOutput:
        sample.settle()
        sequence, start = sample.sequence, sample.given if delta else 0
        tokens, logprobs = sequence.output_ids[start:].tolist(), None
        if self.request.params.logprobs is not None:
            logprobs = [
                self._candidates(token, *entry, count=self.request.params.logprobs)
                for token, entry in zip(tokens, sequence.logprobs[start:], strict=True)
            ]
        return CompletionOutput(
            index=sequence.index, text=sample.take_fresh() if delta else sample.text, token_ids=tokens,
            cumulative_logprob=None if logprobs is None else sequence.cumulative_logprob, logprobs=logprobs,
            finish_reason=sequence.finish_reason,
            stop_reason=self.request.error if sequence.finish_reason == "error" else sequence.stop_reason,
        )  # fmt: skip

    def _prompt_logprobs(self) -> list[Mapping[int, Logprob] | None] | None:
        params, chunks = self.request.params, self.request.prompt_logprobs
        if params.prompt_logprobs is None:
            return None
        table: list[Mapping[int, Logprob] | None] = [None]
        targets = iter(self.request.prompt[1:].tolist())
        for chunk in chunks:
            for chosen, rank, ids, top in zip(*chunk, strict=True):
                table.append(self._candidates(next(targets), chosen, rank, ids, top, count=params.prompt_logprobs))
        return table

    def _candidates(
        self, token: int, chosen: float | np.floating, rank: int | np.integer, ids: np.ndarray, top: np.ndarray, *,
        count: int,
    ) -> dict[int, Logprob]:
        rows = {token: Logprob(float(chosen), int(rank), self._word(token))}
        for place, (other, value) in enumerate(zip(ids[:count].tolist(), top[:count].tolist(), strict=True)):
            rows.setdefault(other, Logprob(value, place + 1, self._word(other)))
        return rows

    def _word(self, token: int) -> str | None:
        if self._tokenizer is None:
            return None
        if token not in self._words:
            self._words[token] = self._tokenizer.decode([token])
        return self._words[token]

    def _metrics(self) -> RequestMetrics:
        r = self.request
        return RequestMetrics(
            r.arrival_time, r.first_scheduled_time, r.first_token_time, r.finished_time, r.preemptions,
            r.cached_tokens, r.miss_reason, r.hits,
        )  # fmt: skip


class BeamHandle(Handle):
    """Follows a beam search, whose results are known at its end."""

    def __init__(self, request: Request, text: str | None, tokenizer: Any):
        super().__init__(request, text, tokenizer, streaming=False)

    def output(self) -> RequestOutput:
        """The best beams; of a search that was cut short or failed a single one, without tokens, that says so."""
        request, [first, *_] = self.request, self.request.sequences
        outputs = [self._beam(index, beam) for index, beam in enumerate(request.beams.best)]
        if request.error is not None or not outputs:
            outputs = [CompletionOutput(0, "", [], finish_reason=first.finish_reason, stop_reason=request.error)]
        return self._wrap(outputs)

    def _beam(self, index: int, beam: Finished) -> CompletionOutput:
        params, stream, last = self.request.params, self._stream(None), int(beam.tokens[-1])
        shown = len(beam.tokens) - (beam.stopped and not params.include_stop_str_in_output)
        return CompletionOutput(
            index=index, text="" if stream is None else stream.push(beam.tokens[:shown].tolist()) + stream.finish(),
            token_ids=beam.tokens.tolist(), cumulative_logprob=beam.logprob,
            finish_reason="stop" if beam.stopped else "length",
            stop_reason=last if beam.stopped and last not in params.eos_token_ids else None, score=float(beam.score),
        )  # fmt: skip
