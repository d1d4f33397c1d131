"""What callers of `AsyncLLM` do beside requests: settings, metrics, recordings, weights, adapters, pauses."""

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from jaxinfer.adapter import Adapter
from jaxinfer.config import EngineConfig
from jaxinfer.engine.engine_thread import CLOSED
from jaxinfer.engine.metrics import Metric
from jaxinfer.engine.runner.warmup import Warmup
from jaxinfer.errors import EngineClosedError
from jaxinfer.llm import LLM
from jaxinfer.loading.update import WeightUpdate
from jaxinfer.recording.cache_state import CacheState
from jaxinfer.recording.events import MAX_STEPS
from jaxinfer.recording.recording import Recording
from jaxinfer.sampling_params import SamplingParams


class AsyncControl:
    """Methods of an LLM that may wait, each called on another thread than the event loop's."""

    _llm: LLM
    _threads: ThreadPoolExecutor
    """Threads that prepare inputs."""

    @property
    def config(self) -> EngineConfig:
        """Settings of the engine."""
        return self._llm.config

    @property
    def default_params(self) -> SamplingParams:
        """Default sampling parameters of requests, from the model's generation_config.json (read-only)."""
        return self._llm.default_params

    @property
    def max_model_len(self) -> int:
        """Maximum tokens of a sequence, prompt and output together."""
        return self._llm._input_processor.limits.max_model_len

    @property
    def num_waiting(self) -> int:
        """Number of sequences that wait in the engine's queue."""
        return sum(len(replica.engine.scheduler.waiting) for replica in self._llm._replicas)

    def check_alive(self) -> None:
        """Check that requests can be served.

        Raises:
            EngineDeadError: a device was lost.
            EngineClosedError: the LLM was closed.
        """
        self._llm._check_open()
        for replica in self._llm._replicas:
            replica.engine.check_alive()

    async def run_on_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function on one of the threads that prepare inputs, and return its result."""
        self._llm._check_open()
        try:
            waiting = asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)
        except RuntimeError:  # closed by another thread meanwhile
            raise EngineClosedError(CLOSED) from None
        return await waiting

    def get_tokenizer(self) -> Any:
        """Return the transformers tokenizer; None with `skip_tokenizer_init`."""
        return self._llm.get_tokenizer()

    def get_metrics(self) -> list[Metric]:
        """Return current counters, gauges and histograms without waiting for a running or compiling step."""
        return self._llm.get_metrics()

    async def start_recording(self, *, max_steps: int = MAX_STEPS) -> None:
        """Record the engine's steps from now on; arguments and errors are those of `LLM.start_recording`."""
        await self._apart(self._llm.start_recording, max_steps=max_steps)

    async def stop_recording(self) -> Recording:
        """Stop recording, as `LLM.stop_recording`."""
        return await self._apart(self._llm.stop_recording)

    async def recording(self) -> Recording:
        """Return what was recorded so far, as `LLM.recording`."""
        return await self._apart(lambda: self._llm.recording)

    async def cache(self, *, prefixes: bool = True) -> CacheState:
        """Return the state of the cache, as `LLM.cache`, with or without its prefix tree."""
        return await self._apart(self._llm._read_cache, prefixes)

    async def warmup(self, **options: Any) -> Warmup:
        """Compile all step programs ahead of time; arguments are those of `LLM.warmup`."""
        return await self.run_on_thread(partial(self._llm.warmup, **options))

    async def reset_prefix_cache(self) -> None:
        """Clear the prefix cache."""
        await self.run_on_thread(self._llm.reset_prefix_cache)

    async def update_weights(self, weights: Any, **options: bool) -> WeightUpdate:
        """Replace the weights; arguments and errors are those of `LLM.update_weights`."""
        return await self._apart(self._llm.update_weights, weights, **options)

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """The LoRA adapters there are, by name."""
        return self._llm.adapters

    async def add_adapter(self, name: str, adapter: Any, *, config: Mapping[str, Any] | None = None) -> Adapter:
        """Add a LoRA adapter; arguments and errors are those of `LLM.add_adapter`."""
        return await self._apart(self._llm.add_adapter, name, adapter, config=config)

    async def remove_adapter(self, name: str) -> None:
        """Remove a LoRA adapter; errors are those of `LLM.remove_adapter`."""
        await self._apart(self._llm.remove_adapter, name)

    async def release_followers(self) -> None:
        """Let `follow` return in the other processes, as `LLM.release_followers`."""
        await self._apart(self._llm.release_followers)

    async def weights(self, names: str = "hf") -> Any:
        """Return the weights; arguments and errors are those of `LLM.weights`."""
        return await self._apart(self._llm.weights, names)

    async def module(self) -> Any:
        """Return a module with the engine's weights, as `LLM.module`."""
        return await self._apart(self._llm.module)

    async def weights_checksum(self) -> str:
        """Return the checksum of the weights, as `LLM.weights_checksum`."""
        return await self._apart(self._llm.weights_checksum)

    @property
    def weight_version(self) -> int:
        """Number of times that the weights were replaced."""
        return self._llm.weight_version

    async def pause(self, mode: str = "keep") -> None:
        """Run no more steps until `resume`; arguments and errors are those of `LLM.pause`."""
        await self._apart(self._llm.pause, mode)

    async def resume(self, *, recompute: bool = False) -> None:
        """Run steps again; arguments and errors are those of `LLM.resume`."""
        await self._apart(self._llm.resume, recompute=recompute)

    async def sleep(self, level: int = 1) -> None:
        """Free the cache and, at level 2, the weights; arguments and errors are those of `LLM.sleep`."""
        await self._apart(self._llm.sleep, level)

    async def wake_up(self) -> None:
        """Allocate the cache again after `sleep`, as `LLM.wake_up`."""
        await self._apart(self._llm.wake_up)

    async def _apart(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call a method of the LLM that may take long on a thread of its own."""
        self._llm._check_not_closed()
        return await asyncio.to_thread(function, *arguments, **options)

    def follow(self) -> None:
        """Replay the steps of process 0, as `LLM.follow`; blocks until that closes its LLM or releases this process."""
        self._llm.follow()
