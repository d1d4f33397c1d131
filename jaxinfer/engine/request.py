"""What the engine is asked for and how far it is: a request and its sequences."""

import itertools
import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxinfer.engine.beam_search.beams import Beams
from jaxinfer.engine.sampling.sampler import Candidates, Logprobs
from jaxinfer.engine.sampling.sampling_rows import Level, SamplingRows, pack_rows
from jaxinfer.kv.cross_cache import Encoded
from jaxinfer.kv.prefix import NO_EXTRAS, Extras, root
from jaxinfer.media import CrossInputs, PlacedInputs
from jaxinfer.outputs import KindHit
from jaxinfer.sampling_params import SamplingParams

_arrivals = itertools.count()


class Status(Enum):
    """The states of a sequence. A preempted one is waiting again."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@runtime_checkable
class Listener(Protocol):
    """Who wants tokens as they come: streaming and stop strings. It runs for its own request alone."""

    def on_token(self, sequence: "Sequence", reason: str | None) -> str | None:
        """Take a token that was added, and return the stop string that it completed, or None.

        `reason`: why the token ends the sequence, stop strings aside; None if it goes on.
        """
        ...


@dataclass(eq=False, slots=True)
class Request:
    """One prompt and how to continue it; validated before it comes here.

    A call may queue a hundred thousand of them, so what is not needed before a row is free is made then.
    """

    id: str
    prompt: np.ndarray
    """`[L]` int32."""
    params: SamplingParams
    """Resolved against the model."""
    limit: int
    """Tokens each sequence may reach, prompt included."""
    asked: int | None = None
    """Tokens each sequence could reach if the pool had room; None: `limit`."""
    clamped_max_tokens: int | None = None
    """New tokens each sequence may make, if the pool holds fewer than were asked for."""
    salt: bytes = b""
    """Told apart in the prefix cache by it: model and the caller's own."""
    length_key: Callable[[int], bytes] = lambda length: b""
    """What of the length that rope followed changes the keys (`ModelConfig.length_key`)."""
    recompute_after: int | None = None
    """Tokens after which rope changes for the whole sequence (`ModelConfig.recompute_after`)."""
    seed: int = 0
    inputs: PlacedInputs | None = None
    """What of the prompt is no text: images, and the tokens whose places they take."""
    cross: CrossInputs | None = None
    """What its encoder reads, and its tokens attend to."""
    rule: int = 0
    """What the model's rule over tokens is told of it (`models.base.TokenRule`); 0: it does not hold."""
    extras: Extras = field(default_factory=lambda: NO_EXTRAS)
    """What beside their tokens its blocks hold: set when it is queued."""
    encoded: Encoded | None = None
    """`cross` as the cache knows it: likewise."""
    beams: Beams | None = None
    """Of a beam search: its sequences are the beams that run, at first one; they end together."""
    listener: Listener | None = None
    on_finish: Callable[["Request"], None] | None = None
    """Called when all its sequences have finished; after a failed step perhaps a second time."""
    sequences: list["Sequence"] = field(default_factory=list)
    prompt_logprobs: list[Logprobs] = field(default_factory=list)
    """One a chunk, each `[T, ...]`; of the tokens from the second on."""
    arrival: int = field(default_factory=lambda: next(_arrivals))
    arrival_time: float = field(default_factory=time.monotonic)
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    preemptions: int = 0
    cached_tokens: int = 0
    """Tokens of the prompt found in the prefix cache."""
    miss_reason: str | None = None
    hits: tuple[KindHit, ...] = ()
    """What each kind of layer could have served of the prompt from the prefix cache."""
    error: str | None = None
    stop_ids: frozenset[int] = field(init=False)
    """Tokens that end a sequence."""

    def __post_init__(self) -> None:
        self.sequences = [Sequence(self, index) for index in range(self.params.n)]
        self.stop_ids = self.params.all_stop_token_ids

    @property
    def finished(self) -> bool:
        """Whether all its sequences are."""
        return all(s.status is Status.FINISHED for s in self.sequences)

    def drop_inputs(self) -> None:
        """Let go of images and sound once all its sequences have finished: until then any may be preempted and read
        them again.

        A caller's call may hold the request much longer. Texts stay, as results name their tokens.
        """
        self.inputs = None
        if self.cross is not None and self.cross.token_ids is None:
            self.cross = None

    @property
    def level(self) -> Level:
        """The least sampler level that serves its steps, those apart in which tokens are forbidden for a while
        (`forbidden`)."""
        p = self.params
        penalties = p.repetition_penalty, p.presence_penalty, p.frequency_penalty, p.no_repeat_ngram_size
        if penalties != (1, 0, 0, 0) or self.biased or self.rule:
            return Level.EDITED
        if p.temperature == 0:
            return Level.GREEDY
        return Level.TRUNCATED if p.top_k > 0 or p.top_p < 1 else Level.RANDOM

    @property
    def biased(self) -> bool:
        """Whether some tokens are biased or forbidden in all its steps."""
        p = self.params
        return bool(p.logit_bias or p.allowed_token_ids is not None or any(len(words) == 1 for words in _bad_words(p)))

    @property
    def forbids_for_a_while(self) -> bool:
        """Whether `forbidden` may name tokens in some of its steps."""
        return (self.params.min_tokens > 0 and bool(self.stop_ids)) or bool(_phrases(self.params))


