"""Compiled programs of a model's steps: compiled ahead in several threads, or on first use."""

import atexit
import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakSet

import jax

from jaxinfer._utils.units import size_text
from jaxinfer.engine.runner.batch import Bucket
from jaxinfer.engine.runner.buckets import (
    SAMPLING,
    STRUCTURED,
    TABLE_WIDTHS,
    Needs,
    all_buckets,
    copy_widths,
    covers,
    encode_key,
    encode_shape,
    mixed_bucket,
    prefill_bucket,
)
from jaxinfer.engine.runner.draft_steps import all_keys as draft_keys
from jaxinfer.engine.runner.keys import Copies, EncodeCross, Install, InstallTables, Key
from jaxinfer.engine.runner.logits import (
    SampleLogits,
    joined,
    logits_bytes,
)
from jaxinfer.engine.runner.logits import programs as programs_of
from jaxinfer.engine.runner.lowering import lower
from jaxinfer.engine.runner.mixed_step import mixed_step
from jaxinfer.engine.runner.shapes import Shapes
from jaxinfer.engine.runner.step_sampling import Sampled
from jaxinfer.engine.runner.steps import abstract_arguments, prefill_step
from jaxinfer.errors import EngineError
from jaxinfer.functional import Program

log = logging.getLogger(__name__)


class CompilationError(EngineError):
    """A program of a step could not be compiled."""

    def __init__(self, key: "Key", message: str):
        super().__init__(message)
        self.key = key


