"""`AsyncLLM`, the inference API for asyncio: each request is an asynchronous iterator over its outputs."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from typing import Any

from jaxinfer.async_control import AsyncControl
from jaxinfer.engine.engine_thread import CLOSED
from jaxinfer.engine.request import Request
from jaxinfer.errors import EngineClosedError
from jaxinfer.inputs.prompts import with_adapter
from jaxinfer.llm import LLM
from jaxinfer.llm_base.prefill import LAST_TOKEN, check_ended, embedding_of, score_of, states_of
from jaxinfer.llm_base.replicas import divide
from jaxinfer.models.whisper.transcription import Transcript, begin
from jaxinfer.outputs import EmbeddingOutput, HiddenStates, RequestOutput, ScoreOutput
from jaxinfer.results.output_processor import Handle
from jaxinfer.results.output_streams import OutputStream, StreamHub
from jaxinfer.sampling_params import RequestOutputKind, SamplingParams

INPUT_THREADS = 4
"""Number of threads that render chats and tokenise prompts."""


class AsyncLLM(AsyncControl):
    """A language model with its inference engine, for asyncio.

        async with AsyncLLM(model) as llm:
            async for output in llm.generate("Once upon a time", SamplingParams(max_tokens=32)):
                print(output.outputs[0].text, end="", flush=True)

    The engine steps on a thread of its own, and prompts are rendered and tokenised on others, so that the event loop
    is never blocked. A consumer that is slower than the engine gets several tokens in one output. Ending the iteration
    early (`aclose`, a cancelled task, a dropped iterator) aborts the request. Methods may be called from several event
    loops.

    Args:
        model: as in `LLM`.
        settings: the other arguments of `LLM`.

    Raises:
        ConfigError, CheckpointError, CapacityError, OfflineError, TypeError: as in `LLM`.
    """

    def __init__(self, model: Any, **settings: Any):
        self._attach(LLM(model, **settings))

    @classmethod
    def of(cls, llm: LLM) -> "AsyncLLM":
        """Return an asynchronous interface to an LLM; both share its engine, and `close` closes it."""
        made = cls.__new__(cls)
        made._attach(llm)
        return made

    def _attach(self, llm: LLM) -> None:
        self._llm = llm
        self._hubs = {replica: StreamHub(replica.thread) for replica in llm._replicas}
        self._threads = ThreadPoolExecutor(INPUT_THREADS, thread_name_prefix="jaxinfer inputs")

    async def generate(
        self,
        prompt: Any,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        steering: Any = None,
        adapter: str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Generate completions of one prompt and yield outputs as tokens arrive, in the form set by `output_kind`.

        Args:
            prompt: one prompt, in any form that `LLM.generate` takes.
            sampling_params: by default `default_params`.
            request_id: id for `abort` and in the outputs; by default a new one.
            steering: vectors added to the outputs of modules, as in `LLM.generate`.
            adapter: name of the LoRA adapter, if the prompt's dict has none.

        Raises:
            TypeError, ValueError: the prompt or a parameter is invalid, or the id is in use; nothing was queued.
            EngineDeadError: the device was lost.
            EngineClosedError: the LLM was closed meanwhile.
        """
        queued = self.add_request(prompt, sampling_params, request_id=request_id, steering=steering, adapter=adapter)
        async with aclosing(await queued) as stream:
            async for output in stream:
                yield output

    async def chat(
        self,
        messages: Any,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        **options: Any,
    ) -> AsyncIterator[RequestOutput]:
        """Answer one conversation and yield outputs as tokens arrive, like `generate`.

        Args:
            messages: the messages of one conversation, as in `LLM.chat`.
            sampling_params: as in `LLM.chat`: without `max_tokens` if omitted.
            request_id: as in `generate`.
            options: `chat_template`, `add_generation_prompt`, `continue_final_message`, `tools` and
                `chat_template_kwargs` of `LLM.chat`.
        """
        async with aclosing(await self.add_chat(messages, sampling_params, request_id=request_id, **options)) as stream:
            async for output in stream:
                yield output

    async def add_request(
        self,
        prompt: Any,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        steering: Any = None,
        adapter: str | None = None,
    ) -> OutputStream:
        """Check and queue one prompt, and return its outputs; arguments and errors are those of `generate`.

        The errors of invalid input are raised here, before the first token.
        """
        return await self._add(partial(self._parse, prompt, sampling_params, steering, adapter), request_id)

    async def add_chat(
        self,
        messages: Any,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool | str = False,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        adapter: str | None = None,
    ) -> OutputStream:
        """Render and queue one conversation and return its outputs; arguments and errors are those of `chat`."""
        render = partial(
            self._render,
            messages,
            sampling_params,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
            adapter=adapter,
        )
        return await self._add(render, request_id)

    def _parse(
        self, prompt: Any, params: SamplingParams | None, steering: Any = None, adapter: str | None = None
    ) -> Handle:
        handle = self._handle(with_adapter(self._llm._input_processor.parse(prompt), adapter), params)
        self._llm._steer([handle.request], steering)
        return handle

    def _render(
        self, messages: Any, params: SamplingParams | None, *, adapter: str | None = None, **options: Any
    ) -> Handle:
        processor = self._llm._input_processor
        return self._handle(with_adapter(processor.render(messages, **options), adapter), processor.chat_params(params))

    def _handle(self, prompts: Sequence[Any], params: SamplingParams | None) -> Handle:
        """Make the unqueued request of a call's only prompt, with its output processor."""
        if len(prompts) != 1:
            raise ValueError(f"a request has one prompt, got {len(prompts)}: make a request for each")
        [prompt], [request] = prompts, self._llm._input_processor.requests(prompts, params)
        streaming = request.params.output_kind is not RequestOutputKind.FINAL_ONLY
        return Handle(request, prompt.text, self._llm._tokenizer, encoder_text=prompt.encoder_text, streaming=streaming)

    async def _add(self, prepare: Callable[[], Handle], request_id: str | None) -> OutputStream:
        if request_id is not None and (not isinstance(request_id, str) or not request_id):
            raise TypeError(f"request_id must be a non-empty string, got {request_id!r}")
        handle = await self.run_on_thread(prepare)
        if request_id is not None:
            handle.request.id = request_id
        return await self._queued(handle)

    async def _queued(self, handle: Handle) -> OutputStream:
        """Queue a request and return its outputs."""
        [replica] = divide(self._llm._replicas, [handle])
        stream = OutputStream(handle, self._hubs[replica])
        await stream.queue()
        return stream

    async def tokenize(self, prompt: Any) -> list[int]:
        """Return the token ids of one prompt as the model gets them; arguments and errors are those of `generate`."""
        return (await self.run_on_thread(self._parse, prompt, None)).request.prompt.tolist()

    async def tokenize_chat(self, messages: Any, **options: Any) -> list[int]:
        """Return the token ids of one conversation; arguments and errors are those of `chat`."""
        render = partial(self._render, messages, None, **{"chat_template": None} | options)
        return (await self.run_on_thread(render)).request.prompt.tolist()

    async def transcribe(
        self,
        audio: Any,
        sampling_params: SamplingParams | None = None,
        *,
        language: str | None = None,
        task: str | None = None,
    ) -> Transcript:
        """Transcribe one recording; arguments and errors are those of `LLM.transcribe`.

        Cancelling the task aborts the window that is being transcribed.
        """
        if isinstance(audio, list):
            raise TypeError("audio must be one recording, got a list: transcribe each")
        params = SamplingParams(temperature=0, max_tokens=None) if sampling_params is None else sampling_params
        options = {name: value for name, value in (("language", language), ("task", task)) if value is not None}
        [job] = await self.run_on_thread(begin, self._llm._opened.cross, audio, params, options)
        window = dataclasses.replace(params, output_kind=RequestOutputKind.FINAL_ONLY)
        while True:
            handle = await self.run_on_thread(lambda: self._parse(job.prompt(), window))
            async with aclosing(await self._queued(handle)) as stream:
                async for output in stream:
                    await self.run_on_thread(job.take, output, handle.request.rule)
            if not job.left:
                return await self.run_on_thread(job.transcript, self._llm._tokenizer)

    async def score(self, prompt: Any, completion: Any) -> ScoreOutput:
        """Compute the log-probabilities of a completion; arguments and errors are those of `LLM.score`."""
        stream = await self._add_prefill(self._llm._scores, prompt, [completion])
        return score_of(await self._computed(stream))

    async def embed(self, prompt: Any, *, pooling: str = LAST_TOKEN, normalize: bool = True) -> EmbeddingOutput:
        """Compute the embedding of one prompt; arguments and errors are those of `LLM.embed`."""
        return embedding_of(await self._computed(await self.add_embed(prompt, pooling)), normalize=normalize)

    async def hidden_states(self, prompt: Any, capture: Sequence[str]) -> HiddenStates:
        """Compute the outputs of modules; arguments and errors are those of `LLM.hidden_states`."""
        return states_of(await self._computed(await self._add_prefill(self._llm._captures, prompt, capture)))

    async def add_embed(self, prompt: Any, pooling: str = LAST_TOKEN) -> OutputStream:
        """Check and queue one prompt for `llm_prefill.embedding_of`; its stream has one output, without tokens."""
        return await self._add_prefill(self._llm._embeds, prompt, pooling)

    async def _add_prefill(self, make: Callable[..., Any], prompt: Any, *options: Any) -> OutputStream:
        """Queue the request of one prompt that ends with its prefill."""

        def prepare() -> Handle:
            requests, prompts = make(prompt, *options)
            if len(requests) != 1:
                raise ValueError(f"a request has one prompt, got {len(requests)}: make a request for each")
            return Handle(requests[0], prompts[0].text, self._llm._tokenizer, encoder_text=prompts[0].encoder_text)

        return await self._queued(await self.run_on_thread(prepare))

    async def _computed(self, stream: OutputStream) -> Request:
        """Wait for a request that ends with its prefill, and return it."""
        async with aclosing(stream):
            async for _ in stream:
                pass
        check_ended(stream.handle.request)
        return stream.handle.request

    async def abort(self, request_id: str | Sequence[str]) -> None:
        """Abort one request or a list of requests before the next step; their `finish_reason` is "abort".

        Ids of unknown or finished requests are ignored.
        """
        await self.run_on_thread(self._llm.abort, request_id)

    async def close(self) -> None:
        """Abort all requests and free the cache's memory; streams raise EngineClosedError. Further calls do nothing."""
        for hub in self._hubs.values():
            hub.end_all(EngineClosedError(CLOSED))
        await asyncio.to_thread(self._llm.close)
        self._threads.shutdown(wait=False)

    async def __aenter__(self) -> "AsyncLLM":
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._llm._abandon(error)
        await self.close()