@dataclass(eq=False, slots=True)
class Sequence:
    """One sample of a request."""

    request: Request
    index: int
    status: Status = Status.WAITING
    row: int = -1
    """Its place in the tables and in the sampler's state while it runs."""
    tokens: np.ndarray = field(init=False)
    """`[T]` int32, the first `length` of them known: the prompt and what was made. It is the prompt's own array until
    the sequence gets a row; then T is the most it may have (`reserve`), and once it has finished what it has
    (`trim`)."""
    length: int = field(init=False)
    rope_base: int = field(init=False)
    """Tokens whose rope follows one length, this one: the prompt's, or all that were recomputed for a new rope."""
    computed: int = 0
    """Tokens whose keys and values a dispatched prefill wrote or a hit brought."""
    prefilled: int = 0
    """Tokens to compute before it decodes: all that were known when it was admitted."""
    digests: list[bytes] = field(default_factory=list)
    published: int = 0
    """Its first blocks that are in the prefix index."""
    hit_blocks: int = 0
    """Of them, those it found there."""
    announced: int = 0
    """Its first blocks that others may wait for, until they are published."""
    awaits: bytes | None = None
    """While it waits: the last block of its prompt that another sequence is computing."""
    pending: int = 0
    """Tokens sampled by dispatched steps and not seen by the host yet."""
    candidates: Candidates | None = None
    """Of a beam that has had its step: its likeliest continuations, until all beams have theirs."""
    bias_version: int | tuple[int, ...] = -1
    """While it runs: the tokens that are forbidden for a while in the bias that the device has of its row; -1: it has
    none."""
    bound: int = 0
    """While it runs: tokens at which the host must look at it (`stage_limit`)."""
    watched: bool = False
    """While it runs: whether each token means more to the host than to be kept."""
    needed_blocks: int = 0
    """While it waits: blocks that must be available for it, as the last try to admit it found; 0: it was not too
    few."""
    unknown: bytes | None = None
    """The first block of its prompt that was in no cache then: once it is, fewer are needed."""
    _root: bytes | None = None
    _key: np.ndarray | None = None
    cumulative_logprob: float = 0.0
    logprobs: list[tuple[float, int, np.ndarray, np.ndarray]] = field(default_factory=list)
    """One a token: log-probability, rank, ids and log-probabilities of the most likely."""
    failures: int = 0
    """Steps it was in that failed, in a row."""
    failed_at: int = 0
    """Tokens made when the last of them did."""
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def __post_init__(self) -> None:
        self.tokens = self.request.prompt
        self.length = len(self.tokens)
        self.start_over()

    @property
    def key(self) -> np.ndarray:
        """`[2]` uint32: seed and index, hashed."""
        if self._key is None:
            self._key = np.random.SeedSequence([self.request.seed, self.index]).generate_state(2)
        return self._key

    @property
    def root(self) -> bytes:
        """The parent of its first block in the prefix index."""
        if self._root is None:
            request = self.request
            read = () if request.cross is None else (request.cross.digest,)
            self._root = root(request.salt, request.length_key(self.rope_base), *read)
        return self._root

    @property
    def output_ids(self) -> np.ndarray:
        """`[made]` the tokens made so far."""
        return self.tokens[len(self.request.prompt) : self.length]

    @property
    def made(self) -> int:
        """Tokens made so far."""
        return self.length - len(self.request.prompt)

    def prepare(self) -> None:
        """Once it has a row: make room for its tokens, and note what a step's commit asks of each of them."""
        self.reserve()
        self.bound = self.stage_limit
        request = self.request
        self.watched = request.listener is not None or request.params.logprobs is not None or request.beams is not None

    def start_over(self) -> None:
        """Lets rope follow the length it has now: at the start, and when that changes all its keys."""
        self.rope_base, self.digests, self._root, self.needed_blocks = self.length, [], None, 0

    def reserve(self) -> None:
        """Make room for all the tokens that it may have. Nothing is written to the prompt's array, which its samples
        share."""
        most = max(self.request.limit, self.length)
        if len(self.tokens) < most:
            known, self.tokens = self.tokens[: self.length], np.empty(most, np.int32)
            self.tokens[: self.length] = known

    def trim(self) -> None:
        """Once it has finished: keep its tokens alone, as a caller may read them much later."""
        self.tokens, self.digests = self.tokens[: self.length].copy(), []

    def adopt(self, other: "Sequence") -> None:
        """Goes on from where another sequence of its request is."""
        self.reserve()
        self.tokens[: other.length], self.length = other.tokens[: other.length], other.length
        self.rope_base, self._root, self.digests = other.rope_base, other.root, list(other.digests)
        self.needed_blocks = 0
        self.computed, self.prefilled = other.computed, other.prefilled
        self.published, self.hit_blocks, self.announced = other.published, other.hit_blocks, 0

    @property
    def stage_limit(self) -> int:
        """Tokens it may reach before it ends or must be recomputed."""
        after, limit = self.request.recompute_after, self.request.limit
        return limit if after is None or self.rope_base > after else min(limit, after + 1)

    @property
    def age(self) -> tuple[int, int]:
        """Orders sequences by arrival; the youngest is the largest."""
        return self.request.arrival, self.index

    def end(self) -> str | None:
        """The reason its last token ends it, stop strings aside; None: it goes on."""
        request, token = self.request, int(self.tokens[self.length - 1])
        if self.made > request.params.min_tokens and token in request.stop_ids:
            self.stop_reason = None if token in request.params.eos_token_ids else token
            return "stop"
        return "length" if self.length >= request.limit else None

    def blame(self) -> int:
        """Notes that a step it was in failed; how many did in a row.

        A token between two failures is no success: it is that of the prefill, where every decode fails.
        """
        self.failures = self.failures + 1 if self.made <= self.failed_at + 1 else 1
        self.failed_at = self.made
        return self.failures

    def add(self, token: int) -> str | None:
        """Takes a sampled token; the reason it ends the sequence, or None.

        A stop string is looked for by the request's listener, which may end it as well.
        """
        self.tokens[self.length] = token
        self.length += 1
        request, reason = self.request, self.end()
        if request.listener is not None:
            stop = request.listener.on_token(self, reason)
            if stop is not None:
                self.stop_reason, reason = stop, "stop"
        return reason