class Programs:
    """Compiled programs by key. Thread-safe: a program that several threads need is compiled once.

    The compiled program is kept, not the jitted function: it cannot recompile at a call, and the call takes as long
    (0.09 ms on jax 0.10 and 0.14 on 0.12 with 200 arrays, either way).

    Args:
        program, shapes: the model's program and step shapes.
        params: the model's parameters, or their shapes; only shapes and shardings are kept.
        options: XLA compiler options for the steps.
        draft_params: as `params`, of the draft model.
    """

    def __init__(
        self,
        program: Program,
        shapes: Shapes,
        params: Sequence[Any],
        options: Mapping[str, Any] | None = None,
        *,
        draft_params: Sequence[Any] = (),
    ):
        self._program, self._shapes, self._options = program, shapes, options
        self._params, self._draft_params = _abstract(params), _abstract(draft_params)
        self._ready: dict[Key, jax.stages.Compiled] = {}
        self._pending: dict[Key, Future[jax.stages.Compiled]] = {}
        self._traced: dict[tuple[str, ...], Sampled] = {}
        self._lock = threading.Lock()
        self.failed: set[Key] = set()
        """Programs whose last compilation failed."""
        self.room: int | None = None
        """Bytes of device memory left for the temporaries of a program; None: unknown."""
        self.temporaries: dict[Key, int] = {}
        """Bytes of device memory that each program needs while it runs, beside the arguments that outlive it."""
        self.seconds: dict[Key, float] = {}
        """Seconds that tracing and compiling each program, or reading it from JAX's compilation cache, took."""

    def keys(self, sampling: Collection[str] = SAMPLING) -> list[Key]:
        """Return the keys of all programs needed by requests that use no feature outside `sampling`."""
        copies = [Copies(width) for width in copy_widths(self._shapes)]
        tables = [] if self._shapes.contiguous else [InstallTables(width) for width in TABLE_WIDTHS]
        edits = [Install()] if "edited" in sampling else []
        encodes = [encode_key(self._program, self._shapes, count) for count in self._shapes.encode_buckets]
        encodes += [
            EncodeCross(**vars(encode_shape(self._program, self._shapes, units)))
            for units in self._shapes.cross_buckets
        ]
        program, shapes = self._program, self._shapes
        if program.deterministic:
            return [mixed_bucket(program, shapes), *encodes, *copies, *tables, *edits]
        buckets = all_buckets(program, shapes, sampling)
        masks = (False, True) if STRUCTURED in sampling else (False,)
        steps = dict.fromkeys(
            key for masked in masks for bucket in buckets for key in programs_of(shapes, bucket, masked=masked)
        )
        drafts = [] if program.draft is None else draft_keys(program, shapes, sampling)
        return [*steps, *drafts, *encodes, *copies, *tables, *edits]

    def get(self, key: Key) -> jax.stages.Compiled:
        """Return a program, compiling it if needed. A compilation error is raised in all waiting threads."""
        return self._ready.get(key) or self._make(key)

    def has(self, key: Key) -> bool:
        """Return whether a program is compiled."""
        return key in self._ready

    def captured(self, paths: Sequence[str]) -> dict[str, jax.ShapeDtypeStruct]:
        """Return shapes and dtypes `[T, ...]` of the outputs of modules, by tracing a step.

        Raises:
            ConfigError: a path is no module, or none whose output can be read.
        """
        program, shapes, key = self._program, self._shapes, tuple(paths)
        if key not in self._traced:
            bucket, body = prefill_bucket(program, shapes, 1, Needs(), key), prefill_step
            if program.deterministic:
                bucket, body = replace(mixed_bucket(program, shapes), capture=key), mixed_step
            step = partial(body, program, bucket, shapes.sampled_vocab)
            self._traced[key] = jax.eval_shape(step, self._params, *abstract_arguments(program, shapes, bucket))[-1]
        found = self._traced[key].captured
        return {path: found[path] for path in paths}

    def lower(self, key: Key) -> jax.stages.Lowered:
        """Trace and lower a program, without compiling it."""
        return lower(key, self._program, self._shapes, self._params, self._options, self._draft_params)

    def prepare(self, keys: Iterable[Key], threads: int, done: Callable[[Key], None]) -> None:
        """Compile programs in `threads` threads and call `done` after each. XLA compiles without holding Python's GIL.

        Raises:
            Exception: the first error; compilations not begun by then are skipped.
        """
        failed = threading.Event()

        def make(key: Key) -> Key | None:
            if failed.is_set():
                return None
            try:
                self.get(key)
            except BaseException:
                failed.set()
                raise
            return key

        with ThreadPoolExecutor(threads, thread_name_prefix="compile") as pool:
            try:
                for future in as_completed([pool.submit(make, key) for key in keys]):
                    if (key := future.result()) is not None:
                        done(key)
            finally:
                failed.set()  # after an interrupt, too, skip compilations not begun

    def start(self, key: Key, done: Callable[[], None]) -> Future[jax.stages.Compiled] | None:
        """Compile a program on a thread of its own, unless it is ready or being compiled.

        Args:
            key: the program.
            done: called on the compiling thread once the program is ready or its compilation has failed.

        Returns:
            The future program; None if it is ready.
        """
        if key in self._ready:
            return None
        future, mine = self._claim(key)
        if mine:
            thread = threading.Thread(
                target=self._compile, args=(key, future), name=f"jaxinfer compile {key}", daemon=True
            )
            _compiling.add(thread)
            log.info("compiling %s", key)
            try:
                thread.start()
            except RuntimeError as error:  # no more threads
                self._fail(key, future, error)
        future.add_done_callback(lambda _: done())
        return future

    def covering(self, bucket: Bucket, allowed: Callable[[Key], bool] = lambda key: True) -> Bucket | None:
        """Return the smallest compiled decode step whose programs are allowed that can do the work of another one."""
        found = [step for step in self._decode_steps(allowed) if covers(step, bucket)]
        return min(found, key=lambda key: (key.rows, key.items or 0, key.width, key.level, key.logprobs), default=None)

    def _decode_steps(self, allowed: Callable[[Key], bool]) -> Iterator[Bucket]:
        """Yield the decode steps all of whose programs are compiled and allowed."""
        ready = [key for key in tuple(self._ready) if allowed(key)]
        samplers = [key for key in ready if isinstance(key, SampleLogits) and not key.masked]
        for key in ready:
            if not isinstance(key, Bucket) or key.kind != "decode":
                continue
            if not key.pending:
                yield key
            elif not self._shapes.switched:
                yield from (
                    joined(key, sampler)
                    for sampler in samplers
                    if programs_of(self._shapes, joined(key, sampler)) == (key, sampler)
                )

    def _make(self, key: Key) -> jax.stages.Compiled:
        future, mine = self._claim(key)
        if mine:
            self._compile(key, future)
        return future.result()

    def _claim(self, key: Key) -> tuple[Future[jax.stages.Compiled], bool]:
        """Return the future of a program, and whether the caller must compile it."""
        with self._lock:
            if key in self._pending:
                return self._pending[key], False
            future: Future[jax.stages.Compiled] = Future()
            if key in self._ready:
                future.set_result(self._ready[key])
                return future, False
            self._pending[key] = future
            return future, True

    def _compile(self, key: Key, future: Future[jax.stages.Compiled]) -> None:
        """Compile a claimed program and settle its future."""
        try:
            started = time.perf_counter()
            made = self.lower(key).compile()
            self.seconds[key] = time.perf_counter() - started
            self._measure(key, made)
            log.info("compiled %s in %.1f s", key, self.seconds[key])
        except BaseException as error:
            self._fail(key, future, error)
            return
        with self._lock:
            self._ready[key] = made
            self.failed.discard(key)
            del self._pending[key]
        future.set_result(made)

    def _fail(self, key: Key, future: Future[jax.stages.Compiled], error: BaseException) -> None:
        """Settle the future of a program that could not be compiled; the next caller tries again."""
        with self._lock:
            self.failed.add(key)
            del self._pending[key]
        future.set_exception(error)

    def _measure(self, key: Key, made: jax.stages.Compiled) -> None:
        """Record the temporaries of a program and its results that alias no argument; warn if they do not fit."""
        memory = made.memory_analysis()
        if memory is None:  # a backend that does not say
            return
        needed = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        if isinstance(key, SampleLogits):
            needed += logits_bytes(self._program, key)
        self.temporaries[key] = needed
        if self.room is not None and needed > self.room:
            log.warning(
                "%s needs %s of a device's memory while it runs, and %s are left: it will fail; lower "
                "gpu_memory_utilization or max_num_seqs",
                key,
                size_text(needed),
                size_text(self.room),
            )


def _abstract(params: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
    return [
        jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding if getattr(p, "committed", True) else None)
        for p in params
    ]


_compiling: WeakSet[threading.Thread] = WeakSet()
_exit_status: int | None = None


def exit_while_compiling(status: int) -> None:
    """End the process with this status at interpreter exit even if programs are being compiled then.

    For a command, which has nothing to lose. Otherwise the exit of the interpreter waits for compilations.
    """
    global _exit_status
    _exit_status = status


@atexit.register
def _wait_at_exit() -> None:
    """Wait until programs are compiled: XLA cannot be interrupted, and crashes if JAX is torn down meanwhile."""
    threads = [thread for thread in _compiling if thread.is_alive()]
    if threads and _exit_status is not None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(_exit_status)
    for thread in threads:
        thread.join()
