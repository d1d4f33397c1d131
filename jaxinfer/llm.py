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
from jax.sharding import Mesh, NamedSharding
from tqdm.auto import tqdm

from jaxinfer import compilation_cache, distributed
from jaxinfer.checkpoint.hf import read_config, read_generation_config
from jaxinfer.checkpoint.hub import resolve_model
from jaxinfer.config import EngineConfig
from jaxinfer.engine.metrics import Metric
from jaxinfer.engine.request import Request
from jaxinfer.engine.buckets import SAMPLING
from jaxinfer.engine import agreement
from jaxinfer.engine.follow import Leader, follow
from jaxinfer.engine.setup import build_engine
from jaxinfer.engine.warmup import Warmup, check_sampling, warm_up
from jaxinfer.errors import CapacityError, ConfigError, DistributedError, EngineClosedError
from jaxinfer.generation_config import default_params, eos_ids, from_generation_config
from jaxinfer.handle import Handle
from jaxinfer.media import ImageProcessor, MediaReader, PlacedInputs
from jaxinfer.models import loading
from jaxinfer.models.base import Features
from jaxinfer.models.registry import family
from jaxinfer.outputs import RequestOutput
from jaxinfer.progress import Progress, say_if_cut
from jaxinfer.resolve import ModelLimits, resolve, spread
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.sharding import make_mesh
from jaxinfer.sharding import mesh as meshes
from jaxinfer.sharding.policy import Placement
from jaxinfer.text import (
    Prompt,
    chat_images,
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
        mesh: a mesh with the axis `model`, and for a model with a vision tower `data` to divide images over; by default
            one over `tensor_parallel_size` devices.
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
        self._lock = threading.RLock()
        self._closed = False
        self._ids = itertools.count()
        self._chat_template = chat_template
        if mesh is not None and not isinstance(mesh, Mesh):
            raise TypeError(f"mesh must be a jax.sharding.Mesh, got {type(mesh).__name__}")
        self._group = distributed.join(mesh, settings.get("peer_timeout"))
        with distributed.guard(self._group):
            self.config = EngineConfig.of(settings)
            compilation_cache.enable(self.config.compilation_cache_dir)
            if self._group is not None:
                self.config, hf_overrides = agreement.settings(self._group, self.config, hf_overrides)
            self._mesh = self._make_mesh(mesh, "tensor_parallel_size" in settings)
            self._set_up(model, tokenizer, skip_tokenizer_init, revision, hf_overrides, use_tqdm)

    def _set_up(
        self, model: str | Path | nnx.Module, tokenizer: Any, skip_tokenizer_init: bool, revision: str | None,
        hf_overrides: Mapping[str, Any] | None, use_tqdm: bool,
    ) -> None:  # fmt: skip
        """The model, its tokenizer and the engine."""
        if isinstance(model, nnx.Module):
            _check_module(model, self.config, self._mesh)
            self._module, directory, self.default_params, ends = model, None, SamplingParams(), ()
        else:
            directory = resolve_model(model, revision)
            if self._group is not None:
                agreement.files(self._group, directory)
            self.default_params = default_params(read_generation_config(directory))
            ends = eos_ids(read_config(directory, hf_overrides), read_generation_config(directory))
            self._module = loading.load(
                directory, self._mesh, dtype=self.config.dtype, quantization=self.config.quantization,
                overrides=hf_overrides, placement=Placement.of(self.config.placement),
                pad_heads=self.config.pad_heads, progress=use_tqdm,
            )  # fmt: skip
        source = None if skip_tokenizer_init or self._follows else directory if tokenizer is None else tokenizer
        self._tokenizer = None if source is None else load_tokenizer(source)
        if directory is None and getattr(self._tokenizer, "eos_token_id", None) is not None:
            ends = (self._tokenizer.eos_token_id,)  # a module brings no configuration that would name them
        self._media = None
        if self._module.config.features is not None:
            self._media = _media_reader(self._module.config.features, self._tokenizer, directory, hf_overrides)
        known = None if self._tokenizer is None else id_bound(self._tokenizer)
        if self._group is not None:
            known = self._group.share(known)[0]
        self._engine = build_engine(self._module, self.config, self._mesh, sampled_vocab=known)
        if self._group is not None:
            agreement.steps(self._group, self._engine.runner)
            self._engine.runner.leader = None if self._follows else Leader(self._group)
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
                optional `"cache_salt"`, or a list of these. For a model that reads images also with
                `"multi_modal_data"`: `{"image": one or a list of PIL images or arrays}` (`media.images.as_rgb`) or,
                preprocessed, `{"pixel_values": one or a list of arrays [n, C, height, width], one an image}`. A text has
                the model's image marker where each image belongs; token ids have all of each image's tokens.
            sampling_params: one for all or one a prompt; by default what generation_config.json says.
            use_tqdm: whether a progress bar is shown.

        Raises:
            TypeError, ValueError: a prompt or parameter that cannot be served; nothing was queued then.
        """
        handles = self._prepare(self._parse(prompts), sampling_params)
        return self._finish(handles, use_tqdm)

    def chat(
        self, messages: Any, sampling_params: Params = None, *, use_tqdm: bool = True,
        chat_template: str | None = None, add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:  # fmt: skip
        """Answers a conversation, or each of a list of conversations.

        Without parameters an answer runs to its end. The content of a message is text or a list of parts, of which
        `{"type": "image", "image": PIL image or array}` is an image for a model that reads them.

        Raises:
            ChatTemplateError: no template, or one that fails; otherwise as `generate`.
        """
        prompts = self._render(messages, chat_template, add_generation_prompt, chat_template_kwargs)
        return self._finish(self._prepare(prompts, self._chat_params(sampling_params)), use_tqdm)

    def stream(self, prompts: Any, sampling_params: Params = None) -> Iterator[RequestOutput]:
        """Continues prompts and yields what is new as it is made, in the form `output_kind` says.

        The deltas of a sample add up to its final text. Closing the iterator aborts what is unfinished.
        """
        return self._watch(self._prepare(self._parse(prompts), sampling_params, streaming=True))

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
            programs, leader = self._engine.runner.prepare(names), self._engine.runner.leader
            if leader is not None:
                leader.warm(names, threads)
        try:
            return warm_up(programs, names, threads=threads, use_tqdm=use_tqdm)
        finally:
            if leader is not None:
                leader.warmed()

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
            DistributedError: several processes serve the model.
        """
        with self._lock:
            self._check_open()
            if self._group is not None:
                raise DistributedError(
                    "update_weights: the weights lie in several processes, and those of the others cannot be replaced from "
                    "here; close this LLM in each of them and make a new one"
                )
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

    def follow(self) -> None:
        """In every process but 0 of several that serve one model: does what process 0 does, until that closes its `LLM`.

            with LLM(model, tensor_parallel_size=jax.device_count()) as llm:
                if jax.process_index():
                    llm.follow()
                else:
                    print(llm.generate("..."))

        Raises:
            RuntimeError: this process takes the requests.
            DistributedError: a process has died, or its tokens are not those of process 0.
        """
        if self._closed:
            raise EngineClosedError("this LLM is closed; make a new one")
        if not self._follows:
            raise RuntimeError("follow is for processes other than 0 of several; this one takes the requests: use generate")
        follow(self._engine.runner, self._group)

    def close(self) -> None:
        """Ends all requests and gives the cache's memory back; a second time does nothing.

        Where several processes serve the model those that `follow` return from it.
        """
        with self._lock:
            if not self._closed:
                self._closed = True
                try:
                    self._engine.close()
                finally:
                    if self._engine.runner.leader is not None:
                        self._engine.runner.leader.end()
                    elif self._group is not None:
                        self._group.end_quietly()
                    del self._engine, self._module

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosedError("this LLM is closed; make a new one")
        if self._follows:
            raise DistributedError(
                f"this is process {self._group.process} of a model on several: requests enter at process 0; call "
                "llm.follow() here, which serves that one until it ends"
            )

    def _parse(self, prompts: Any) -> list[Prompt]:
        self._check_open()
        most = None
        if self._tokenizer is not None:
            most = max_prompt_chars(longest_token(self._tokenizer), self._limits.max_model_len)
        return parse_prompts(prompts, max_chars=most, media=self._media is not None)

    def _render(
        self, messages: Any, template: str | None, add_generation_prompt: bool, kwargs: Mapping[str, Any] | None
    ) -> list[Prompt]:
        self._check_open()
        if self._tokenizer is None:
            raise ValueError("chat needs the tokenizer, which was skipped; pass tokenizer=")
        rendered = render_chat(
            self._tokenizer, messages, chat_template=template or self._chat_template,
            add_generation_prompt=add_generation_prompt, chat_template_kwargs=kwargs,
            image_marker=None if self._media is None else self._media.marker,
        )  # fmt: skip
        # The template writes the special tokens itself.
        prompts = [dataclasses.replace(prompt, special_tokens=False) for prompt in self._parse(rendered)]
        if self._media is None:
            return prompts
        return [
            dataclasses.replace(prompt, media={self._media.takes.modality: images})
            for prompt, images in zip(prompts, chat_images(messages), strict=True)
        ]

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
            for index, request in enumerate(requests):
                try:
                    self._engine.check(request)
                except CapacityError as error:
                    raise CapacityError(f"prompt {index}: {error}") from None
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
        ids, inputs = self._tokens(index, prompt)
        limits = self._limits
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
            seed=self._seed(number) if own.seed is None else own.seed, inputs=inputs,
        )  # fmt: skip

    def _tokens(self, index: int, prompt: Prompt) -> tuple[Sequence[int], PlacedInputs | None]:
        """The token ids of a prompt, checked, and what of them is no text."""
        if prompt.token_ids is None and self._tokenizer is None:
            raise ValueError(f"prompt {index} is text, but there is no tokenizer; pass prompt_token_ids")
        media, inputs, ids, text = self._media, (), prompt.token_ids, prompt.text
        if media is not None:
            inputs = media.read(prompt.media, index)
            text = media.expand(text, inputs, index) if ids is None else text
        ids = self._encode(text, prompt.special_tokens) if ids is None else ids
        if not ids:
            raise ValueError(f"prompt {index} has no tokens")
        check_token_ids(ids, self._limits.vocab_size, index)
        check_prompt_length(len(ids), self._limits.max_model_len, index, sum(one.length for one in inputs))
        return ids, None if media is None else media.place(ids, inputs, index)

    def _seed(self, number: int) -> int:
        """Of a request that brings none: from the engine's seed and the request's number."""
        return int(np.random.SeedSequence([self.config.seed, number, 1]).generate_state(1, np.uint64)[0])

    @property
    def _follows(self) -> bool:
        return self._group is not None and self._group.process > 0

    def _make_mesh(self, given: Mesh | None, size_given: bool) -> Mesh:
        """The user's mesh, or one over as many devices as the settings say; afterwards they say what it is."""
        if given is None:
            mesh = make_mesh(self.config.tensor_parallel_size)
            if self._group is not None:
                distributed.check_mesh(mesh)
            return mesh
        mesh = meshes.normalise(given, self.config.tensor_parallel_size if size_given else None)
        self.config = dataclasses.replace(self.config, tensor_parallel_size=meshes.size(mesh))
        return mesh

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


