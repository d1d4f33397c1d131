"""`LLM`, the offline inference API: generate, chat, beam search, streaming and transcription."""

import dataclasses
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from flax import nnx
from jax.sharding import Mesh
from tqdm.auto import tqdm

from jaxinfer import distributed
from jaxinfer._utils import compilation_cache, heap
from jaxinfer.beam_params import BeamParams
from jaxinfer.config import CONTIGUOUS, EngineConfig
from jaxinfer.engine.engine import Engine
from jaxinfer.engine.engine_thread import CLOSED, EngineThread, Lease
from jaxinfer.engine.metrics import Metric
from jaxinfer.engine.multihost import handshake
from jaxinfer.engine.multihost.replay import Leader, follow
from jaxinfer.engine.request import Request
from jaxinfer.engine.runner.buckets import SAMPLING, step_shape
from jaxinfer.engine.runner.programs import Programs
from jaxinfer.engine.runner.warmup import Warmup, check_sampling, warm_up
from jaxinfer.engine.sizing.setup import build_engine
from jaxinfer.errors import CapacityError, ConfigError, DistributedError, EngineClosedError
from jaxinfer.functional.deterministic import StepShape
from jaxinfer.inputs.defaults import ModelLimits, length_remedy
from jaxinfer.inputs.input_processor import InputProcessor, Params
from jaxinfer.inputs.loaded_model import LoadedModel
from jaxinfer.inputs.prompts import Prompt
from jaxinfer.llm_control import WeightsAndPauses
from jaxinfer.loading.load import ModelArguments, open_model, place
from jaxinfer.models.whisper.transcription import Transcribing, Transcript, begin
from jaxinfer.outputs import RequestOutput
from jaxinfer.results.output_processor import BeamHandle, Handle
from jaxinfer.results.progress import Progress, Running, Updates, warn_if_truncated
from jaxinfer.sampling_params import SamplingParams


