"""Measure the steps of `bench.py cross`: cross-attention with the needed projections, or with Q, K, V of both streams.

Before vLLM's PR #12325, cross-attention had one QKV projection. It was applied to the decoder's stream, of which only
the queries were kept, and to the encoder's, of which only keys and values were kept: `padded` here. It replaces
`layers.cross.CrossQKV` in a model of random weights, with the same weights and the same results:

- projections: those of all layers alone, for a prefill (the decoder's first tokens and the encoder's whole input) and a
  decode step
- steps: of the whole model: the encoder's step with the decoder's first, and one decode step
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.calls import Calls, Layer, cost
from benchmarks.gpu.projections import SERIAL
from benchmarks.steptime import BLOCK, Run, greedy, in_turns, timed
from jaxinfer import functional
from jaxinfer.commands.bench.trace import span
from jaxinfer.functional import DecodeBatch, PrefillBatch, Program
from jaxinfer.functional.encoder_batch import EncodeBatch, EncodeJob, EncodeShape, encode_batch
from jaxinfer.kernels.attention.paged import Cache
from jaxinfer.kernels.matmul import choose as matmul
from jaxinfer.kv import groups as kv_groups
from jaxinfer.layers.cross import CrossQKV
from jaxinfer.layers.linear import FusedLinear
from jaxinfer.layers.params import Build
from jaxinfer.loading import weights
from jaxinfer.media import EncoderInput
from jaxinfer.models.base import LanguageModel
from jaxinfer.sharding import make_mesh
from jaxinfer.sharding.collectives import DECODE, PREFILL

OURS, PADDED = "cross_qkv", "padded"
LARGE: Mapping[str, Any] = {
    "architectures": ["BartForConditionalGeneration"],
    "model_type": "bart",
    "vocab_size": 50264,
    "d_model": 1024,
    "encoder_layers": 12,
    "decoder_layers": 12,
    "encoder_attention_heads": 16,
    "decoder_attention_heads": 16,
    "encoder_ffn_dim": 4096,
    "decoder_ffn_dim": 4096,
    "max_position_embeddings": 1024,
    "activation_function": "gelu",
    "is_encoder_decoder": True,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
"""Contents of config.json in the shape of bart-large-cnn, without its forced tokens."""
SMALL = {
    "vocab_size": 4096,
    "d_model": 256,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 1024,
    "decoder_ffn_dim": 1024,
}
"""Smaller values for a quick run."""
STEPS = (PREFILL, DECODE)
Figures = dict[str, float]


@dataclass(frozen=True)
class Work:
    """Sizes of the measured steps."""

    rows: int
    """B, the number of documents."""
    document: int
    """Tokens of each document."""
    context: int
    """Context length of the decoder's sequences in a decode step, in tokens."""
    repeats: int
    """Passes of each variant, in turns."""


SCALE = 8
"""Divisor of lengths for a quick run."""


