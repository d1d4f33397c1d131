"""Measure Python's host time in a decode step, part by part; the compiled steps omit the model's computation."""

import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import checkpoint
from jaxinfer import LLM, SamplingParams, demo, functional
from jaxinfer.engine.engine import Engine
from jaxinfer.inputs.tokenizer import load_tokenizer
from jaxinfer.results.detokenizer import Detokenizer
from jaxinfer.results.stop_strings import StopStrings
from jaxinfer.results.text_stream import TextStream

BLOCK, VOCAB = 16, 97
WARMUP = 8
"""Warm-up decode steps."""
PREFILLS = 16
"""Prompts that fit in one prefill step."""
STOPS = ("\n\nQuestion:", "###", "</answer>")
"""Stop strings that the generated text never completes."""


class Clock:
    """Accumulated seconds of named calls since the last `take`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with its calls timed."""

        def timed(*arguments: Any, **keywords: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

        return timed

    def take(self) -> dict[str, float]:
        """Return the accumulated seconds and reset them."""
        taken, self.seconds = self.seconds, {}
        return taken


@contextmanager
def stub_device() -> Iterator[None]:
    """Compile steps that take and return the arrays of a real one, but do not compute the model."""

    def touched(params: list[jax.Array]) -> jax.Array:
        # jit drops unused arguments, but dispatch time depends on their number.
        return sum(leaf.ravel()[0].astype(jnp.float32) for leaf in params) * 0

    traced = set()

    def stub(name: str) -> Callable[..., Any]:
        def hidden(
            program: Any, params: list[jax.Array], cache: Any, batch: Any, features: None = None, taps: None = None
        ) -> Any:
            traced.add(name)
            width = program.module(params).config.attention.width
            return jnp.zeros((len(batch.tokens), width), program.dtype) + touched(params).astype(program.dtype), cache

        return hidden

    stubs = {name: stub(name) for name in ("decode_hidden", "prefill_hidden")}
    with mock.patch.multiple(functional, **stubs):
        yield
    if traced != set(stubs):
        raise RuntimeError(
            f"the steps no longer call {', '.join(set(stubs) - traced)}: so the timed steps computed the model"
        )


def measure(rows: int, length: int, steps: int, layers: int, queued: int = 0) -> dict[str, float]:
    """Measure a pure decode step of `rows` sequences of `length` tokens, in milliseconds: medians, and the step's 90th
    percentile.

    Args:
        rows: running sequences.
        length: initial tokens of each sequence.
        steps: measured decode steps.
        layers: layers of the model.
        queued: prompts that wait for a row; the cost of queueing one is measured too (`queue`).

    Raises:
        RuntimeError: the engine no longer calls the functions that are timed here.
    """
    clock = Clock()
    new = rows + WARMUP + steps + 2  # the first rows decode while the last ones are prefilled
    with stub_device(), _llm(rows, length, new, layers) as llm:
        engine = llm._engine
        engine.compile_aside(None)  # a step that waits for its programs would be none of those that are timed
        _queue(llm, rows, length, new)
        waiting = queue(llm, queued) if queued else {}
        _watch(engine, clock)
        while int(engine.scheduler.rows.decoding.sum()) < rows:
            engine.step()
            if not engine.has_work:
                raise RuntimeError(f"{rows} sequences of {length} tokens never decoded together")
        for _ in range(WARMUP):
            engine.step()
        clock.take()
        found = [_parts(clock, engine) for _ in range(steps)]
    figures = {f"{name}_ms": 1e3 * median(step[name] for step in found) for name in found[0]}
    figures["schedule_and_commit_ms"] = 1e3 * median(step["schedule"] + step["commit"] for step in found)
    figures["step_p90_ms"] = 1e3 * float(np.percentile([step["step"] for step in found], 90))
    return figures | waiting


def queue(llm: LLM, count: int) -> dict[str, float]:
    """Queue prompts as `LLM.generate` does; return the microseconds that one takes, and its bytes while it waits.

    The prompts have 16 tokens and may run to the model's maximum length.
    """
    prompts = np.random.default_rng(1).integers(3, VOCAB, (count, 16)).tolist()
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    tracemalloc.start()
    try:
        kept = _add(llm, prompts[: min(count, 1000)], params)
        traced = tracemalloc.get_traced_memory()[0] / len(kept)
    finally:
        tracemalloc.stop()
    started = time.perf_counter()
    kept += _add(llm, prompts[len(kept) :], params)
    timed = count - min(count, 1000)
    figures = {"queued_prompt_bytes": traced}
    return figures | ({"queue_a_prompt_us": 1e6 * (time.perf_counter() - started) / timed} if timed else {})


def _add(llm: LLM, prompts: list[Any], params: SamplingParams) -> list[Any]:
    """Queue prompts; return their handles."""
    handles = llm._prepare(prompts, params) if prompts else []
    for handle in handles:
        llm._engine.add(handle.request)
    return handles


def _watch(engine: Engine, clock: Clock) -> None:
    """Time the parts of the engine's steps."""
    programs = engine.runner.programs
    compiled = programs.get
    programs.get = lambda key: clock.wrap("dispatch", compiled(key))
    engine.scheduler.schedule = clock.wrap("schedule", engine.scheduler.schedule)
    engine.runner.run = clock.wrap("run", engine.runner.run)
    engine.pipeline.commit = clock.wrap("commit", engine.pipeline.commit)


def _parts(clock: Clock, engine: Engine) -> dict[str, float]:
    """Return the seconds of one step and of its parts."""
    started = time.perf_counter()
    engine.step()
    whole, seconds = time.perf_counter() - started, clock.take()
    missing = [name for name in ("schedule", "run", "dispatch", "commit") if name not in seconds]
    if missing:
        raise RuntimeError(f"a decode step without {', '.join(missing)}: the engine's functions have other names")
    parts = {
        "schedule": seconds["schedule"],
        "pack": seconds["run"] - seconds["dispatch"],
        "dispatch": seconds["dispatch"],
        "commit": seconds["commit"],
    }
    return parts | {"other": whole - sum(parts.values()), "step": whole}


@contextmanager
def _llm(rows: int, length: int, new: int, layers: int) -> Iterator[LLM]:
    """Create a model with the number of arrays of a model of `layers` layers, each of them tiny."""
    longest, budget = length + BLOCK + new, PREFILLS * (length + BLOCK) + rows
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 2,
        "max_position_embeddings": longest + BLOCK,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    with tempfile.TemporaryDirectory(prefix="jaxinfer-host-") as folder:
        checkpoint.write(Path(folder), config, 0)
        with LLM(
            folder,
            skip_tokenizer_init=True,
            use_tqdm=False,
            max_num_seqs=rows,
            max_model_len=longest,
            block_size=BLOCK,
            max_num_batched_tokens=budget,
            prefill_buckets=(budget,),
            decode_buckets=(rows,),
            decode_steps=1,
        ) as llm:
            yield llm


def _queue(llm: LLM, rows: int, length: int, new: int) -> None:
    """Queue prompts at all offsets within a block, so that some rows need a new block in every step."""
    rng = np.random.default_rng(0)
    prompts = [{"prompt_token_ids": rng.integers(3, VOCAB, length + row % BLOCK).tolist()} for row in range(rows)]
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    _add(llm, prompts, params)


def text(rows: int, steps: int) -> dict[str, float]:
    """Measure the work outside of the step's critical path, in milliseconds per token of each row: detokenization
    and stop strings.
    """
    tokenizer = load_tokenizer(demo.path())
    ids = tokenizer.encode(" ".join(f"{question} {answer}." for question, answer in demo.sample_questions()))
    stop = StopStrings(STOPS)
    return {
        "detokenise_ms": 1e3 * _push(partial(_stream, tokenizer, None), ids, rows, steps),
        "detokenise_and_stop_strings_ms": 1e3 * _push(partial(_stream, tokenizer, stop), ids, rows, steps),
    }


def _stream(tokenizer: Any, stop: StopStrings | None) -> TextStream:
    return TextStream(Detokenizer(tokenizer), stop)


def _push(make: Callable[[], TextStream], ids: list[int], rows: int, steps: int) -> float:
    """Return the median seconds to process one more token of every row."""
    streams, seconds = [make() for _ in range(rows)], []
    for step in range(steps):
        started = time.perf_counter()
        for row, stream in enumerate(streams):
            stream.push([ids[(step + row) % len(ids)]])
        seconds.append(time.perf_counter() - started)
    return median(seconds)
