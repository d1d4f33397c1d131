"""Text in, text out."""

import dataclasses
import hashlib
import itertools
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tqdm.auto import tqdm

from jaxinfer import compilation_cache
from jaxinfer.checkpoint.hf import read_config, read_generation_config
from jaxinfer.checkpoint.hub import resolve_model
from jaxinfer.config import EngineConfig
from jaxinfer.engine.metrics import Metric
from jaxinfer.engine.request import Request
from jaxinfer.engine.buckets import SAMPLING
from jaxinfer.engine.setup import build_engine
from jaxinfer.engine.warmup import Warmup, check_sampling, warm_up
from jaxinfer.errors import ConfigError, EngineClosedError
from jaxinfer.generation_config import default_params, eos_ids, from_generation_config
from jaxinfer.handle import Handle
from jaxinfer.models import loading
from jaxinfer.outputs import RequestOutput
from jaxinfer.progress import Progress, say_if_cut
from jaxinfer.resolve import ModelLimits, resolve, spread
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.sharding import make_mesh
from jaxinfer.text import (
    Prompt,
    check_prompt_length,
    check_token_ids,
    max_prompt_chars,
    parse_prompts,
    render_chat,
)
from jaxinfer.text.tokenizer import id_bound, load_tokenizer, longest_token

Params = SamplingParams | Sequence[SamplingParams] | Any | None
"""One for all prompts or one a prompt; a transformers `GenerationConfig` serves as well."""