def smaller(work: Work) -> Work:
    """Return the sizes with an eighth of the lengths."""
    return replace(work, document=max(1, work.document // SCALE), context=max(1, work.context // SCALE))


def config(dtype: str, *, small: bool = False) -> dict[str, Any]:
    """Return the config.json of the model."""
    return {**LARGE, **(SMALL if small else {}), "dtype": dtype}


class Whole(FusedLinear):
    """Fused projection that always computes its whole product, which XLA could otherwise shrink to the used outputs."""

    def product(self, *arguments: Any, **named: Any) -> jax.Array:
        """Compute the product of all outputs."""
        return jax.lax.optimization_barrier(super().product(*arguments, **named))


class PaddedQKV(nnx.Module):
    """Replacement of `CrossQKV` that computes Q, K and V of both streams."""

    def __init__(self, build: Build, qkv: CrossQKV, width: int):
        self.whole = Whole(build, width, (*qkv.q.outputs, *qkv.kv.outputs), bias=(*qkv.q.biased, *qkv.kv.biased))

    def q(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """See `CrossQKV.q`."""
        return self.whole(x)[:1]

    def kv(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """See `CrossQKV.kv`."""
        return self.whole(x)[1:]


def padded(module: LanguageModel, build: Build) -> LanguageModel:
    """Replace the cross-attention projections of a model by `PaddedQKV` with the same weights; one shard."""
    made = nnx.merge(*nnx.split(module))
    for layer in made.decoder.layers:
        own: CrossQKV = layer.cross.qkv
        whole = nnx.eval_shape(lambda own=own: PaddedQKV(build._replace(rngs=nnx.Rngs(0)), own, own.q.weight.shape[-1]))
        for name in ("weight", "bias"):
            parts = [getattr(part, name)[...] for part in (own.q, own.kv)]
            getattr(whole.whole, name).set_value(jnp.concatenate(parts, axis=1))
        layer.cross.qkv = whole
    return made


class Streams(nnx.Module):
    """Projections of one layer: of the decoder's `[T, M]` and, in a prefill, of the encoder's `[S, M]`."""

    def __init__(self, qkv: nnx.Module):
        self.qkv = qkv

    def __call__(self, x: jax.Array, *encoded: jax.Array) -> list[jax.Array]:
        """Return the columns of Q, K and V."""
        return [y.reshape(len(y), -1) for y in (*self.qkv.q(x), *(own for one in encoded for own in self.qkv.kv(one)))]


class Bench:
    """Model of random weights in both variants, with its inputs."""

    def __init__(self, hf: Mapping[str, Any], work: Work, *, dtype: str, seed: int, kernel: str = "auto"):
        self.work, self.mesh, self._asked = work, make_mesh(1), kernel
        module = weights.random(dict(hf), self.mesh, dtype=dtype, seed=seed)
        build = Build(nnx.Rngs(0), jnp.dtype(dtype), self.mesh)
        self._modules = {OURS: module, PADDED: padded(module, build)}
        self.layers, self.width, self.dtype = module.config.num_layers, module.config.width, jnp.dtype(dtype)

    def program(self, variant: str, kernel: str | None = None) -> tuple[Program, list[jax.Array]]:
        """Return the program of a variant and its parameters, with the engine's choice of kernels or the given one."""
        kernel, attention = (self._asked, "auto") if kernel is None else (kernel, kernel)
        return functional.split(self._modules[variant], self.mesh, matmul_kernel=kernel, attention_kernel=attention)

    def projections(self, step: str) -> Figures:
        """Measure the projections of all layers, one after another: milliseconds, operations and bytes."""
        rows, read = self.work.rows, self.work.rows * self.work.document
        shapes = [(rows, self.width)] + ([(read, self.width)] if step == PREFILL else [])
        options = {} if self.mesh.devices.flat[0].platform == "cpu" else SERIAL

        def calls(variant: str, kernel: str) -> Calls:
            def make() -> Streams:
                return Streams(nnx.clone(self._modules[variant].decoder.layers[0].cross.qkv))

            return Calls.of(Layer(make, kernel, True, options), shapes, self.dtype, self.layers)

        chosen = matmul.choose(self._asked, self.mesh)
        runs = {variant: calls(variant, chosen).timer() for variant in (OURS, PADDED)}
        measured = in_turns(runs, self.work.repeats)
        found = {variant: [self.layers * each for each in seconds] for variant, seconds in measured.items()}
        return _compared(found, {variant: cost(calls(variant, matmul.XLA).compiled) for variant in found})

    def steps(self, step: str) -> Figures:
        """Measure steps of the whole model: milliseconds, operations and bytes."""
        found = in_turns({variant: self.runner(step, variant) for variant in (OURS, PADDED)}, self.work.repeats)
        return _compared(found, {variant: cost(self.compiled(step, variant, matmul.XLA)[0]) for variant in found})

    def compiled(self, step: str, variant: str, kernel: str | None = None) -> tuple[jax.stages.Compiled, list[Any]]:
        """Compile a step; return it with its arguments: parameters, cache, batches."""
        program, params = self.program(variant, kernel)
        cache = functional.init_cache(program, _blocks(program, self.work)[1], BLOCK)
        *begin, decode = _batches(program, self.work)
        body, batches = (_begin, begin) if step == PREFILL else (greedy, [decode])
        placed = jax.tree.map(lambda array: array.sharding, cache)
        jitted = jax.jit(partial(body, program), donate_argnums=1, out_shardings=(None, placed))
        return jitted.lower(params, cache, *batches).compile(), [params, cache, *batches]

    def runner(self, step: str, variant: str) -> Run:
        """Return a function that runs a step and returns its seconds."""
        compiled, (params, cache, *batches) = self.compiled(step, variant)
        held = [cache]

        def call() -> jax.Array:
            tokens, held[0] = compiled(params, held[0], *batches)
            return tokens

        return partial(timed, call)


def _begin(
    program: Program, params: list[jax.Array], cache: Cache, encode: EncodeBatch, batch: PrefillBatch
) -> tuple[jax.Array, Cache]:
    """Run the encoder's step and the decoder's first step."""
    return greedy(program, params, functional.encode_cross(program, params, cache, encode), batch)


def _blocks(program: Program, work: Work) -> tuple[np.ndarray, int]:
    """Return block tables `[G, B, W]` without shared blocks, and the number of blocks N."""
    width = -(-max(work.document, work.context) // BLOCK)
    shape = program.layout.groups, work.rows, width
    tables = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    return tables, tables.size


def _batches(program: Program, work: Work) -> tuple[EncodeBatch, PrefillBatch, DecodeBatch]:
    """Return batches of random documents: the encoder's, the decoder's first token of each, and one in mid-sequence."""
    tables, blocks = _blocks(program, work)
    rng, (first,) = np.random.default_rng(0), np.ones((1, 1), np.int32)
    documents = rng.integers(3, program.vocab, (work.rows, work.document)).astype(np.int32)
    read = kv_groups.encoded(program.layout.kinds).span
    jobs = [EncodeJob(EncoderInput("text", ids, 1), tables[read, row], 0) for row, ids in enumerate(documents)]
    shape = EncodeShape(documents.size, 1, tables[read].shape[0], work.rows, program.tile)
    seen = np.tile(np.array([[0, work.document]], np.int32), (work.rows, 1))
    return (
        encode_batch(program.cross, jobs, BLOCK, blocks, shape),
        functional.prefill_batch([(first, 0, 1)] * work.rows, tables, seen=seen, tile=program.tile),
        DecodeBatch(first.repeat(work.rows), np.full(work.rows, work.context - 1, np.int32), tables, seen=seen),
    )


def _compared(found: Mapping[str, list[float]], costs: Mapping[str, Figures]) -> Figures:
    """Return the figures of both variants, and the ratio of the padded one to the other."""
    figures = {f"{variant}_ms": 1e3 * median(seconds) for variant, seconds in found.items()}
    figures |= {f"{variant}_{name}": value for variant, own in costs.items() for name, value in own.items()}
    ratios = [other / own for other, own in zip(found[PADDED], found[OURS], strict=True)]
    figures |= {f"padded_over_ours_{kind}": value for kind, value in span(ratios).items()}
    return figures | {f"padded_over_ours_{name}": costs[PADDED][name] / costs[OURS][name] for name in costs[OURS]}


def measure(hf: Mapping[str, Any], work: Work, *, dtype: str, seed: int, kernel: str = "auto") -> Figures:
    """Measure the projections and the whole steps, for prefill and decode."""
    bench = Bench(hf, work, dtype=dtype, seed=seed, kernel=kernel)
    figures: Figures = {}
    for step in STEPS:
        for name, of in (("projections", bench.projections), ("step", bench.steps)):
            figures |= {f"{metric}@{step}_{name}": value for metric, value in of(step).items()}
    return figures
