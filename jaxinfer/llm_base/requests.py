"""Base class of `LLM` that turns the prompts of a call into requests and waits for their outputs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from tqdm.auto import tqdm

from jaxinfer.engine.divided_call import DividedCall
from jaxinfer.engine.engine import Engine
from jaxinfer.engine.request import Request
from jaxinfer.engine.runner import steered
from jaxinfer.errors import CapacityError
from jaxinfer.inputs.input_processor import Params
from jaxinfer.inputs.prompts import Prompt, with_adapter
from jaxinfer.llm_base.lifecycle import EngineOwner
from jaxinfer.llm_base.replicas import Replica, divide
from jaxinfer.outputs import RequestOutput, RequestOutputs
from jaxinfer.results.output_processor import Handle
from jaxinfer.results.progress import RUNNING, Progress, Updates, warn_if_truncated
from jaxinfer.steering import Steering


class RequestCalls(EngineOwner):
    """Methods that all calls of `LLM` share: check all prompts, queue their requests, wait for or yield results."""

    def _prepare(
        self, prompts: Any, params: Params, *, streaming: bool = False, steering: Any = None, adapter: Any = None
    ) -> list[Handle]:
        """Parse and check all prompts of a call and return their handles, without queueing requests."""
        self._check_open()
        parsed = with_adapter(self._input_processor.parse(prompts), adapter)
        return self._handles(parsed, params, streaming, steering)

    def _prepare_chat(
        self, messages: Any, params: Params, *, streaming: bool = False, adapter: Any = None, **options: Any
    ) -> list[Handle]:
        """Render and check all conversations of a `chat` call and return their handles, without queueing requests.

        `options`: keyword arguments of `InputProcessor.render`.
        """
        self._check_open()
        prompts = with_adapter(self._input_processor.render(messages, **options), adapter)
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
        for replica in self._serving:
            replica.thread.run(self._check_requests, replica.engine, requests)
        return [
            make_handle(request, prompt.text, self._tokenizer, encoder_text=prompt.encoder_text)
            for request, prompt in zip(requests, prompts, strict=True)
        ]

    @property
    def _serving(self) -> list[Replica]:
        """Replicas whose engines are alive; all if there are none, so that their error is raised."""
        return [replica for replica in self._replicas if replica.engine.dead is None] or self._replicas

    def _check_requests(self, engine: Engine, requests: Sequence[Request]) -> None:
        for index, request in enumerate(requests):
            try:
                engine.check(request)
            except CapacityError as error:
                raise CapacityError(f"prompt {index}: {error}") from None

    def _finish(self, handles: list[Handle], use_tqdm: bool) -> list[RequestOutput]:
        """Queue requests, wait for all of them and return their outputs."""
        self._serve(handles, use_tqdm)
        warn_if_truncated(handles)
        return RequestOutputs(handle.output() for handle in handles)

    def _serve(self, handles: list[Handle], use_tqdm: bool) -> None:
        """Queue requests and wait for all of them; abort them on an exception."""
        shares = divide(self._replicas, handles)
        call = DividedCall([replica.thread for replica in shares])
        release = call.release
        try:
            with tqdm(total=len(handles), desc=RUNNING, disable=not use_tqdm, dynamic_ncols=True) as bar:
                # First, as a request may be aborted as soon as it is queued.
                progress = Progress(bar, shares.values(), lambda: any(own.engine.is_compiling for own in shares))
                self._queue(call, shares)
                for replica, part in zip(shares, progress.parts, strict=True):
                    call.drive(replica.thread, part.unfinished)
                call.wait_for_all(progress.show)
        finally:
            list(release)  # must come first, so that an interrupt cannot leave requests running

    def _queue(self, call: DividedCall, shares: Mapping[Replica, Sequence[Handle]]) -> None:
        self._check_open()
        for replica, handles in shares.items():
            call.add(replica.thread, (handle.request for handle in handles))

    def _watch(self, handles: list[Handle]) -> Iterator[RequestOutput]:
        """Queue requests and yield new outputs after each step; abort them if the iterator is closed or fails."""
        shares = divide(self._replicas, handles)
        left = {replica.thread: Updates(own) for replica, own in shares.items()}
        call = DividedCall(left)
        release = call.release
        try:
            self._queue(call, shares)
            for thread, updates in left.items():
                call.drive(thread, updates.awaited)
            while left:
                self._check_open()
                thread = call.wait()
                updates = left[thread]
                yield from updates.found
                if not updates.left:
                    del left[thread]
                    continue
                self._check_open()
                call.drive(thread, updates.awaited)
        finally:
            list(release)
