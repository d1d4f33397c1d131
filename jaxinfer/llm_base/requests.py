"""Base class of `LLM` that turns the prompts of a call into requests and waits for their outputs."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from tqdm.auto import tqdm

from jaxinfer.engine.engine_thread import Lease
from jaxinfer.engine.request import Request
from jaxinfer.engine.runner import steered
from jaxinfer.errors import CapacityError
from jaxinfer.inputs.input_processor import Params
from jaxinfer.inputs.prompts import Prompt
from jaxinfer.llm_base.lifecycle import EngineOwner
from jaxinfer.outputs import RequestOutput, RequestOutputs
from jaxinfer.results.output_processor import Handle
from jaxinfer.results.progress import Progress, Updates, warn_if_truncated
from jaxinfer.steering import Steering


class RequestCalls(EngineOwner):
    """The steps that all calls of `LLM` share: check all prompts, queue their requests, wait or watch."""

    def _prepare(self, prompts: Any, params: Params, *, streaming: bool = False, steering: Any = None) -> list[Handle]:
        """Parse and check all prompts of a call and return their handles, without queueing requests."""
        self._check_open()
        return self._handles(self._input_processor.parse(prompts), params, streaming, steering)

    def _prepare_chat(self, messages: Any, params: Params, *, streaming: bool = False, **options: Any) -> list[Handle]:
        """Render and check all conversations of a `chat` call and return their handles, without queueing requests.

        `options`: keyword arguments of `InputProcessor.render`.
        """
        self._check_open()
        prompts = self._input_processor.render(messages, **options)
        return self._handles(prompts, self._input_processor.chat_params(params), streaming)

    def _handles(
        self, prompts: Sequence[Prompt], params: Params, streaming: bool, steering: Any = None
    ) -> list[Handle]:
        requests = self._input_processor.requests(prompts, params)
        self._steer(requests, steering)
        return self._checked(requests, prompts, partial(Handle, streaming=streaming))

    def _steer(self, requests: Sequence[Request], steering: Any) -> None:
        """Set the steering of requests: one for all of them, or a list with one for each; None for none."""
        if isinstance(steering, list | tuple):
            if len(steering) != len(requests):
                raise ValueError(f"steering has {len(steering)} entries for {len(requests)} prompts: pass one for each")
            each = [Steering.of(one) for one in steering]
        else:
            each = [Steering.of(steering)] * len(requests)
        for one in dict.fromkeys(one for one in each if one is not None):
            steered.check(self._engine.runner, one)
        for request, one in zip(requests, each, strict=True):
            if one is not None:
                request.steering, request.salt = one, request.salt + one.digest

    def _checked(
        self, requests: Sequence[Request], prompts: Sequence[Prompt], make_handle: Callable[..., Handle]
    ) -> list[Handle]:
        self._check_open()
        self._thread.run(self._check_requests, requests)
        return [
            make_handle(request, prompt.text, self._tokenizer, encoder_text=prompt.encoder_text)
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

    def _finish(self, handles: list[Handle], use_tqdm: bool) -> list[RequestOutput]:
        """Queue requests, wait for all of them and return their outputs."""
        self._serve(handles, use_tqdm)
        warn_if_truncated(handles)
        return RequestOutputs(handle.output() for handle in handles)

    def _serve(self, handles: list[Handle], use_tqdm: bool) -> None:
        """Queue requests and wait for all of them; abort them on an exception."""
        lease = self._thread.lease()
        release, call = lease.release, lease.call
        try:
            with tqdm(total=len(handles), desc="Processed prompts", disable=not use_tqdm, dynamic_ncols=True) as bar:
                progress = Progress(bar, handles)  # first, as a request may be aborted as soon as it is queued
                self._queue(lease, handles)
                self._thread.drive(call, progress.unfinished, progress.show)
        finally:
            release(call)  # must come first, so that an interrupt cannot leave requests running

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
