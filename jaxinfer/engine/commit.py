"""Commit of a step: its tokens are read, appended to their sequences, and end those that are done."""

import logging
import time
from dataclasses import replace

import numpy as np

from jaxinfer.engine import captures
from jaxinfer.engine.beam_search import branching
from jaxinfer.engine.endings import NOT_FINITE, Endings
from jaxinfer.engine.metrics import Metrics
from jaxinfer.engine.plan import Plan
from jaxinfer.engine.request import Sequence
from jaxinfer.engine.runner.batch import spans, wants_prompt_logprobs
from jaxinfer.engine.runner.flight import Flight, Result
from jaxinfer.engine.runner.runner import Runner
from jaxinfer.engine.sampling.sampler import BAD_TOKEN, Candidates, Logprobs
from jaxinfer.engine.scheduler import Scheduler
from jaxinfer.engine.sequence_state import Status
from jaxinfer.engine.structured.masks import ends_without_token

log = logging.getLogger(__name__)

NO_TOKEN_LEFT = (
    "structured_outputs: no token is left: those that the structure allows next are masked by bad_words, "
    "allowed_token_ids, logit_bias, no_repeat_ngram_size or min_tokens, or the model's logits are not finite"
)


class Committer:
    """Commits steps to the sequences of a scheduler."""

    def __init__(self, runner: Runner, scheduler: Scheduler, endings: Endings, metrics: Metrics):
        self._runner, self._scheduler, self._endings, self._metrics = runner, scheduler, endings, metrics
        self._block_size = scheduler.manager.block_size

    def commit(self, flight: Flight) -> None:
        """Read a step's tokens, append them to their sequences and end those that are done."""
        for result in flight.results:
            if result.sampled.prompt_logprobs is not None:
                self._take_prompt_logprobs(flight.plan, Logprobs(*map(np.asarray, result.sampled.prompt_logprobs)))
            if result.sampled.captured:
                captures.take_captured(flight.plan, result)
            self._take_tokens(result)
        for sequence in [chunk.sequence for chunk in flight.plan.chunks if captures.ends_here(chunk)]:
            sequence.pending -= 1
            self._endings.finish(sequence, "length")

    def _take_tokens(self, result: Result) -> None:
        """Append sampled tokens to their sequences; inline fast path for tokens that need no other handling."""
        if result.drafts is not None:
            result = self._accept(result)
        sampled, indices, size = result.sampled, result.indices, self._block_size
        chosen = np.asarray(sampled.tokens)[indices]
        tokens, special = chosen.tolist(), result.first or bool((chosen < 0).any())
        beside = None if sampled.logprobs is None else Logprobs(*(np.asarray(c)[indices] for c in sampled.logprobs))
        offers = None if sampled.candidates is None else [np.asarray(c)[indices] for c in sampled.candidates]
        publish, finished, made = self._scheduler.publisher.publish, Status.FINISHED, len(tokens)
        for i, (sequence, token) in enumerate(zip(result.samples, tokens, strict=True)):
            sequence.pending -= 1
            length, request = sequence.length, sequence.request
            if not special and length + 1 < sequence.commit_limit and token not in request.stop_ids:
                sequence.tokens[length] = token
                sequence.length = length + 1
                if (length + 1) % size == 0:
                    publish(sequence)
            elif sequence.status is finished:
                made -= 1
            elif request.beams is not None:
                made -= token == BAD_TOKEN
                self._take_candidates(sequence, Candidates(*(column[i] for column in offers)))
            else:
                made -= token == BAD_TOKEN
                self._take_token(sequence, token, beside, i)
                if sequence.length % size == 0:
                    publish(sequence)
        self._metrics.add("generation_tokens", made)

    def _accept(self, result: Result) -> Result:
        """Return the result of a step that verified drafts without the samples after wrong tokens."""
        tokens, kept, start = np.asarray(result.sampled.tokens), [], 0
        add, drafter = self._metrics.add, self._scheduler.drafter
        for draft in result.drafts:
            sequence, count = result.samples[start], len(draft)
            right = np.append(tokens[start : start + count] == draft, False)
            accepted = int(np.argmin(right))
            self._scheduler.take_back(sequence, count - accepted)
            drafter.note(sequence, count, accepted)
            add("spec_decode_num_drafts", int(count > 0))
            add("spec_decode_num_draft_tokens", count)
            add("spec_decode_num_accepted_tokens", accepted)
            kept += range(start, start + accepted + 1)
            start += count + 1
        samples = [result.samples[i] for i in kept]
        return replace(result, samples=samples, indices=np.array(kept, np.int32), drafts=None)

    def _take_token(self, sequence: Sequence, token: int, beside: Logprobs | None, i: int) -> None:
        """Append a token with full handling: NaN logits, log-probabilities, timestamps, listener, finish reasons."""
        request, endings = sequence.request, self._endings
        if sequence.matcher is not None and sequence.matcher.error is not None:
            endings.fail(sequence, sequence.matcher.error)
            return
        if token == BAD_TOKEN:
            if ends_without_token(sequence):
                endings.finish(sequence, "stop")
            else:
                endings.fail(sequence, NOT_FINITE if sequence.matcher is None else NO_TOKEN_LEFT)
            return
        if beside is not None and request.params.logprobs is not None:
            sequence.cumulative_logprob += float(beside.chosen[i])
            sequence.logprobs.append((float(beside.chosen[i]), int(beside.rank[i]), beside.top_ids[i], beside.top[i]))
        if request.first_token_time is None:
            request.first_token_time = time.monotonic()
        try:
            reason = _append(sequence, token)
        except Exception as error:  # a listener's error ends its own request only
            log.exception("request %s: the listener failed", request.id)
            endings.fail(sequence, f"listener failed: {error}")
            return
        if sequence.matcher is not None and sequence.matcher.error is not None:
            endings.fail(sequence, sequence.matcher.error)
        elif reason is not None:
            endings.finish(sequence, reason)
        elif sequence.length == sequence.stage_limit:
            self._scheduler.recompute(sequence)

    def _take_candidates(self, sequence: Sequence, found: Candidates) -> None:
        """Store a beam's continuations; once all beams of the search have theirs, advance the search."""
        request, sequence.candidates = sequence.request, found
        if np.isnan(found.scores).any():
            self._endings.fail(sequence, NOT_FINITE)
            return
        if request.first_token_time is None:
            request.first_token_time = time.monotonic()
        if not branching.complete(request):
            return
        beams, running = request.beams, branching.running(request)
        chosen = beams.advance([beam.candidates for beam in running])
        if chosen:
            going = branching.regroup(self._scheduler, request, chosen)
            self._runner.row_params.write(beam for beam in going if beam.row >= 0)
        else:
            self._endings.end_search(request)

    def _take_prompt_logprobs(self, plan: Plan, found: Logprobs) -> None:
        for span, chunk in zip(spans(plan), plan.chunks, strict=True):
            request = chunk.sequence.request
            if not wants_prompt_logprobs(chunk) or chunk.sequence.index:
                continue
            # Some are already known if the prompt was preempted half way and recomputed.
            known = request.first_scored + sum(len(part.chosen) for part in request.prompt_logprobs)
            first, end = max(0, known - chunk.start), min(chunk.count, len(request.prompt) - 1 - chunk.start)
            if first < end:
                span = slice(span.start + first, span.start + end)
                request.prompt_logprobs.append(Logprobs(*(column[span] for column in found)))


def _append(sequence: Sequence, token: int) -> str | None:
    """Append a token and pass it to the request's listener, which looks for stop strings; return the finish reason."""
    reason, listener = sequence.add(token), sequence.request.listener
    stop = None if listener is None else listener.on_token(sequence, reason)
    if stop is None:
        return reason
    sequence.stop_reason = stop
    return "stop"