def _media_reader(
    takes: Features, tokenizer: Any, directory: Path | None, overrides: Mapping[str, Any] | None
) -> MediaReader:
    """Of a checkpoint, with its family's image processor; of a module, for token ids and pixel values."""
    if directory is None:
        return MediaReader(takes)
    hf = read_config(directory, overrides)
    form = family(hf).images
    processor = None if form is None else ImageProcessor(form, directory, hf, takes.shape)
    return MediaReader(takes, tokenizer, form, processor)


def _check_module(module: nnx.Module, config: EngineConfig, mesh: Mesh) -> None:
    """Refuses what only a checkpoint still to be loaded can be given, and a mesh that is not for this module."""
    for name in ("quantization", "placement", "pad_heads"):
        value = getattr(config, name)
        if value not in (None, False):
            raise ConfigError(
                f"{name} is {value!r}, but a module has its weights already; leave it out, and make "
                f"the module with models.loading.load(directory, mesh, {name}=...)"
            )
    meshes.check_data_axis(mesh, getattr(module.config, "features", None) is not None)
    shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(nnx.state(module))]
    for own in {sharding.mesh for sharding in shardings if isinstance(sharding, NamedSharding)}:
        if own.shape != mesh.shape or (own.devices != mesh.devices).any():
            raise ConfigError(
                f"the module's weights lie on a mesh of {_axes(own)}, but it is to run on one of {_axes(mesh)}; pass "
                "mesh= or tensor_parallel_size as it was loaded with"
            )


def _axes(mesh: Mesh) -> str:
    return f"{dict(mesh.shape)} over devices {[device.id for device in mesh.devices.flat]}"