class LLM:
    """A model that continues prompts; its methods may be called from several threads.

    Args:
        model: a directory with a Hugging Face checkpoint, a Hub id, or an NNX module (then token ids go in
            and come out, unless `tokenizer` is given).
        tokenizer: another directory, Hub id or transformers tokenizer than the model's own.
        skip_tokenizer_init: serve token ids only.
        revision: of the Hub id.
        chat_template: Jinja source to use instead of the tokenizer's.
        hf_overrides: values laid over config.json.
        mesh: a mesh with the axis `model`; by default one over `tensor_parallel_size` devices.
        settings: fields of `EngineConfig`.

    Raises:
        ConfigError, CheckpointError, CapacityError, OfflineError: see `jaxinfer.errors`.
        TypeError: a setting that does not exist.
    """

    def __init__(
        self, model: str | Path | nnx.Module, *, tokenizer: Any = None, skip_tokenizer_init: bool = False,
        revision: str | None = None, chat_template: str | None = None, hf_overrides: Mapping[str, Any] | None = None,
        mesh: Mesh | None = None, use_tqdm: bool = True, **settings: Any,
    ):  # fmt: skip
        self.config = EngineConfig.of(settings)
        self._lock = threading.RLock()
        self._closed = False
        self._ids = itertools.count()
        self._chat_template = chat_template
        if mesh is not None and not isinstance(mesh, Mesh):
            raise TypeError(f"mesh must be a jax.sharding.Mesh, got {type(mesh).__name__}")
        compilation_cache.enable(self.config.compilation_cache_dir)
        self._mesh = mesh or make_mesh(self.config.tensor_parallel_size)
        if isinstance(model, nnx.Module):
            _check_module(self.config)
            self._module, directory, self.default_params, ends = model, None, SamplingParams(), ()
        else:
            directory = resolve_model(model, revision)
            self.default_params = default_params(read_generation_config(directory))
            ends = eos_ids(read_config(directory, hf_overrides), read_generation_config(directory))
            self._module = loading.load(
                directory, self._mesh, dtype=self.config.dtype, quantization=self.config.quantization,
                overrides=hf_overrides, progress=use_tqdm,
            )  # fmt: skip
        source = None if skip_tokenizer_init else directory if tokenizer is None else tokenizer
        self._tokenizer = None if source is None else load_tokenizer(source)
        if directory is None and getattr(self._tokenizer, "eos_token_id", None) is not None:
            ends = (self._tokenizer.eos_token_id,)  # a module brings no configuration that would name them
        known = None if self._tokenizer is None else id_bound(self._tokenizer)
        self._engine = build_engine(self._module, self.config, self._mesh, sampled_vocab=known)
        self._salt = f"{model if directory else id(model)}|{revision}".encode()
        self._limits = ModelLimits(
            self._module.config.vocab_size, self._engine.runner.shapes.max_length, ends, known
        )

    def generate(
        self, prompts: Any, sampling_params: Params = None, *, use_tqdm: bool = True
    ) -> list[RequestOutput]:
        """Continues each prompt; results in the order of the prompts.

        Args:
            prompts: a string, a list of token ids, `{"prompt": ...}` or `{"prompt_token_ids": ...}` with an
                optional `"cache_salt"`, or a list of these.
            sampling_params: one for all or one a prompt; by default what generation_config.json says.
            use_tqdm: whether a progress bar is shown.

        Raises:
            TypeError, ValueError: a prompt or parameter that cannot be served; nothing was queued then.
        """
        handles = self._prepare(parse_prompts(prompts, max_chars=self._max_chars()), sampling_params)
        return self._finish(handles, use_tqdm)

    def chat(
        self, messages: Any, sampling_params: Params = None, *, use_tqdm: bool = True,
        chat_template: str | None = None, add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:  # fmt: skip
        """Answers a conversation, or each of a list of conversations.

        Without parameters an answer runs to its end.

        Raises:
            ChatTemplateError: no template, or one that fails; otherwise as `generate`.
        """
        prompts = self._render(messages, chat_template, add_generation_prompt, chat_template_kwargs)
        return self._finish(self._prepare(prompts, self._chat_params(sampling_params)), use_tqdm)

    def stream(self, prompts: Any, sampling_params: Params = None) -> Iterator[RequestOutput]:
        """Continues prompts and yields what is new as it is made, in the form `output_kind` says.

        The deltas of a sample add up to its final text. Closing the iterator aborts what is unfinished.
        """
        return self._watch(self._prepare(
            parse_prompts(prompts, max_chars=self._max_chars()), sampling_params, streaming=True
        ))  # fmt: skip

    def stream_chat(
        self, messages: Any, sampling_params: Params = None, *, chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Iterator[RequestOutput]:  # fmt: skip
        """`chat`, streaming."""
        prompts = self._render(messages, chat_template, True, chat_template_kwargs)
        return self._watch(self._prepare(prompts, self._chat_params(sampling_params), streaming=True))

    def abort(self, request_id: Any) -> None:
        """Ends one request or a list of them, wherever they are; their outputs say "abort".

        Ids that are unknown or finished do nothing.
        """
        ids = [request_id] if isinstance(request_id, str) else request_id
        if not isinstance(ids, (list, tuple, set)) or not all(isinstance(one, str) for one in ids):
            raise TypeError(f"request_id must be a string or a list of strings, got {request_id!r}")
        with self._lock:
            self._check_open()
            for one in ids:
                self._engine.abort(one)

    def get_tokenizer(self) -> Any:
        """The transformers tokenizer; None where it was skipped."""
        return self._tokenizer

    def get_metrics(self) -> list[Metric]:
        """Counters, gauges and histograms as they are now."""
        with self._lock:
            self._check_open()
            return self._engine.readings()

    def warmup(
        self, *, sampling: Collection[str] = SAMPLING, threads: int | None = None, use_tqdm: bool = True
    ) -> Warmup:
        """Compiles every step that requests can need, so that none of them waits for the compiler.

        Requests may be served meanwhile. With the compilation cache filled, programs are read from it.

        Args:
            sampling: what requests will ask for, where the sampler's variants are programs of their own (GPUs; on a CPU
                one program serves all): "greedy", "random" (temperature, min-p), "truncated" (top-k, top-p), "edited"
                (penalties, biases, masks), "logprobs", "prompt_logprobs"; by default everything.
            threads: that compile, by default as many as there are processors, at most 16.
            use_tqdm: whether a progress bar is shown.

        Raises:
            ValueError: another name in `sampling`.
        """
        names = check_sampling(sampling)
        with self._lock:
            self._check_open()
            programs = self._engine.runner.prepare(names)
        return warm_up(programs, names, threads=threads, use_tqdm=use_tqdm)

    def reset_prefix_cache(self) -> None:
        """Forgets all cached prefixes."""
        with self._lock:
            self._check_open()
            self._engine.reset_prefix_cache()

    def update_weights(self, weights: Any) -> None:
        """Replaces all weights by those of an NNX module or state of the same structure; cached prefixes are forgotten.

        Raises:
            ConfigError: another structure, shape or dtype.
            RuntimeError: requests are running.
        """
        with self._lock:
            self._check_open()
            if not self._engine.settle():
                raise RuntimeError("update_weights while requests are running; finish or abort them first")
            state = nnx.state(weights) if isinstance(weights, nnx.Module) else weights
            runner = self._engine.runner
            new, tree = jax.tree.flatten(state)
            if tree != runner.program.tree or any(
                (a.shape, a.dtype) != (b.shape, b.dtype) for a, b in zip(new, runner.params, strict=True)
            ):
                raise ConfigError("update_weights needs the same parameters, shapes and dtypes as the model has")
            runner.params = [jax.device_put(a, b.sharding) for a, b in zip(new, runner.params, strict=True)]
            self._engine.reset_prefix_cache()

    def close(self) -> None:
        """Ends all requests and gives the cache's memory back; a second time does nothing."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._engine.close()
                del self._engine, self._module

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosedError("this LLM is closed; make a new one")

    def _max_chars(self) -> int | None:
        self._check_open()
        if self._tokenizer is None:
            return None
        return max_prompt_chars(longest_token(self._tokenizer), self._limits.max_model_len)

    def _render(
        self, messages: Any, template: str | None, add_generation_prompt: bool, kwargs: Mapping[str, Any] | None
    ) -> list[Prompt]:
        self._check_open()
        if self._tokenizer is None:
            raise ValueError("chat needs the tokenizer, which was skipped; pass tokenizer=")
        rendered = render_chat(
            self._tokenizer, messages, chat_template=template or self._chat_template,
            add_generation_prompt=add_generation_prompt, chat_template_kwargs=kwargs,
        )  # fmt: skip
        prompts = parse_prompts(rendered, max_chars=self._max_chars())
        # The template writes the special tokens itself.
        return [Prompt(p.text, tuple(self._encode(p.text)), p.cache_salt) for p in prompts]

    def _chat_params(self, params: Params) -> Params:
        return dataclasses.replace(self.default_params, max_tokens=None) if params is None else params

    def _encode(self, text: str, special: bool = False) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=special)

    def _prepare(self, prompts: Sequence[Prompt], params: Params, *, streaming: bool = False) -> list[Handle]:
        """Checks the whole call; nothing is queued yet."""
        self._check_open()
        if params is not None and hasattr(params, "to_dict"):
            params = from_generation_config(params)
        each = spread(self.default_params if params is None else params, len(prompts))
        requests = [self._request(index, p, own) for index, (p, own) in enumerate(zip(prompts, each, strict=True))]
        with self._lock:
            self._check_open()
            for request in requests:
                self._engine.check(request)
        return [
            Handle(request, prompt.text, self._tokenizer, streaming=streaming)
            for request, prompt in zip(requests, prompts, strict=True)
        ]

    def _queue(self, handles: Sequence[Handle]) -> None:
        with self._lock:
            self._check_open()
            for handle in handles:
                self._engine.add(handle.request)

    def _request(self, index: int, prompt: Prompt, params: SamplingParams) -> Request:
        if prompt.token_ids is None and self._tokenizer is None:
            raise ValueError(f"prompt {index} is text, but there is no tokenizer; pass prompt_token_ids")
        ids = prompt.token_ids if prompt.token_ids is not None else self._encode(prompt.text, True)
        if not ids:
            raise ValueError(f"prompt {index} has no tokens")
        limits = self._limits
        check_token_ids(ids, limits.vocab_size, index)
        check_prompt_length(len(ids), limits.max_model_len, index)
        if params.stop and self._tokenizer is None:
            raise ValueError(f"prompt {index}: stop strings need a tokenizer; use stop_token_ids")
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(params, name) or 0) > self.config.max_logprobs:
                raise ValueError(
                    f"prompt {index}: {name} is {getattr(params, name)}, more than max_logprobs = "
                    f"{self.config.max_logprobs} of this LLM; ask for fewer, or make it with a larger max_logprobs"
                )
        encode = None if self._tokenizer is None else self._encode
        own = resolve(params, limits, prompt_len=len(ids), encode=encode)
        salts, config = (self._salt, (prompt.cache_salt or "").encode()), self._module.config
        number = next(self._ids)
        return Request(
            id=str(number), prompt=np.array(ids, np.int32), params=own, limit=len(ids) + own.max_tokens,
            salt=b"".join(hashlib.sha256(salt).digest() for salt in salts),
            length_key=config.length_key, recompute_after=config.recompute_after,
            seed=self._seed(number) if own.seed is None else own.seed,
        )  # fmt: skip

    def _seed(self, number: int) -> int:
        """Of a request that brings none: from the engine's seed and the request's number."""
        return int(np.random.SeedSequence([self.config.seed, number, 1]).generate_state(1, np.uint64)[0])

    def _drive(self, busy: Callable[[], bool]) -> None:
        """Steps until `busy` is false; whoever holds the lock steps for all."""
        while busy():
            with self._lock:
                self._check_open()
                if busy():
                    self._engine.step()

    def _abandon(self, handles: Sequence[Handle]) -> None:
        with self._lock:
            if not self._closed:
                for handle in handles:
                    self._engine.abort(handle.request.id)

    def _finish(self, handles: list[Handle], use_tqdm: bool) -> list[RequestOutput]:
        try:
            self._queue(handles)
            with tqdm(total=len(handles), desc="Processed prompts", disable=not use_tqdm, dynamic_ncols=True) as bar:
                progress = Progress(bar, handles)
                self._drive(progress.unfinished)
        finally:
            self._abandon(handles)
        say_if_cut(handles)
        return [handle.output() for handle in handles]

    def _watch(self, handles: list[Handle]) -> Iterator[RequestOutput]:
        left = list(handles)
        try:
            self._queue(handles)
            while left:
                with self._lock:
                    self._check_open()
                    if any(not handle.finished for handle in left):
                        self._engine.step()
                    updates = [handle.update(handle.request.params.output_kind) for handle in left]
                left = [handle for handle in left if not handle.finished]
                yield from (update for update in updates if update is not None)
        finally:
            self._abandon(handles)


def _check_module(config: EngineConfig) -> None:
    """Refuses what only a checkpoint that is still to be loaded can be given."""
    if config.quantization is not None:
        raise ConfigError(
            f"quantization is {config.quantization!r}, but a module has its weights already; leave it out, and make "
            f"the module with models.loading.load(directory, mesh, quantization={config.quantization!r})"
        )