def settings(sequence: Sequence) -> np.ndarray:
    """`[WIDTH]` what a sequence that has a row asks of the sampler; the position is the step's own."""
    request, p = sequence.request, sequence.request.params
    values = SamplingRows(
        row=sequence.row,
        position=0,
        key=sequence.key[None],
        temperature=p.temperature,
        top_k=p.top_k,
        top_p=p.top_p,
        min_p=p.min_p,
        presence=p.presence_penalty,
        frequency=p.frequency_penalty,
        repetition=p.repetition_penalty,
        edited=request.level >= Level.EDITED,
        prompt_length=len(request.prompt),
        logprobs=p.logprobs is not None,
        ngram=p.no_repeat_ngram_size,
        forced_first=_forced(p.forced_bos_token_id if len(request.prompt) == 1 else None),
        forced_last=_forced(p.forced_eos_token_id),
        last_position=request.limit - 1,
        rule=request.rule,
    )
    return pack_rows(SamplingRows(*map(np.atleast_1d, values)))[0]


def _forced(token: int | None) -> int:
    """A token as the sampler is told of it: 0 for none."""
    return 0 if token is None or token < 0 else token + 1


def _bad_words(params: SamplingParams) -> tuple[tuple[int, ...], ...]:
    """Return all token sequences that may not be completed."""
    return params.bad_words_token_ids + params.bad_words_ids


def _phrases(params: SamplingParams) -> list[tuple[int, ...]]:
    """Return those of several tokens, whose last one is forbidden after the others only."""
    return [words for words in _bad_words(params) if len(words) > 1]


def forbidden(sequence: Sequence, position: int) -> tuple[int, ...]:
    """Return the tokens that are forbidden at `position` but not in every step, sorted.

    They are those that would end an output before `min_tokens`, and the last tokens of phrases whose other tokens come
    before the position: in the output, or for `bad_words_ids` of transformers in prompt and output.
    """
    request, params = sequence.request, sequence.request.params
    prompt, found = len(request.prompt), set()
    if position - prompt < params.min_tokens:
        found |= request.stop_ids
    for words in _phrases(params):
        start = position - len(words) + 1
        first = 0 if words in params.bad_words_ids else prompt
        if start >= first and np.array_equal(sequence.tokens[start:position], words[:-1]):
            found.add(words[-1])
    return tuple(sorted(found))


def bias_row(sequence: Sequence, position: int, vocab: int) -> tuple[tuple[int, ...], Items[Any] | np.ndarray]:
    """Return the bias of the token at `position`, and a version of it, by which it is seen whether the device has it
    already.

    The version is `forbidden`, as all else is the same in every step. The bias is empty where the device has it.
    """
    params, version = sequence.request.params, forbidden(sequence, position)
    if version == sequence.bias_version:
        return version, ()
    bias = np.zeros(vocab, np.float32)
    if params.allowed_token_ids is not None:
        bias[:] = -np.inf
        bias[list(params.allowed_token_ids)] = 0
    for token, value in (params.logit_bias or {}).items():
        bias[token] += value
    bias[[words[0] for words in _bad_words(params) if len(words) == 1] + list(version)] = -np.inf
    return version, bias


def follows_history(request: Request) -> bool:
    """Return whether the host must know every token before it can say what the next may be."""
    return request.beams is not None or bool(_phrases(request.params))
