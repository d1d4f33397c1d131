"""Measure the cost of a decode step as its cache grows (`bench.py growth`): concatenated, contiguous and paged.

One generation is run: a prompt, then one token a step. At some lengths every method runs the same step from the same
keys and values, in turns and several times:

- `concatenation`: a plain loop whose step rebuilds the keys and values of every layer with one more position
  (`jnp.concatenate`) and frees the old ones, as PaddleNLP did before its PR #9126. There, without a compiler, new
  lengths cost nothing; here each length is a program of its own, whose compilation is excluded from the times. Padding
  to fewer lengths would amount to reserving memory. Allocating fresh memory is included. Everything except the cache is
  shared with the other methods, including the attention kernel.
- `contiguous`: rows with reserved capacity, tokens written in place (`kv.contiguous`).
- `contiguous_x4`: the same with four times the capacity.
- `paged`: blocks of 16 positions anywhere in a pool, addressed by a block table (`kv.manager`).
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.steptime import greedy
from jaxinfer import functional
from jaxinfer.functional import Array, DecodeBatch, Program
from jaxinfer.functional.growing import GrowingCache
from jaxinfer.kernels.attention.paged import KVCache
from jaxinfer.kernels.attention.xla_attention import decode_items, item_keys
from jaxinfer.kv import contiguous
from jaxinfer.loading import weights as loading
from jaxinfer.sharding import make_mesh

CONCATENATION, CONTIGUOUS, ROOMY, PAGED = METHODS = ("concatenation", "contiguous", "contiguous_x4", "paged")
BLOCK = 16
"""Positions per block of the paged cache: the engine's default."""
CHUNK = 256
"""Prompt tokens of a row that are prefilled at a time."""
MEBIBYTE = 1 << 20
Params = Sequence[Array]
Figures = dict[str, float]


@dataclass(frozen=True)
class Work:
    """Sizes of the generation, and its measured lengths."""

    rows: int
    prompt: int
    new: int
    step: int
    """Increment of the contiguous cache's read length, in positions."""
    lengths: int
    """Number of measured lengths, including those of the first and last step."""
    repeats: int

    @property
    def end(self) -> int:
        """Final number of positions of a row."""
        return self.prompt + self.new

    @cached_property
    def measured(self) -> tuple[int, ...]:
        """Number of cached positions before each measured step."""
        places = np.linspace(self.prompt, self.end - 1, min(self.lengths, self.new))
        return tuple(sorted({round(place) for place in places.tolist()}))


class Step:
    """Compiled step of one method at one length, with its cache arrays."""

    def __init__(
        self,
        program: Program,
        params: Params,
        cache: list[KVCache],
        tables: Array,
        *,
        items: int | None = None,
        longer: bool = False,
    ):
        self._params, self._cache, self._tables, self._longer = params, cache, tables, longer
        step = jax.jit(partial(_step, program, items, longer), donate_argnums=() if longer else 1)
        self._compiled = step.lower(
            params, cache, tables, *[jax.ShapeDtypeStruct((len(tables),), np.int32)] * 2
        ).compile()

    def run(self, tokens: np.ndarray, position: int) -> tuple[float, np.ndarray]:
        """Run the step; return its seconds and the next token of each row. May be repeated, as it rewrites the same
        values.
        """
        positions = np.full(len(tokens), position, np.int32)
        start = time.perf_counter()
        made, cache = jax.block_until_ready(self._compiled(self._params, self._cache, self._tables, tokens, positions))
        if not self._longer:
            self._cache = cache
        del cache  # the concatenating loop frees the old arrays each step; the new ones are as large
        return time.perf_counter() - start, np.asarray(made)

    def figures(self) -> Figures:
        """Return memory figures of the compiled program: bytes aliased to arguments, bytes newly allocated, and the
        peak beside the weights.
        """
        memory = self._compiled.memory_analysis()
        anew = memory.output_size_in_bytes - memory.alias_size_in_bytes
        weights = sum(array.nbytes for array in self._params)
        peak = memory.argument_size_in_bytes - weights + anew + memory.temp_size_in_bytes
        aliased, temporary = memory.alias_size_in_bytes, memory.temp_size_in_bytes
        sizes = {"aliased": aliased, "made_anew": anew, "temporary": temporary, "peak": peak}
        return {f"{name}_mib": size / MEBIBYTE for name, size in sizes.items()}


def _step(
    program: Program,
    items: int | None,
    longer: bool,
    params: Params,
    cache: list[KVCache],
    tables: Array,
    tokens: Array,
    positions: Array,
) -> tuple[jax.Array, list[KVCache]]:
    if longer:
        cache = jax.tree.map(lambda a: jnp.concatenate([a, jnp.zeros_like(a[:, :, :1])], axis=2), cache)
    return greedy(program, params, cache, DecodeBatch(tokens, positions, tables, items))


