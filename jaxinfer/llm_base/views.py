"""Base class of `LLM` that shows the engine's state: recordings, cache, memory, plots."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer._utils import html
from jaxinfer.engine import cache_state
from jaxinfer.engine.recorder import Recorder
from jaxinfer.engine.sizing.memory import MemoryUse, memory_use
from jaxinfer.errors import ConfigError
from jaxinfer.llm_base.lifecycle import EngineOwner
from jaxinfer.recording.cache_state import CacheState
from jaxinfer.recording.events import MAX_STEPS
from jaxinfer.recording.recording import Recording
from jaxinfer.recording.timeline import Timeline

TEXT = 80
"""Number of characters of a prefix that are shown."""


class Views(EngineOwner):
    """Methods of `LLM` that return the engine's state as values, which stay valid after `close`."""

    _recorded: Recording | None = None
    """The last recording that was stopped."""

    def start_recording(self, *, max_steps: int = MAX_STEPS) -> None:
        """Record the steps from now on: which sequence owns each block, and what each sequence does.

        A recording keeps the newest steps in a few MiB, and costs each step time in proportion to the blocks of the
        cache. Starting again drops what was recorded before.

        Args:
            max_steps: number of steps to keep.

        Raises:
            ValueError: `max_steps` is not a positive integer.
        """
        if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 1:
            raise ValueError(f"max_steps must be a positive integer, got {max_steps!r}")
        self._check_single("start_recording")
        self._thread.run(self._set_recorder, max_steps)
        self._recorded = None

    def _set_recorder(self, max_steps: int) -> None:
        self._engine.recorder = Recorder(self._engine.manager, max_steps)

    def stop_recording(self) -> Recording:
        """Stop recording and return what was recorded; called again it returns the same.

        Raises:
            RuntimeError: nothing was recorded.
        """
        recording = self.recording
        self._thread.run(self._drop_recorder)
        self._recorded = recording
        return recording

    def _drop_recorder(self) -> None:
        self._engine.recorder = None

    @property
    def recording(self) -> Recording:
        """Steps recorded since `start_recording`, up to now or to `stop_recording`, as a value that does not change.

        Raises:
            RuntimeError: nothing was recorded.
        """
        self._check_open()
        found = self._thread.run(self._read_recording) or self._recorded
        if found is None:
            raise RuntimeError("nothing is recorded: call llm.start_recording() before the requests")
        return found

    def _read_recording(self) -> Recording | None:
        recorder = self._engine.recorder
        return None if recorder is None else recorder.read(self._engine.scheduler)

    @property
    def timeline(self) -> Timeline:
        """Phases of each recorded sequence by step: waiting, prefill, decode, preempted."""
        return self.recording.timeline

    @property
    def cache(self) -> CacheState:
        """State of the cache now: blocks by owner, requests, hits and misses, the prefix tree."""
        return self._read_cache()

    def _check_single(self, what: str) -> None:
        """Check that the LLM is open and has one engine, of which a view can be shown."""
        self._check_open()
        if len(self._replicas) > 1:
            raise ConfigError(
                f"{what}: this LLM has {len(self._replicas)} engines (axes 'data'), and what is shown is the cache of "
                "one; look at an LLM without 'data' in axes. get_metrics() has figures of all engines"
            )

    def _read_cache(self, prefixes: bool = True) -> CacheState:
        self._check_single("cache")
        tokenizer = self._tokenizer
        decode = None if tokenizer is None else lambda tokens: _shorten(tokenizer.decode(tokens[:TEXT]))
        return self._thread.run(lambda: cache_state.read(self._engine, decode, tree=prefixes))

    @property
    def memory(self) -> MemoryUse:
        """Bytes that the engine takes on each device, by purpose."""
        self._check_open()
        runner = self._engine.runner
        return runner.memory or memory_use(runner.program, [*runner.params, *runner.draft_params], runner.shapes)

    def plot_blocks(self, ax: Any = None, *, last: int | None = None) -> Any:
        """Draw the recorded blocks over steps, coloured by owner, with forks and copies on write.

        Args:
            ax: matplotlib's axes to draw on; by default those of a new figure.
            last: number of the newest steps to draw; by default all.

        Returns:
            matplotlib's axes.

        Raises:
            RuntimeError: nothing was recorded.
            ImportError: matplotlib is not installed.
        """
        return self.recording.plot_blocks(ax, last=last)

    def plot_timeline(self, ax: Any = None, *, last: int = 64) -> Any:
        """Draw when each recorded sequence waited, was prefilled, decoded, or was preempted.

        Args:
            ax: matplotlib's axes to draw on; by default those of a new figure.
            last: number of the newest sequences to draw.

        Returns:
            matplotlib's axes.

        Raises:
            RuntimeError: nothing was recorded.
            ImportError: matplotlib is not installed.
        """
        return self.recording.plot_timeline(ax, last=last)

    def _facts(self) -> list[tuple[str, str]]:
        """List sizes and current use of the engine, without waiting for a step."""
        engine, engines = self._engine, [replica.engine for replica in self._replicas]
        program, shapes = engine.runner.program, engine.runner.shapes
        blocks = shapes.num_blocks if shapes.contiguous else engine.settings.pool_blocks
        stored = "" if program.kv_cache_dtype == "auto" else f" in {program.kv_cache_dtype}"
        state = "dead" if any(one.dead for one in engines) else "asleep" if engine.control.level else ""
        state = state or ("paused" if engine.control.paused else "ready")
        return [
            (state, "engine" if len(engines) == 1 else f"{len(engines)} engines"),
            (str(self._mesh.size), "device" if self._mesh.size == 1 else "devices"),
            (str(program.dtype), "activations" if _quantised(engine.runner.params) else "weights"),
            (f"{blocks:,}", f"blocks of {shapes.block_size} tokens, {self.config.cache} cache{stored}"),
            (f"{100 * sum(one.manager.usage for one in engines) / len(engines):.0f}%", "of the blocks held"),
            (f"{shapes.max_length:,}", "tokens of a sequence at most"),
            (str(sum(one.scheduler.rows.num_used for one in engines)), f"of {len(engines) * shapes.rows} rows run"),
            (str(sum(len(one.scheduler.waiting) for one in engines)), "sequences wait"),
        ]

    def __repr__(self) -> str:
        if self._closed:
            return f"LLM({self._name!r}, closed)"
        return f"LLM({self._name!r}, " + ", ".join(f"{value} {what}" for value, what in self._facts()) + ")"

    def _repr_html_(self) -> str:
        if self._closed:
            return html.element(html.title(self._name, "This LLM is closed; its memory is free."))
        return html.element(html.title(self._name), html.tiles(self._facts()), self.memory._repr_html_())


def _shorten(text: str) -> str:
    return text if len(text) <= TEXT else text[: TEXT - 1] + "…"


def _quantised(params: Sequence[jax.Array | None]) -> bool:
    """Return whether some parameters are integers; those that `sleep(level=2)` has dropped are None."""
    return any(array is not None and not jnp.issubdtype(array.dtype, jnp.floating) for array in params)