class LLM(WeightsAndPauses):
    """A language model with its inference engine; methods may be called from several threads.

    Args:
        model: a directory with a Hugging Face checkpoint, a GGUF file, "smollm2" (`checkpoint.packaged`), a Hub id, or
            an NNX module (which takes and returns token
            ids only, unless `tokenizer` is given).
        tokenizer: directory, Hub id or transformers tokenizer to use instead of the model's own.
        skip_tokenizer_init: load no tokenizer; prompts and outputs are token ids only.
        revision: Git revision of the Hub id.
        chat_template: Jinja source to use instead of the tokenizer's chat template.
        hf_overrides: values that override those of config.json.
        mesh: device mesh with the axis `model`, and for a model with a vision tower the axis `data` to shard images
            over; by default a mesh over `tensor_parallel_size` devices.
        use_tqdm: whether to show a progress bar while the weights are loaded.
        settings: fields of `EngineConfig`.

    Raises:
        ConfigError, CheckpointError, CapacityError, OfflineError: see `jaxinfer.errors`.
        TypeError: `settings` has an unknown field.
    """

    def __init__(
        self,
        model: str | Path | nnx.Module,
        *,
        tokenizer: Any = None,
        skip_tokenizer_init: bool = False,
        revision: str | None = None,
        chat_template: str | None = None,
        hf_overrides: Mapping[str, Any] | None = None,
        mesh: Mesh | None = None,
        use_tqdm: bool = True,
        **settings: Any,
    ):
        self._closed = False
        if mesh is not None and not isinstance(mesh, Mesh):
            raise TypeError(f"mesh must be a jax.sharding.Mesh, got {type(mesh).__name__}")
        self._group = distributed.join(mesh, settings.get("peer_timeout"))
        with distributed.guard(self._group):
            config = EngineConfig.of(settings)
            compilation_cache.enable(config.compilation_cache_dir)
            heap.thaw(collect=True)  # free the weights of an earlier LLM that was deleted without `close`
            if self._group is not None:
                config, hf_overrides = handshake.share_config(self._group, config, hf_overrides)
            self._mesh, self.config = place(mesh, config, "tensor_parallel_size" in settings, self._group)
            named = ModelArguments(model, tokenizer, skip_tokenizer_init, revision, hf_overrides)
            self._start(named, chat_template, use_tqdm)

    def _start(self, named: ModelArguments, chat_template: str | None, use_tqdm: bool) -> None:
        """Load the model, build its engine and start the engine thread."""
        group = self._group
        opened = open_model(named, self.config, self._mesh, group, progress=use_tqdm)
        module, known = opened.module, opened.tokenizer_len
        self._tokenizer = opened.tokenizer
        if group is not None:
            known = group.all_gather(known)[0]
        engine = build_engine(module, self.config, self._mesh, sampled_vocab=known)
        if group is not None:
            handshake.check_programs(group, engine.runner)
            engine.runner.leader = None if self._follows else Leader(group)
        longest, config = engine.runner.shapes.max_length, self.config
        length_hint = length_remedy(
            longest, config.max_model_len, module.config.max_length, contiguous=config.cache == CONTIGUOUS
        )
        limits = ModelLimits(
            module.config.vocab_size,
            longest,
            opened.eos_token_ids,
            tokenizer_len=known,
            length_hint=length_hint,
            **opened.forced,
        )
        self._name_weights(engine)
        # Without its weights, which would stay in memory after others have replaced them.
        opened = dataclasses.replace(opened, module=self._weights.module)
        del module
        self._loaded: tuple[LoadedModel, InputProcessor] | None = (
            opened,
            InputProcessor(opened, self.config, limits, chat_template),
        )
        self._thread = EngineThread(engine)
        # Stops the thread if the LLM is garbage-collected without `close`, and when the interpreter exits.
        self._finalizer = weakref.finalize(self, _drop, self._thread)
        if self.config.freeze_gc:
            heap.freeze()

    @property
    def _engine(self) -> Engine:
        """The engine. The engine thread owns it; code on other threads must only read from it."""
        engine = getattr(self._thread, "engine", None)
        if engine is None:
            raise EngineClosedError(CLOSED)
        return engine

    @property
    def _opened(self) -> LoadedModel:
        return self._parts[0]

    @property
    def _input_processor(self) -> InputProcessor:
        return self._parts[1]

    @property
    def _parts(self) -> tuple[LoadedModel, InputProcessor]:
        """The loaded model and its input processor; raises once `close` (maybe on another thread) has freed them."""
        loaded = self._loaded
        if loaded is None:
            raise EngineClosedError(CLOSED)
        return loaded

    @property
    def step_shape(self) -> StepShape:
        """Shape of the one step of a deterministic engine, for a trainer (`functional.training.logits`).

        Raises:
            ConfigError: the engine is not deterministic, or spans several devices.
        """
        program, shapes = self._engine.runner.program, self._engine.runner.shapes
        if not program.deterministic:
            raise ConfigError("step_shape is that of a deterministic engine; make the LLM with deterministic=True")
        if program.mesh.size > 1:
            raise ConfigError(
                f"step_shape: the engine runs on {program.mesh.size} devices, and training on one; make the LLM with "
                "tensor_parallel_size=1"
            )
        return step_shape(program, shapes, self.config.matmul_kernel)

    @property
    def default_params(self) -> SamplingParams:
        """Default sampling parameters of requests, from the model's generation_config.json (read-only)."""
        return self._opened.default_params

    def generate(self, prompts: Any, sampling_params: Params = None, *, use_tqdm: bool = True) -> list[RequestOutput]:
        """Generate completions for each prompt.

        Args:
            prompts: a string, a list of token ids, `{"prompt": ...}` or `{"prompt_token_ids": ...}` with an optional
                `"cache_salt"`, or a list of these. Multimodal models also accept `"multi_modal_data"`:
                `{"image": one or a list of PIL images or arrays}` (`media.images.as_rgb`) or, for preprocessed images,
                `{"pixel_values": one or a list of arrays [n, C, height, width], one per image}`. A text must contain
                the model's image marker at the place of each image; token ids must contain all tokens of each image.
                For a text encoder-decoder model, a prompt goes to the encoder, and the decoder starts from its start
                token; to set both, pass `{"encoder_prompt": ..., "decoder_prompt": ...}`, each a string, token ids or
                such a dict.
            sampling_params: one for all prompts or one per prompt; by default `default_params`.
            use_tqdm: whether to show a progress bar.

        Returns:
            One output per prompt, in the order of the prompts.

        Raises:
            TypeError, ValueError: a prompt or parameter is invalid; no request of the call was queued.
        """
        return self._finish(self._prepare(prompts, sampling_params), use_tqdm)

    def chat(
        self,
        messages: Any,
        sampling_params: Params = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool | str = False,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of a list of conversations.

        Args:
            messages: a list of messages in OpenAI's format, dicts or objects with "role" and "content", or a list of
                such lists. Content is text or a list of parts; multimodal models accept image parts
                `{"type": "image", "image": PIL image or array}`. Arguments of tool calls may be a JSON string.
            sampling_params: as in `generate`, but without `max_tokens` if omitted: answers run until EOS.
            use_tqdm: whether to show a progress bar.
            chat_template: Jinja source used instead of the tokenizer's template, or the name of one of the tokenizer's
                templates if it has several.
            add_generation_prompt: whether the answer begins a new message.
            continue_final_message: whether the answer continues the last message, or the name of the message field to
                continue; requires `add_generation_prompt=False`.
            tools: tools that the model may call: dicts with the JSON schema of a function, or Python functions with
                type hints and a docstring.
            chat_template_kwargs: further template variables, such as `{"enable_thinking": False}`.

        Returns:
            One output per conversation, in order.

        Raises:
            ChatTemplateError: the chat template is missing or fails.
            TypeError, ValueError: as in `generate`.
        """
        handles = self._prepare_chat(
            messages,
            sampling_params,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
        )
        return self._finish(handles, use_tqdm)

    def beam_search(
        self,
        prompts: Any,
        width: int,
        max_tokens: int | None = 16,
        length_penalty: float = 1.0,
        *,
        early_stopping: bool | str = False,
        num_return_sequences: int | None = None,
        sampling_params: SamplingParams | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Run beam search on each prompt.

        Tokens and scores equal those of transformers' `generate(num_beams=width)` and do not depend on the other
        prompts of the call; `CompletionOutput.score` is transformers' `sequences_scores`.

        Args:
            prompts: as in `generate`.
            width, length_penalty, early_stopping, num_return_sequences: see `BeamParams`.
            max_tokens: maximum new tokens; None for no limit but the model's maximum length.
            sampling_params: further parameters: masks, penalties, `min_tokens`, `stop_token_ids`, `ignore_eos`,
                detokenization settings. Its `max_tokens` is ignored.
            use_tqdm: whether to show a progress bar.

        Returns:
            One output per prompt, its beams sorted by score, best first.

        Raises:
            TypeError, ValueError: a prompt or parameter is invalid; no request of the call was queued.
            CapacityError: the beams exceed the maximum number of running sequences or the blocks of the cache; no
                request of the call was queued.
        """
        search = BeamParams(
            width=width,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            num_return_sequences=num_return_sequences,
        )
        self._check_open()
        parsed = self._input_processor.parse(prompts)
        requests = self._input_processor.beams(parsed, sampling_params, search, max_tokens)
        return self._finish(self._checked(requests, parsed, BeamHandle), use_tqdm)

    def stream(self, prompts: Any, sampling_params: Params = None) -> Iterator[RequestOutput]:
        """Generate completions for each prompt and yield outputs as tokens arrive, in the form set by `output_kind`.

        The deltas of a sample concatenate to its final text. Closing the iterator aborts unfinished requests.
        """
        return self._watch(self._prepare(prompts, sampling_params, streaming=True))

    def stream_chat(
        self,
        messages: Any,
        sampling_params: Params = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool | str = False,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Iterator[RequestOutput]:
        """Answer conversations like `chat` and yield outputs as tokens arrive, like `stream`."""
        handles = self._prepare_chat(
            messages,
            sampling_params,
            streaming=True,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
        )
        return self._watch(handles)

    def transcribe(
        self,
        audio: Any,
        sampling_params: Params = None,
        *,
        language: str | None = None,
        task: str | None = None,
        use_tqdm: bool = True,
    ) -> list[Transcript]:
        """Transcribe audio of any length, with timestamps, using a speech model (Whisper).

        The windows of a recording are transcribed one after the other (`jaxinfer.models.whisper.transcription`); all
        recordings run concurrently. `generate` transcribes a single window.

        Args:
            audio: `(array, sampling_rate)` or a list of these (`media.audio.as_audio`).
            sampling_params: parameters of each window; by default greedy without `max_tokens`. n must be 1.
            language: language code, name or token of all audio; by default detected from the first window of each
                recording.
            task: "transcribe" (the default) or "translate" (into English).
            use_tqdm: whether to show a progress bar, in seconds of audio.

        Returns:
            One transcript per recording, in order.

        Raises:
            TypeError, ValueError: audio or an option is invalid, or the model is not a speech model; no request of the
                call was queued.
        """
        self._check_open()
        params = SamplingParams(temperature=0, max_tokens=None) if sampling_params is None else sampling_params
        options = {name: value for name, value in (("language", language), ("task", task)) if value is not None}
        jobs = begin(self._opened.cross, audio, params, options)
        handles = self._prepare([job.prompt() for job in jobs], params)
        jobs_of = dict(zip(handles, jobs, strict=True))
        running = Running(handles)
        with tqdm(total=sum(job.total for job in jobs), unit="s", desc="Transcribed", disable=not use_tqdm) as bar:
            lease = self._thread.lease()
            release, call = lease.release, lease.call
            try:
                self._queue(lease, handles)
                while running:
                    self._thread.drive(call, lambda: not running.some_ended)
                    self._next_windows(lease, running, jobs_of, params)
                    bar.update(sum(job.seconds for job in jobs) - bar.n)
            finally:
                release(call)
        return [job.transcript(self._tokenizer) for job in jobs]

    def _next_windows(self, lease: Lease, running: Running, jobs: dict[Handle, Transcribing], params: Params) -> None:
        """Collect the results of finished windows and queue the next window of each recording."""
        for handle in running.take_ended():
            job = jobs.pop(handle)
            job.take(handle.output(), handle.request.rule)
            if job.left:
                [following] = self._prepare([job.prompt()], params)
                jobs[following] = job
                running.add(following)
                self._queue(lease, [following])

    def abort(self, request_id: Any) -> None:
        """Abort one request or a list of requests before the next step; their `finish_reason` is "abort".

        Ids of unknown or finished requests are ignored. Returns without waiting for a running or compiling step.
        """
        ids = [request_id] if isinstance(request_id, str) else request_id
        if not isinstance(ids, (list, tuple, set)) or not all(isinstance(one, str) for one in ids):
            raise TypeError(f"request_id must be a string or a list of strings, got {request_id!r}")
        self._check_open()
        self._thread.abort(list(ids))

    def get_tokenizer(self) -> Any:
        """Return the transformers tokenizer; None with `skip_tokenizer_init`."""
        if self._closed:
            raise EngineClosedError(CLOSED)
        return self._tokenizer

    def get_metrics(self) -> list[Metric]:
        """Return current counters, gauges and histograms without waiting for a running or compiling step."""
        self._check_open()
        return self._engine.readings()

    def warmup(
        self, *, sampling: Collection[str] = SAMPLING, threads: int | None = None, use_tqdm: bool = True
    ) -> Warmup:
        """Compile all step programs ahead of time, so that no request waits for compilation.

        Requests may be served meanwhile. Programs in the compilation cache are read from it.

        Args:
            sampling: sampler variants to compile where each is a separate program (GPUs; on a CPU one program serves
                all): "greedy", "random" (temperature, min-p), "truncated" (top-k, top-p), "edited" (penalties, biases,
                masks), "logprobs", "prompt_logprobs"; by default all of these. "structured" adds the steps of rows with
                `structured_outputs`, on a CPU as well.
            threads: number of compiling threads; by default the number of processors, at most 16.
            use_tqdm: whether to show a progress bar.

        Raises:
            ValueError: `sampling` has an unknown name.
        """
        names = check_sampling(sampling)
        self._check_open()
        programs, leader = self._thread.run(self._prepare_programs, names, threads)
        try:
            done = warm_up(programs, names, threads=threads, use_tqdm=use_tqdm)
        finally:
            if leader is not None:
                leader.warmed()
        if self.config.freeze_gc:
            heap.freeze()  # exclude the compiled programs from garbage collection, too
        return done

    def _prepare_programs(self, names: Collection[str], threads: int | None) -> tuple[Programs, Leader | None]:
        """Prepare the programs to compile, on the engine thread, and tell the other processes to compile as well."""
        self._engine.check_alive()
        runner = self._engine.runner
        programs = runner.prepare(names)
        if runner.leader is not None:
            runner.leader.warm(names, threads)
        return programs, runner.leader

    def reset_prefix_cache(self) -> None:
        """Clear the prefix cache."""
        self._check_open()
        self._thread.run(self._engine.reset_prefix_cache)

    def follow(self) -> None:
        """Replay the steps of process 0 until it closes its `LLM`.

        Call this in every process except process 0 when several processes serve one model:

            with LLM(model, tensor_parallel_size=jax.device_count()) as llm:
                if jax.process_index():
                    llm.follow()
                else:
                    print(llm.generate("..."))

        Raises:
            RuntimeError: this is process 0, which takes the requests.
            DistributedError: a process has died, or its tokens differ from those of process 0.
        """
        if self._closed:
            raise EngineClosedError("this LLM is closed; make a new one")
        if not self._follows:
            raise RuntimeError(
                "follow is for processes other than 0 of several; this one takes the requests: use generate"
            )
        follow(self._engine.runner, self._group)

    def close(self) -> None:
        """Abort all requests and free the cache's memory; further calls do nothing.

        Calls on other threads that wait for results raise EngineClosedError. If several processes serve the model,
        `follow` returns in the other processes.
        """
        if self._closed:
            return
        self._closed = True
        if self._thread.forked:  # in a forked child: the engine belongs to the parent process
            self._finalizer.detach()
            return
        leader = self._engine.runner.leader
        try:
            self._thread.close()
        finally:
            self._finalizer.detach()
            if leader is not None:
                leader.end()
            elif self._group is not None:
                self._group.end_quietly()
            self._loaded = None
            self._tokenizer = None
            heap.thaw()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosedError(CLOSED)
        if self._follows:
            raise DistributedError(
                f"this is process {self._group.process} of a model on several: requests enter at process 0; call "
                "llm.follow() here, which serves that one until it ends"
            )

    def _prepare(self, prompts: Any, params: Params, *, streaming: bool = False) -> list[Handle]:
        """Parse and check all prompts of a call and return their handles, without queueing requests."""
        self._check_open()
        return self._handles(self._input_processor.parse(prompts), params, streaming)

    def _prepare_chat(self, messages: Any, params: Params, *, streaming: bool = False, **options: Any) -> list[Handle]:
        """Render and check all conversations of a `chat` call and return their handles, without queueing requests.

        `options`: keyword arguments of `InputProcessor.render`.
        """
        self._check_open()
        prompts = self._input_processor.render(messages, **options)
        return self._handles(prompts, self._input_processor.chat_params(params), streaming)

    def _handles(self, prompts: Sequence[Prompt], params: Params, streaming: bool) -> list[Handle]:
        return self._checked(
            self._input_processor.requests(prompts, params), prompts, partial(Handle, streaming=streaming)
        )

    def _checked(
        self, requests: Sequence[Request], prompts: Sequence[Prompt], follow: Callable[..., Handle]
    ) -> list[Handle]:
        self._check_open()
        self._thread.run(self._check_requests, requests)
        return [
            follow(request, prompt.text, self._tokenizer, encoder_text=prompt.encoder_text)
            for request, prompt in zip(requests, prompts, strict=True)
        ]

    def _check_requests(self, requests: Sequence[Request]) -> None:
        for index, request in enumerate(requests):
            try:
                self._engine.check(request)
            except CapacityError as error:
                raise CapacityError(f"prompt {index}: {error}") from None

    def _queue(self, lease: Lease, handles: Sequence[Handle]) -> None:
        self._check_open()
        self._thread.add(lease.call, (handle.request for handle in handles))

    @property
    def _follows(self) -> bool:
        return self._group is not None and self._group.process > 0

    def _finish(self, handles: list[Handle], use_tqdm: bool) -> list[RequestOutput]:
        """Queue requests, wait for all of them and return their outputs; abort them on an exception."""
        lease = self._thread.lease()
        release, call = lease.release, lease.call
        try:
            with tqdm(total=len(handles), desc="Processed prompts", disable=not use_tqdm, dynamic_ncols=True) as bar:
                progress = Progress(bar, handles)  # first, as a request may be aborted as soon as it is queued
                self._queue(lease, handles)
                self._thread.drive(call, progress.unfinished, progress.show)
        finally:
            release(call)  # must come first, so that an interrupt cannot leave requests running
        warn_if_truncated(handles)
        return [handle.output() for handle in handles]

    def _watch(self, handles: list[Handle]) -> Iterator[RequestOutput]:
        """Queue requests and yield new outputs after each step; abort them if the iterator is closed or fails."""
        updates = Updates(handles)
        lease = self._thread.lease()
        release, call = lease.release, lease.call
        try:
            self._queue(lease, handles)
            while updates.left:
                self._check_open()
                self._thread.drive(call, updates.awaited)
                yield from updates.found
        finally:
            release(call)


def _drop(thread: EngineThread) -> None:
    """Stop the engine thread of a garbage-collected LLM."""
    thread.stop()
    heap.thaw()
