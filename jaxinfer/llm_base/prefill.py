"""Base class of `LLM` that computes prompts and samples no token: scores, embeddings, hidden states."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxinfer.engine.request import Request
from jaxinfer.engine.wanted import Kept, Pooled, Wanted
from jaxinfer.errors import ConfigError, EngineError
from jaxinfer.functional.taps import LAST, normalise
from jaxinfer.inputs.prompts import Prompt
from jaxinfer.llm_base.requests import RequestCalls
from jaxinfer.outputs import EmbeddingOutput, HiddenStates, ScoreOutput
from jaxinfer.results.output_processor import Handle

POOLINGS = (LAST_TOKEN, MEAN) = ("last", "mean")
"""Ways in which `embed` pools a prompt's hidden states to one vector."""


class PrefillOnly(RequestCalls):
    """Methods of `LLM` whose requests end with their prefill; `AsyncLLM` has the same for one prompt."""

    def score(self, prompts: Any, completions: Any, *, use_tqdm: bool = True) -> list[ScoreOutput]:
        """Compute the log-probabilities of given completions, without sampling a token.

        They equal those that `generate` reports (`SamplingParams.logprobs`) for the same tokens after the same prompt,
        bit for bit with `deterministic`. A common prefix of several prompts is computed once.

        Args:
            prompts: in any form that `generate` takes.
            completions: one per prompt, or several for a single prompt; each is a text or token ids. A text is
                tokenised on its own, without special tokens.
            use_tqdm: whether to show a progress bar.

        Returns:
            One score per completion, in order.

        Raises:
            TypeError, ValueError: a prompt or completion is invalid, empty, or too long for the model; nothing was
                queued.
            EngineError: a request failed.
        """
        self._check_open()
        return [score_of(handle.request) for handle in self._run(*self._scores(prompts, completions), use_tqdm)]

    def embed(
        self, prompts: Any, *, pooling: str = LAST_TOKEN, normalize: bool = True, use_tqdm: bool = True
    ) -> list[EmbeddingOutput]:
        """Compute an embedding of each prompt from the hidden states after the final norm.

        Args:
            prompts: in any form that `generate` takes.
            pooling: "last" for the hidden state of the last token; "mean" for the mean over all tokens, for which no
                cached prefix is used.
            normalize: whether embeddings are divided by their Euclidean norm.
            use_tqdm: whether to show a progress bar.

        Returns:
            One embedding per prompt, in order.

        Raises:
            TypeError, ValueError: a prompt or option is invalid; nothing was queued.
            EngineError: a request failed, or its hidden states are not finite.
        """
        self._check_open()
        handles = self._run(*self._embeds(prompts, pooling), use_tqdm)
        return [embedding_of(handle.request, normalize=normalize) for handle in handles]

    def hidden_states(self, prompts: Any, capture: Sequence[str], *, use_tqdm: bool = True) -> list[HiddenStates]:
        """Compute the outputs of modules for each token of the prompts.

        Args:
            prompts: in any form that `generate` takes.
            capture: paths such as "layers.11", "layers.11.attention", "layers.11.mlp", "embedding", "norm", or
                "last_hidden_state", the output of the model.
                use_tqdm: whether to show a progress bar.

            Returns:
                One result per prompt, in order.

        Raises:
            TypeError, ValueError: a prompt is invalid; nothing was queued.
            ConfigError: the model has no such module, its output has no row for each token, or the engine is
                deterministic and was not made to return it (`EngineConfig.capture`).
            EngineError: a request failed.
        """
        self._check_open()
        handles = self._run(*self._captures(prompts, capture), use_tqdm)
        return [states_of(handle.request) for handle in handles]

    def _run(self, requests: Sequence[Request], prompts: Sequence[Prompt], use_tqdm: bool) -> list[Handle]:
        handles = self._checked(requests, prompts, Handle)
        self._serve(handles, use_tqdm)
        for index, handle in enumerate(handles):
            check_ended(handle.request, f"prompt {index}: ")
        return handles

    def _scores(self, prompts: Any, completions: Any) -> tuple[list[Request], list[Prompt]]:
        processor = self._input_processor
        parsed = processor.parse(prompts)
        if len(parsed) == 1 and isinstance(completions, list | tuple) and not _is_one(completions):
            parsed *= len(completions)
        tokens = processor.completions(completions, len(parsed))
        return processor.prefills(parsed, lambda prompt, _: Wanted(prompt - 1), tokens), parsed

    def _embeds(self, prompts: Any, pooling: str) -> tuple[list[Request], list[Prompt]]:
        if pooling not in POOLINGS:
            raise ValueError(f"pooling must be {' or '.join(map(repr, POOLINGS))}, got {pooling!r}")
        parsed, mean = self._input_processor.parse(prompts), pooling == MEAN

        def wants(_: int, length: int) -> Wanted:
            first = 0 if mean else length - 1
            return Wanted(first, (LAST,), Pooled(first, mean=mean))

        return self._input_processor.prefills(parsed, wants), parsed

    def _captures(self, prompts: Any, capture: Sequence[str]) -> tuple[list[Request], list[Prompt]]:
        if isinstance(capture, str) or not capture or not all(isinstance(path, str) for path in capture):
            raise TypeError(f"capture must be a list of paths such as ['layers.11'], got {capture!r}")
        paths, runner = tuple(dict.fromkeys(map(normalise, capture))), self._engine.runner
        for path, output in runner.programs.captured(paths).items():
            if len(output.shape) < 2:
                raise ConfigError(f"{path} has no row for each token: its output is {list(output.shape)}")
        missing = [path for path in paths if path not in runner.shapes.capture]
        if runner.program.deterministic and missing:
            raise ConfigError(
                f"capture: the step of this deterministic engine does not return {', '.join(missing)}; make the "
                f"LLM with capture={missing}"
            )
        parsed = self._input_processor.parse(prompts)
        return self._input_processor.prefills(parsed, lambda *_: Wanted(0, paths, Kept())), parsed


def _is_one(completions: Sequence[Any]) -> bool:
    """Return whether a list is one completion of token ids."""
    return bool(completions) and isinstance(completions[0], int | np.integer)


def check_ended(request: Request, where: str = "") -> None:
    """Raise EngineError unless a request has computed its whole prefill."""
    [sequence] = request.sequences
    if sequence.finish_reason != "length":
        raise EngineError(f"{where}{request.error or 'the request was aborted'}")


def score_of(request: Request) -> ScoreOutput:
    """Return the result of a request made for `score`."""
    ids, first = request.prompt.tolist(), request.first_scored + 1
    found = [float(value) for part in request.prompt_logprobs for value in part.chosen]
    ranks = [int(rank) for part in request.prompt_logprobs for rank in part.rank]
    return ScoreOutput(ids[:first], ids[first:], found, request.cached_tokens, ranks)


def embedding_of(request: Request, *, normalize: bool) -> EmbeddingOutput:
    """Return the result of a request made for `embed`."""
    vector = request.wanted.captures.vector()
    if not np.isfinite(vector).all():
        raise EngineError("the hidden states of a prompt are not finite, so it has no embedding")
    if normalize:
        vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
    return EmbeddingOutput(request.prompt.tolist(), vector.astype(np.float32), request.cached_tokens)


def states_of(request: Request) -> HiddenStates:
    """Return the result of a request made for `hidden_states`."""
    return HiddenStates(request.prompt.tolist(), request.wanted.captures.arrays())
