"""Requests and sequences: prompt, sampling parameters and progress of generation."""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

from jaxinfer.adapter import Adapter
from jaxinfer.engine.beam_search.beams import Beams
from jaxinfer.engine.sampling.sampler import Candidates, Logprobs
from jaxinfer.engine.sequence_state import SequenceState, Status
from jaxinfer.engine.structured.grammar import Grammar, Matcher
from jaxinfer.engine.wanted import Wanted
from jaxinfer.kv.cross_cache import Encoded
from jaxinfer.kv.digests import NO_EXTRAS, Extras, root
from jaxinfer.media import CrossInputs, PlacedInputs
from jaxinfer.media.rope_positions import RopePositions
from jaxinfer.outputs import CacheHit
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.steering import Steering

_arrivals = itertools.count()


@runtime_checkable
class Listener(Protocol):
    """Callback for each token of one request, used for streaming and stop strings."""

    def on_token(self, sequence: "Sequence", reason: str | None) -> str | None:
        """Handle an appended token and return the stop string that it completed, or None.

        Args:
            sequence: the sequence, the token already appended.
            reason: finish reason of the sequence apart from stop strings, or None if it continues.
        """
        ...


@dataclass(eq=False, slots=True)
class Request:
    """A validated prompt and its sampling parameters.

    A single call may queue 100,000 requests, so per-sequence data is only built once a sequence gets a row.
    """

    id: str
    prompt: np.ndarray
    """Prompt token ids, `[L]` int32."""
    params: SamplingParams
    """Sampling parameters, resolved against the model's defaults."""
    limit: int
    """Maximum length of each sequence in tokens, prompt included."""
    asked: int | None = None
    """Requested maximum length, before it was lowered to what the cache holds; None if equal to `limit`."""
    clamped_max_tokens: int | None = None
    """Maximum number of new tokens per sequence, if the cache holds fewer than requested; else None."""
    salt: bytes = b""
    """Salt of the prefix cache hashes: the caller's `cache_salt`. The cache itself belongs to one engine and model."""
    length_key: Callable[[int], bytes] = lambda length: b""
    """Map the length that rope was computed for to a salt of the keys (`ModelConfig.length_key`)."""
    recompute_after: int | None = None
    """Length in tokens beyond which rope changes for the whole sequence (`ModelConfig.recompute_after`)."""
    seed: int = 0
    inputs: PlacedInputs | None = None
    """Images or audio of the prompt, with the placeholder tokens that they replace."""
    cross: CrossInputs | None = None
    """Encoder inputs for cross-attention."""
    rule: int = 0
    """Parameter of the model's token rule (`models.base.TokenRule`); 0 if the rule does not apply."""
    grammar: Grammar | None = None
    """Grammar that each sample must follow (`SamplingParams.structured_outputs`)."""
    extras: Extras = field(default_factory=lambda: NO_EXTRAS)
    """Media content of each block, part of the prefix cache hash; set when the request is queued."""
    encoded: Encoded | None = None
    """Cache key of `cross`; set when the request is queued."""
    beams: Beams | None = None
    """State of a beam search. `sequences` are then the running beams, initially one, and finish together."""
    steering: Steering | None = None
    """Vectors added to the outputs of modules for all tokens of the request."""
    adapter: Adapter | None = None
    """LoRA adapter of all tokens of the request; None for the model as it is."""
    wanted: Wanted | None = None
    """Results of the prefill that the request asks for, after which it ends; None if it samples tokens."""
    listener: Listener | None = None
    on_finish: Callable[["Request"], None] | None = None
    """Called when all sequences have finished; may be called a second time after a failed step."""
    sequences: list["Sequence"] = field(default_factory=list)
    prompt_logprobs: list[Logprobs] = field(default_factory=list)
    """Log-probabilities of prompt tokens from the second on: one entry per prefill chunk, each `[T, ...]`."""
    arrival: int = field(default_factory=lambda: next(_arrivals))
    arrival_time: float = field(default_factory=time.monotonic)
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    preemptions: int = 0
    cached_tokens: int = 0
    """Number of prompt tokens found in the prefix cache."""
    miss_reason: str | None = None
    hits: tuple[CacheHit, ...] = ()
    """Prompt tokens that each kind of layer could have reused from the prefix cache."""
    error: str | None = None
    weight_version: int = 0
    """Version of the weights when the request was queued (`engine.control`)."""
    rope: RopePositions | None = field(init=False)
    """Positions that rope rotates by, if they are not those in the sequence; kept when `inputs` are dropped, as steps
    may be under way."""
    stop_ids: frozenset[int] = field(init=False)
    """Token ids that end a sequence."""

    def __post_init__(self) -> None:
        self.sequences = [Sequence(self, index) for index in range(self.params.n)]
        self.stop_ids = self.params.all_stop_token_ids
        self.rope = None if self.inputs is None else self.inputs.rope

    @property
    def first_scored(self) -> int:
        """First position whose successor's log-probability is requested, if any."""
        return 0 if self.wanted is None else self.wanted.first

    @property
    def rope_shift(self) -> int:
        """Position that rope rotates a generated token by, less its position in the sequence."""
        return 0 if self.rope is None else self.rope.shift

    @property
    def finished(self) -> bool:
        """Whether all sequences have finished."""
        return all(s.status is Status.FINISHED for s in self.sequences)

    def forget_prompt(self) -> None:
        """Forget what has been computed of the prompt, which is computed again with other weights."""
        self.prompt_logprobs.clear()
        if self.wanted is not None and self.wanted.captures is not None:
            self.wanted.captures.reset()

    def drop_inputs(self) -> None:
        """Drop images and audio once all sequences have finished; a preempted sequence would need them again.

        The caller may hold the request much longer. Token ids of text encoder inputs stay, as the result returns them.
        """
        self.inputs = None
        if self.cross is not None and self.cross.token_ids is None:
            self.cross = None