@dataclass(frozen=True)
class Bench:
    """Model with the inputs that it is measured on."""

    program: Program
    params: Params
    work: Work

    def begin(self, seed: int) -> tuple[GrowingCache, np.ndarray]:
        """Prefill prompts `[R, S]` in chunks; return the cache and the first token of each row."""
        work, vocab = self.work, self.program.vocab
        prompts = np.random.default_rng(seed).integers(3, vocab, (work.rows, work.prompt))
        cache = GrowingCache.reserve(self.program, work.rows, work.end, work.step)
        for start in range(0, work.prompt, CHUNK):
            logits, cache = cache.append(self.params, prompts[:, start : start + CHUNK])
        return cache, np.asarray(logits.argmax(axis=-1), np.int32)

    def steps(self, layers: list[KVCache]) -> dict[str, Step]:
        """Return the step of each method, with caches holding these keys and values `[R, K, S, D]`."""
        length = layers[0].keys.shape[2]
        return {
            CONCATENATION: Step(
                self.program, self.params, layers, jnp.arange(self.work.rows, dtype=jnp.int32)[:, None], longer=True
            ),
            CONTIGUOUS: self._contiguous(layers, length, 1),
            ROOMY: self._contiguous(layers, length, 4),
            PAGED: self._paged(layers, length),
        }

    def _contiguous(self, layers: list[KVCache], length: int, room: int) -> Step:
        pairs = [(layer.keys, layer.values) for layer in layers]
        cache = GrowingCache.adopt(self.program, pairs, self.work.end * room, self.work.step)
        tables = cache.regions.tables(jnp.arange(self.work.rows), cache.read_width(length + 1))[0]
        return Step(self.program, self.params, cache.arrays, tables)

    def _paged(self, layers: list[KVCache], length: int) -> Step:
        work, width = self.work, -(-self.work.end // BLOCK)
        # Random block order, as in a pool that has served other requests before.
        tables = np.random.default_rng(0).permutation(work.rows * width).astype(np.int32).reshape(work.rows, width)
        cache = functional.init_cache(self.program, work.rows * width, BLOCK)
        fill = jax.jit(
            partial(jax.tree.map, lambda array, given: contiguous.fill(array, given, tables)), donate_argnums=0
        )
        items = None
        if self.program.kernel == "xla":  # as the engine does (`Shapes.items_bucket`)
            items, needed = work.rows, work.rows * (length // item_keys(BLOCK) + 1)
            while items < needed:
                items *= 2
            items = min(items, decode_items(work.rows, width * BLOCK, BLOCK))
        return Step(self.program, self.params, fill(cache, layers), jnp.asarray(tables), items=items)


def measure(
    hf: Mapping[str, Any], work: Work, *, dtype: str = "auto", seed: int = 0, kernel: str = "auto", say: Any = print
) -> Figures:
    """Run the generation, and measure every method at the chosen lengths."""
    mesh = make_mesh(1)
    program, params = functional.split(loading.random(hf, mesh, dtype=dtype), mesh, attention_kernel=kernel)
    if program.layout.groups > 1:
        raise ValueError("growth compares caches of a model whose layers all keep every position; this one has others")
    bench = Bench(program, params, work)
    cache, tokens = bench.begin(seed)
    seconds: dict[str, list[list[float]]] = {name: [] for name in METHODS}
    found: Figures = {"cache_mib": cache.nbytes / MEBIBYTE}
    for position in range(work.prompt, work.end):
        if position in work.measured:
            layers = [KVCache(*cache.layer(number)) for number in range(len(program.specs))]
            steps = bench.steps(layers)
            del layers
            times, made = _in_turns(steps, tokens, position, work.repeats)
            for name, own in times.items():
                seconds[name].append(own)
                found[f"step_ms@{name}_{position}"] = 1e3 * median(own)
                found[f"same_tokens@{name}"] = min(
                    found.get(f"same_tokens@{name}", 1.0), float((made[name] == made[CONTIGUOUS]).mean())
                )
            if position == work.measured[-1]:
                found |= {
                    f"{key}@{name}": value for name, step in steps.items() for key, value in step.figures().items()
                }
            del steps
            say(
                f"{position} positions: "
                + ", ".join(f"{name} {1e3 * median(own):.1f} ms" for name, own in times.items())
            )
        logits, cache = cache.append(params, tokens[:, None])
        tokens = np.asarray(logits.argmax(axis=-1), np.int32)
    return found | _summary(seconds, work)


def _in_turns(
    steps: Mapping[str, Step], tokens: np.ndarray, position: int, repeats: int
) -> tuple[dict[str, list[float]], dict[str, np.ndarray]]:
    """Run the steps in turns after a warm-up pass; return the seconds of each by round, and its tokens."""
    made = {name: step.run(tokens, position)[1] for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(repeats):
        for name in list(steps)[:: -1 if number % 2 else 1]:
            times[name].append(steps[name].run(tokens, position)[0])
    return times, made


def _summary(seconds: Mapping[str, Sequence[Sequence[float]]], work: Work) -> Figures:
    """Summarise all measured lengths: medians, ratios within a round, and the cost of a thousand more positions."""

    def ratio(one: str, other: str) -> float:
        return median(a / b for ours, theirs in zip(seconds[one], seconds[other]) for a, b in zip(ours, theirs))

    found = {}
    for name, own in seconds.items():
        medians = [1e3 * median(times) for times in own]
        found[f"step_ms@{name}"] = median(medians)
        if len(medians) > 1:
            found[f"ms_per_1000_positions@{name}"] = 1e3 * float(np.polyfit(work.measured, medians, 1)[0])
    for name in (CONTIGUOUS, PAGED):
        found[f"times_as_fast_as_concatenation@{name}"] = ratio(CONCATENATION, name)
    found["contiguous_over_paged"] = ratio(CONTIGUOUS, PAGED)
    found["four_times_the_room_over_once"] = ratio(ROOMY, CONTIGUOUS)
    return found


def plot(found: Figures, work: Work, path: Path) -> None:
    """Plot step time against length.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError("--plot needs matplotlib, of the extra `notebook`: pip install '.[notebook]'") from error
    figure = Figure(figsize=(7, 4), layout="constrained")
    draw(found, work, figure.add_subplot())
    figure.savefig(path)


def draw(found: Figures, work: Work, axes: Any) -> None:
    """Draw step time against length on matplotlib's axes."""
    for name in METHODS:
        axes.plot(work.measured, [found[f"step_ms@{name}_{place}"] for place in work.measured], marker=".", label=name)
    axes.set(xlabel=f"positions of each of {work.rows} rows", ylabel="ms a decode step", ylim=(0, None))
    axes.legend()
