"""Base class of `LLM` that shows what its engine does: recordings, the cache, memory, pictures."""

from typing import Any

from jaxinfer._utils import html
from jaxinfer.engine import cache_state
from jaxinfer.engine.recorder import Recorder
from jaxinfer.engine.sizing.memory import MemoryUse, memory_use
from jaxinfer.llm_base.lifecycle import EngineOwner
from jaxinfer.recording.cache_state import CacheState
from jaxinfer.recording.events import MAX_STEPS
from jaxinfer.recording.recording import Recording
from jaxinfer.recording.timeline import Timeline

TEXT = 80
"""Number of characters of a prefix that are shown."""


class Views(EngineOwner):
    """Methods of `LLM` that return values which show the engine, and outlive it."""

    _recorded: Recording | None = None
    """The last recording that was stopped."""

    def start_recording(self, *, max_steps: int = MAX_STEPS) -> None:
        """Record the steps from now on: who owns which block, and what each sequence does.

        A recording keeps the newest steps in a few MiB, and costs each step time in proportion to the blocks of the
        cache. Without one nothing is kept. Starting again drops what was recorded.

        Args:
            max_steps: number of steps to keep.

        Raises:
            ValueError: `max_steps` is not a positive integer.
        """
        if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 1:
            raise ValueError(f"max_steps must be a positive integer, got {max_steps!r}")
        self._check_open()
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
        """What was recorded since `start_recording`, up to now or to `stop_recording`; a value that does not change.

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
        """What each recorded sequence did when: waiting, prefill, decode, preempted."""
        return self.recording.timeline

    @property
    def cache(self) -> CacheState:
        """State of the cache now: blocks by owner, requests, hits and misses, the prefix tree."""
        return self._read_cache()

    def _read_cache(self, prefixes: bool = True) -> CacheState:
        self._check_open()
        tokenizer = self._tokenizer
        decode = None if tokenizer is None else lambda tokens: _shorten(tokenizer.decode(tokens[:TEXT]))
        return self._thread.run(lambda: cache_state.read(self._engine, decode, tree=prefixes))

    @property
    def memory(self) -> MemoryUse:
        """Bytes that the engine takes on each device, by purpose."""
        self._check_open()
        runner = self._engine.runner
        return runner.memory or memory_use(runner.program, runner.params, runner.shapes)

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
        """List what the LLM is and does, without waiting for a step."""
        engine = self._engine
        program, shapes, scheduler = engine.runner.program, engine.runner.shapes, engine.scheduler
        blocks = shapes.num_blocks if shapes.contiguous else engine.settings.pool_blocks
        state = "dead" if engine.dead else "asleep" if engine.control.level else ""
        state = state or ("paused" if engine.control.paused else "ready")
        return [
            (state, "engine"),
            (str(program.mesh.size), "device" if program.mesh.size == 1 else "devices"),
            (str(program.dtype), "weights" if self.config.quantization is None else "activations"),
            (f"{blocks:,}", f"blocks of {shapes.block_size} tokens, {self.config.cache} cache"),
            (f"{100 * engine.manager.usage:.0f}%", "of the blocks held"),
            (f"{shapes.max_length:,}", "tokens of a sequence at most"),
            (str(scheduler.rows_in_use), f"of {shapes.rows} rows run"),
            (str(len(scheduler.waiting)), "sequences wait"),
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