@dataclass(eq=False, slots=True)
class Sequence(SequenceState):
    """One sample of a request."""

    request: Request
    index: int
    tokens: np.ndarray = field(init=False)
    """Token ids, `[T]` int32, of which the first `length` are valid: prompt and output. The request's own prompt
    array until the sequence gets a row; then T is the maximum length (`reserve`), and after the end the final length
    (`trim`).
    """
    length: int = field(init=False)
    rope_base: int = field(init=False)
    """Length in tokens that rope is computed for: the prompt's length, or the length at the last recomputation."""
    candidates: Candidates | None = None
    """Most likely continuations of a beam that has been stepped, until all beams of the search have theirs."""
    _root: bytes | None = None
    _key: np.ndarray | None = None
    matcher: Matcher | None = None
    """State in the request's grammar, from the first row until the end; a preemption keeps it."""
    cumulative_logprob: float = 0.0
    logprobs: list[tuple[float, int, np.ndarray, np.ndarray]] = field(default_factory=list)
    """Per token: log-probability, rank, and ids and log-probabilities of the most likely tokens."""
    failures: int = 0
    """Number of consecutive failed steps the sequence took part in."""
    failed_at: int = 0
    """Number of output tokens at the last failure."""
    experts: list[np.ndarray] = field(default_factory=list)
    """Experts of each token computed so far, `[n, L, k]` each, with `return_routed_experts`."""
    weight_changes: tuple[tuple[int, int], ...] = ()
    """Number of output tokens at each replacement of the weights, and the version of the new ones."""
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def __post_init__(self) -> None:
        self.tokens = self.request.prompt
        self.length = len(self.tokens)
        self.start_over()

    @property
    def key(self) -> np.ndarray:
        """Random key `[2]` uint32, hashed from seed and sample index."""
        if self._key is None:
            self._key = np.random.SeedSequence([self.request.seed, self.index]).generate_state(2)
        return self._key

    @property
    def root(self) -> bytes:
        """Parent digest of the first block in the prefix index."""
        if self._root is None:
            request = self.request
            own = () if request.cross is None else (request.cross.digest,)
            own += () if request.adapter is None else (b"adapter", request.adapter.digest)
            self._root = root(request.salt, request.length_key(self.rope_base), *own)
        return self._root

    @property
    def output_ids(self) -> np.ndarray:
        """Output token ids, `[made]`."""
        return self.tokens[len(self.request.prompt) : self.length]

    @property
    def made(self) -> int:
        """Number of output tokens."""
        return self.length - len(self.request.prompt)

    def prepare(self) -> None:
        """Allocate room for the output and cache what commit needs per token; called when the sequence gets a row."""
        self.reserve()
        request = self.request
        more = request.listener, request.params.logprobs, request.beams, request.grammar
        self.commit_limit = self.stage_limit if more == (None,) * 4 else 0
        if request.grammar is not None and self.matcher is None:
            forced = request.params.forced_bos_token_id is not None and len(request.prompt) == 1
            self.matcher = Matcher(request.grammar, int(forced))

    def start_over(self) -> None:
        """Compute rope for the current length: initially, and when a new length changes all keys."""
        self.rope_base, self.digests, self._root, self.needed_blocks = self.length, [], None, 0
        self.last_hit = self.checked_inflight = None

    def reserve(self) -> None:
        """Grow `tokens` to the maximum length. The prompt array, shared by all samples, is never written."""
        most = max(self.request.limit, self.length)
        if len(self.tokens) < most:
            known, self.tokens = self.tokens[: self.length], np.empty(most, np.int32)
            self.tokens[: self.length] = known

    def trim(self) -> None:
        """Shrink `tokens` to the final length; the caller may hold the sequence much longer."""
        self.commit_limit = 0
        self.tokens, self.digests, self.matcher = self.tokens[: self.length].copy(), [], None

    def adopt(self, other: "Sequence") -> None:
        """Continue from the state of another sequence of the same request."""
        self.reserve()
        self.tokens[: other.length], self.length = other.tokens[: other.length], other.length
        self.rope_base, self._root, self.digests = other.rope_base, other.root, list(other.digests)
        self.needed_blocks, self.last_hit, self.checked_inflight = 0, None, None
        self.computed, self.prefilled = other.computed, other.prefilled
        self.published, self.hit_blocks, self.num_registered = other.published, other.hit_blocks, 0
        self.stale, self.weight_changes = other.stale, other.weight_changes

    @property
    def stage_limit(self) -> int:
        """Length in tokens at which the sequence ends or must be recomputed."""
        after, limit = self.request.recompute_after, self.request.limit
        return limit if after is None or self.rope_base > after else min(limit, after + 1)

    @property
    def age(self) -> tuple[int, int]:
        """Sort key by arrival; the youngest sequence has the largest."""
        return self.request.arrival, self.index

    def end(self) -> str | None:
        """Return the finish reason implied by the last token or a complete structure, stop strings aside, or None."""
        request, token = self.request, int(self.tokens[self.length - 1])
        if self.made > request.params.min_tokens and token in request.stop_ids:
            self.stop_reason = None if token in request.params.eos_token_ids else token
            return "stop"
        if self.matcher is not None and token not in request.stop_ids:
            self.matcher.advance(self.output_ids)
            if self.matcher.stopped:
                return "stop"
        return "length" if self.length >= request.limit else None

    def count_failure(self) -> int:
        """Count a failed step and return the number of consecutive failures.

        A single token between two failures does not reset the count: it comes from the prefill when every decode fails.
        """
        self.failures = self.failures + 1 if self.made <= self.failed_at + 1 else 1
        self.failed_at = self.made
        return self.failures

    def add(self, token: int) -> str | None:
        """Append a sampled token and return the finish reason, stop strings aside, or None."""
        self.tokens[self.length] = token
        self.length += 1
        return self.end()
