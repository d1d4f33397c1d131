"""Convert the tokens of a request to user-facing outputs: text, log-probabilities, deltas and final results."""

from collections.abc import Mapping
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from jaxinfer.engine.beam_search.beams import Finished
from jaxinfer.engine.control import weight_segments
from jaxinfer.engine.request import Request, Sequence
from jaxinfer.engine.sequence_state import Status
from jaxinfer.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from jaxinfer.results.detokenizer import Detokenizer
from jaxinfer.results.logprobs import Likely, LogprobTable
from jaxinfer.results.sequence_output import SequenceOutput
from jaxinfer.results.stop_strings import StopStrings
from jaxinfer.results.text_stream import TextStream
from jaxinfer.sampling_params import RequestOutputKind

_stops = lru_cache(maxsize=16)(StopStrings)
"""Build the automaton for `SamplingParams.stop`, cached because most requests of a call share it."""


class Handle:
    """Output processor of one request; listens to tokens if text is needed before the end (streaming, stop strings).

    A call may queue a hundred thousand requests, so state that the queue does not need is created at the first token.
    """

    def __init__(
        self,
        request: Request,
        text: str | None,
        tokenizer: Any,
        *,
        encoder_text: str | None = None,
        streaming: bool = False,
    ):
        self.request, self.text, self.encoder_text = request, text, encoder_text
        self._tokenizer = tokenizer
        self._chunks = 0
        """Number of prefill chunks whose log-probabilities are in the prompt's table."""
        if (streaming or request.params.stop) and self._makes_text:
            request.listener = self

    @property
    def _makes_text(self) -> bool:
        return self._tokenizer is not None and self.request.params.detokenize

    @cached_property
    def _samples(self) -> list[SequenceOutput]:
        stream = self._stream if self._makes_text else None
        return [SequenceOutput(sequence, stream, self._output_table) for sequence in self.request.sequences]

    @cached_property
    def _prompt_logprobs(self) -> list[Mapping[int, Logprob] | None]:
        return [None]

    def _detokenizer(self) -> Detokenizer:
        """Return a new detokenizer positioned at the end of the prompt."""
        params = self.request.params
        return Detokenizer(
            self._tokenizer,
            prompt=self.request.prompt,
            skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
        )

    def _stream(self) -> TextStream:
        params = self.request.params
        return TextStream(
            self._detokenizer(),
            _stops(params.stop) if params.stop else None,
            include_stop=params.include_stop_str_in_output,
            min_tokens=params.min_tokens,
        )

    def _output_table(self) -> LogprobTable:
        return LogprobTable(None if self._tokenizer is None else self._detokenizer(), self.request.params.logprobs)

    @cached_property
    def _prompt_table(self) -> LogprobTable:
        """Log-probability table of the prompt, from its second token on: the first has no log-probability."""
        detokenizer = None if self._tokenizer is None else Detokenizer(self._tokenizer, skip_special_tokens=False)
        table = LogprobTable(detokenizer, self.request.params.prompt_logprobs)
        table.skip(int(self.request.prompt[0]))
        return table

    @cached_property
    def _prompt_ids(self) -> list[int]:
        return self.request.prompt.tolist()

    @property
    def finished(self) -> bool:
        """Whether all samples have finished."""
        return self.request.finished

    def on_token(self, sequence: Sequence, reason: str | None) -> str | None:
        """Process a new token (called by the engine); return the stop string that it completes, if any."""
        sample = self._samples[sequence.index]
        sample.take(reason)
        return sample.matched

    def output(self) -> RequestOutput:
        """Return the cumulative output."""
        return self._wrap([self._completion(sample) for sample in self._samples])

    def update(self, kind: RequestOutputKind) -> RequestOutput | None:
        """Return samples with new tokens since the last update, in the form set by `kind`; None if there are none."""
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
            request_id=request.id,
            prompt=self.text,
            prompt_token_ids=self._prompt_ids,
            outputs=outputs,
            finished=request.finished,
            prompt_logprobs=self._known_prompt_logprobs(),
            metrics=self._metrics(),
            encoder_prompt=self.encoder_text,
            encoder_prompt_token_ids=None if request.cross is None else request.cross.token_ids,
            num_cached_tokens=request.cached_tokens,
        )

    def _completion(self, sample: SequenceOutput, *, delta: bool = False) -> CompletionOutput:
        sample.settle()
        sequence, logprobs = sample.sequence, None
        if self.request.params.logprobs is not None:
            logprobs = sample.fresh_logprobs() if delta else sample.logprobs()
        return CompletionOutput(
            index=sequence.index,
            text=sample.take_fresh() if delta else sample.text,
            token_ids=sequence.output_ids[sample.given :].tolist() if delta else sample.token_ids,
            cumulative_logprob=None if logprobs is None else sequence.cumulative_logprob,
            logprobs=logprobs,
            finish_reason=sequence.finish_reason,
            stop_reason=self.request.error if sequence.finish_reason == "error" else sequence.stop_reason,
            weight_segments=weight_segments(sequence),
            routed_experts=_experts(sequence),
        )

    def _known_prompt_logprobs(self) -> list[Mapping[int, Logprob] | None] | None:
        """Return the prompt's log-probability tables computed so far; all updates of a request share this list."""
        if self.request.params.prompt_logprobs is None:
            return None
        table, prompt = self._prompt_logprobs, self.request.prompt
        for chunk in self.request.prompt_logprobs[self._chunks :]:
            for entry in zip(*chunk, strict=True):
                at = len(table)
                table.append(self._prompt_table.row(int(prompt[at]), Likely(*entry), last=at + 1 == len(prompt)))
        self._chunks = len(self.request.prompt_logprobs)
        return table

    def _metrics(self) -> RequestMetrics:
        r = self.request
        return RequestMetrics(
            r.arrival_time,
            r.first_scheduled_time,
            r.first_token_time,
            r.finished_time,
            r.preemptions,
            r.cached_tokens,
            r.miss_reason,
            r.hits,
            r.clamped_max_tokens,
        )


def _experts(sequence: Sequence) -> np.ndarray | None:
    """Return the experts of a sequence's tokens but the last, in the smallest type; None if they are not recorded."""
    if not sequence.experts:
        return None
    found = np.concatenate(sequence.experts)[: sequence.length - 1]
    return found.astype(np.min_scalar_type(int(found.max(initial=0))))


class BeamHandle(Handle):
    """Output processor of a beam search, whose results are available only at its end."""

    def output(self) -> RequestOutput:
        """Return the best beams; for an aborted or failed search, a single empty completion with the reason."""
        request, [first, *_] = self.request, self.request.sequences
        outputs = [self._beam(index, beam) for index, beam in enumerate(request.beams.best)]
        if request.error is not None or not outputs:
            outputs = [CompletionOutput(0, "", [], finish_reason=first.finish_reason, stop_reason=request.error)]
        return self._wrap(outputs)

    def _beam(self, index: int, beam: Finished) -> CompletionOutput:
        params, last, text = self.request.params, int(beam.tokens[-1]), ""
        shown = len(beam.tokens) - (beam.stopped and not params.include_stop_str_in_output)
        if self._makes_text:
            stream = self._detokenizer()
            text = stream.push(beam.tokens[:shown].tolist()) + stream.finish()
        return CompletionOutput(
            index=index,
            text=text,
            token_ids=beam.tokens.tolist(),
            cumulative_logprob=beam.logprob,
            finish_reason="stop" if beam.stopped else "length",
            stop_reason=last if beam.stopped and last not in params.eos_token_ids else None,
            score=float(beam.score),
        )
