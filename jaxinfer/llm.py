"""`LLM`, the offline inference API: generate, chat, beam search, streaming and transcription."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import astuple, replace
from typing import Any

from jaxinfer._utils import heap
from jaxinfer.beam_params import BeamParams
from jaxinfer.engine.engine import Engine
from jaxinfer.engine.engine_thread import CLOSED
from jaxinfer.engine.metrics import Metric
from jaxinfer.engine.multihost.replay import Leader
from jaxinfer.engine.runner.buckets import SAMPLING, step_shape
from jaxinfer.engine.runner.programs import Programs
from jaxinfer.engine.runner.warmup import Warmup, check_sampling, warm_up
from jaxinfer.errors import ConfigError, EngineClosedError
from jaxinfer.functional.deterministic import StepShape
from jaxinfer.inputs.input_processor import Params
from jaxinfer.llm_base.adapters import AdapterCalls
from jaxinfer.llm_base.prefill import PrefillOnly
from jaxinfer.llm_base.replicas import Replica
from jaxinfer.llm_base.transcription import TranscriptionCalls
from jaxinfer.llm_base.views import Views
from jaxinfer.llm_base.weights import WeightsAndPauses
from jaxinfer.outputs import RequestOutput
from jaxinfer.results.output_processor import BeamHandle
from jaxinfer.sampling_params import SamplingParams


class LLM(TranscriptionCalls, PrefillOnly, WeightsAndPauses, AdapterCalls, Views):
    """A language model with its inference engine; methods may be called from several threads.

    Args:
        model: a directory with a Hugging Face checkpoint, a GGUF file, "smollm2" (`checkpoint.packaged`), a Hub id, or
            an NNX module (which takes and returns token ids only, unless `tokenizer` is given).
        tokenizer: directory, Hub id or transformers tokenizer to use instead of the model's own.
        skip_tokenizer_init: load no tokenizer; prompts and outputs are token ids only.
        revision: Git revision of the Hub id.
        chat_template: Jinja source to use instead of the tokenizer's chat template.
        hf_overrides: values that override those of config.json.
        mesh: device mesh with the axis `model`, and for a model with a vision tower the axis `data` to shard images
            over; by default a mesh over `tensor_parallel_size` devices. A mesh with other names takes `axes`.
        axes: the engine's axes, mapped to the names that they have in a trainer's mesh: `{"model": "tp"}`, several as
            `{"model": ("fsdp", "tp")}`, or `{"model": "tp", "fsdp": "fsdp"}` to keep weights divided over `fsdp` and
            gather them layer by layer. Axes that are not named hold replicas (`sharding.serving_mesh`), which compute
            the same; with `"data": "dp"` each index of `dp` runs a batch of its own, and a request goes to the one with
            the fewest samples.
        use_tqdm: whether to show a progress bar while the weights are loaded.
        adapters: LoRA adapters by name: folders that PEFT saved, or Hub ids. Prompts choose one by its name; more can
            be added and removed while the LLM serves (`add_adapter`, `remove_adapter`).
        settings: fields of `EngineConfig`.

    Raises:
        ConfigError, CheckpointError, CapacityError, OfflineError: see `jaxinfer.errors`.
        TypeError: `settings` has an unknown field.
    """

    @property
    def step_shape(self) -> StepShape:
        """Shape of the one step of a deterministic engine, for a trainer (`functional.training.logits`).

        Raises:
            ConfigError: the engine is not deterministic.
        """
        program, shapes = self._engine.runner.program, self._engine.runner.shapes
        if not program.deterministic:
            raise ConfigError("only a deterministic engine has a step_shape; make the LLM with deterministic=True")
        return step_shape(program, shapes, self.config.matmul_kernel)

    @property
    def default_params(self) -> SamplingParams:
        """Default sampling parameters of requests, from the model's generation_config.json (read-only)."""
        return self._opened.default_params

    def generate(
        self,
        prompts: Any,
        sampling_params: Params = None,
        *,
        steering: Any = None,
        adapter: Any = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Generate completions for each prompt.

        Args:
            prompts: a string, a list of token ids, `{"prompt": ...}` or `{"prompt_token_ids": ...}` with an optional
                `"cache_salt"` and `"adapter"`, or a list of these. Multimodal models also accept `"multi_modal_data"`:
                `{"image": one or a list of PIL images or arrays}` (`media.images.as_rgb`) or, for preprocessed images,
                `{"pixel_values": one or a list of arrays [n, C, height, width], one per image}`. A text must contain
                the model's image marker at the place of each image; token ids must contain all tokens of each image.
                For a text encoder-decoder model, a prompt goes to the encoder, and the decoder starts from its start
                token; to set both, pass `{"encoder_prompt": ..., "decoder_prompt": ...}`, each a string, token ids or
                such a dict.
            sampling_params: one for all prompts or one per prompt; by default `default_params`.
            steering: vectors added to the outputs of modules: a `Steering`, a dict of paths to vectors, or a list of
                these and None, one per prompt.
            adapter: name of the LoRA adapter of prompts whose dict has no `"adapter"`, or a list of names and None, one
                per prompt.
            use_tqdm: whether to show a progress bar.

        Returns:
            One output per prompt, in the order of the prompts.

        Raises:
            TypeError, ValueError: a prompt or parameter is invalid; no request of the call was queued.
        """
        return self._finish(self._prepare(prompts, sampling_params, steering=steering, adapter=adapter), use_tqdm)

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
        adapter: Any = None,
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
            adapter: name of the LoRA adapter that answers, or a list of names and None, one per conversation.

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
            adapter=adapter,
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
            width: as in `BeamParams`.
            max_tokens: maximum new tokens; None for no limit but the model's maximum length.
            length_penalty: as in `BeamParams`.
            early_stopping: as in `BeamParams`.
            num_return_sequences: as in `BeamParams`.
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

    def stream(
        self, prompts: Any, sampling_params: Params = None, *, steering: Any = None, adapter: Any = None
    ) -> Iterator[RequestOutput]:
        """Generate completions for each prompt and yield outputs as tokens arrive, in the form set by `output_kind`.

        The deltas of a sample concatenate to its final text. Closing the iterator aborts unfinished requests.
        """
        handles = self._prepare(prompts, sampling_params, streaming=True, steering=steering, adapter=adapter)
        return self._watch(handles)

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
        adapter: Any = None,
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
            adapter=adapter,
        )
        return self._watch(handles)

    def abort(self, request_id: Any) -> None:
        """Abort one request or a list of requests before the next step; their `finish_reason` is "abort".

        Ids of unknown or finished requests are ignored. Returns without waiting for a running or compiling step.
        """
        ids = [request_id] if isinstance(request_id, str) else request_id
        if not isinstance(ids, (list, tuple, set)) or not all(isinstance(one, str) for one in ids):
            raise TypeError(f"request_id must be a string or a list of strings, got {request_id!r}")
        self._check_open()
        for thread in self._threads:
            thread.abort(list(ids))

    def get_tokenizer(self) -> Any:
        """Return the transformers tokenizer; None with `skip_tokenizer_init`."""
        if self._closed:
            raise EngineClosedError(CLOSED)
        return self._tokenizer

    def get_metrics(self) -> list[Metric]:
        """Return current counters, gauges and histograms without waiting for a running or compiling step.

        Each of several replicas (`axes`) has its own, with the label `engine`.
        """
        self._check_open()
        if len(self._replicas) == 1:
            return self._engine.readings()
        return [
            replace(metric, labels=(*metric.labels, ("engine", str(number))))
            for number, replica in enumerate(self._replicas)
            for metric in replica.engine.readings()
        ]

    def warmup(
        self, *, sampling: Collection[str] = SAMPLING, threads: int | None = None, use_tqdm: bool = True
    ) -> Warmup:
        """Compile all step programs ahead of time, so that no request waits for compilation.

        Requests may be served meanwhile. Programs in the compilation cache are read from it.

        Args:
            sampling: sampler variants to compile where each is a separate program (GPUs; on a CPU one program serves
                all): "greedy", "random" (temperature, min-p), "truncated" (top-k, top-p), "edited" (penalties, biases,
                masks), "logprobs", "prompt_logprobs"; by default all of these. "structured" adds the steps of rows with
                `structured_outputs`, on a CPU as well; "beams" those of beam searches of up to 8 beams, too.
            threads: number of compiling threads; by default the number of processors, at most 16.
            use_tqdm: whether to show a progress bar.

        Raises:
            ValueError: `sampling` has an unknown name.
        """
        names = check_sampling(sampling)
        self._check_open()
        done = [self._warm_up(replica, names, threads, use_tqdm) for replica in self._replicas]
        if self.config.freeze_gc:
            heap.freeze()  # exclude the compiled programs from garbage collection, too
        return Warmup(*(sum(counts) for counts in zip(*map(astuple, done))))

    def _warm_up(self, replica: Replica, names: tuple[str, ...], threads: int | None, use_tqdm: bool) -> Warmup:
        programs, leader = replica.thread.run(self._prepare_programs, replica.engine, names, threads)
        try:
            return warm_up(programs, names, threads=threads, use_tqdm=use_tqdm)
        finally:
            if leader is not None:
                leader.warmed()

    def _prepare_programs(
        self, engine: Engine, names: Collection[str], threads: int | None
    ) -> tuple[Programs, Leader | None]:
        """Prepare the programs to compile, on the engine thread, and tell the other processes to compile as well."""
        engine.check_alive()
        runner = engine.runner
        programs = runner.prepare(names)
        if runner.leader is not None:
            runner.leader.warm(names, threads)
        return programs, runner.leader

    def reset_prefix_cache(self) -> None:
        """Clear the prefix cache."""
        self._check_open()
        for replica in self._replicas:
            replica.thread.run(replica.engine.reset_prefix_cache)

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._abandon(error)
        self.close()
