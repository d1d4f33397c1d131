"""A user's view of one request: its text as it grows, and its results."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxinfer.engine.request import Request, Sequence, Status
from jaxinfer.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from jaxinfer.sampling_params import RequestOutputKind
from jaxinfer.text import Detokenizer, StopStrings, TextStream


class Handle:
    """Follows a request; listens to its tokens where text is needed before the end."""

    def __init__(self, request: Request, text: str | None, tokenizer: Any, *, streaming: bool):
        self.request, self.text = request, text
        self._tokenizer = tokenizer
        params = request.params
        stop = StopStrings(params.stop) if params.stop else None
        self._streams = [self._stream(stop) for _ in request.sequences]
        self._read = [0] * params.n
        """Tokens of each sample that its text stream has taken."""
        self._given = [(0, 0, None)] * params.n
        """Of each sample: characters, tokens and end that were given out as deltas."""
        self._words: dict[int, str] = {}
        if (streaming or stop) and self._streams[0] is not None:
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
        self._take(sequence, ending)
        return self._streams[sequence.index].matched

    def _take(self, sequence: Sequence, ending: bool) -> None:
        """Hands the sample's new tokens to its text; the token that ends it is no part of the text."""
        stream, start = self._streams[sequence.index], self._read[sequence.index]
        hidden = ending and not self.request.params.include_stop_str_in_output
        tokens = sequence.output_ids[start : sequence.made - hidden]
        self._read[sequence.index] = sequence.made
        if len(tokens):
            stream.push(tokens.tolist())

    def output(self) -> RequestOutput:
        """Everything so far."""
        return self._wrap([self._completion(sequence) for sequence in self.request.sequences])

    def update(self, kind: RequestOutputKind) -> RequestOutput | None:
        """What is new since the last update, in the form asked for; None if nothing is."""
        if kind is RequestOutputKind.FINAL_ONLY and not self.finished:
            return None
        fresh = []
        for sequence in self.request.sequences:
            whole = self._completion(sequence)
            chars, tokens, end = self._given[sequence.index]
            if (len(whole.text), len(whole.token_ids), whole.finish_reason) == (chars, tokens, end):
                continue
            self._given[sequence.index] = len(whole.text), len(whole.token_ids), whole.finish_reason
            fresh.append(_delta(whole, chars, tokens) if kind is RequestOutputKind.DELTA else whole)
        return self._wrap(fresh) if fresh else None

    def _wrap(self, outputs: list[CompletionOutput]) -> RequestOutput:
        request = self.request
        return RequestOutput(
            request_id=request.id, prompt=self.text, prompt_token_ids=request.prompt.tolist(), outputs=outputs,
            finished=request.finished, prompt_logprobs=self._prompt_logprobs(), metrics=self._metrics(),
            num_cached_tokens=request.cached_tokens,
        )  # fmt: skip

    def _completion(self, sequence: Sequence) -> CompletionOutput:
        stream = self._streams[sequence.index]
        done = sequence.status is Status.FINISHED
        if stream is not None and done and self._read[sequence.index] >= 0:
            ending = sequence.finish_reason == "stop" and not isinstance(sequence.stop_reason, str)
            if self._read[sequence.index] < sequence.made:
                self._take(sequence, ending)
            stream.finish()
            self._read[sequence.index] = -1
        logprobs = None
        if self.request.params.logprobs is not None:
            logprobs = [
                self._candidates(int(token), *entry, count=self.request.params.logprobs)
                for token, entry in zip(sequence.output_ids, sequence.logprobs, strict=True)
            ]
        return CompletionOutput(
            index=sequence.index, text="" if stream is None else stream.text, token_ids=sequence.output_ids.tolist(),
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
        self, token: int, chosen: float, rank: int, ids: np.ndarray, top: np.ndarray, *, count: int
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
            r.cached_tokens, r.miss_reason,
        )  # fmt: skip


def _delta(whole: CompletionOutput, chars: int, tokens: int) -> CompletionOutput:
    """What of a sample lies beyond what was given before."""
    logprobs = None if whole.logprobs is None else whole.logprobs[tokens:]
    return CompletionOutput(
        whole.index, whole.text[chars:], whole.token_ids[tokens:], whole.cumulative_logprob, logprobs,
        whole.finish_reason, whole.stop_reason,
    )  # fmt: skip
