"""Compare projections of one input as one GEMM and as several, by number of rows (`bench.py projections`).

The layers are those of the engine (`layers.linear`), with its choice of matrix product implementation:

- `unfused`: one layer, and so one weight, per output; XLA is kept from merging the products.
- `fused`: one layer for all outputs, as one GEMM at any number of rows.
- `apart`: the same layer with its weight split into one GEMM per output, as in the engine with
  `fuse_projections=False`.

For Kimi Delta Attention this is the microbenchmark of SGLang #17801, whose figures are shown beside: six projections of
the hidden state, then two low-rank ones of the last two results.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from benchmarks.calls import Calls, Layer, products
from benchmarks.gpu.projections import SEPARATE, SERIAL
from benchmarks.steptime import in_turns
from jaxinfer.kernels.matmul import choose as matmul
from jaxinfer.layers.linear import BatchedLinear, FusedLinear, Output
from jaxinfer.layers.params import Build
from jaxinfer.sharding import make_mesh

UNFUSED, FUSED, APART = "unfused", "fused", "apart"
ROWS = (1, 8, 64, 512, 4096, 8192, 16384)
CPU_ROWS = (1, 8, 64, 512, 4096)
"""Default rows on a CPU, where more rows only scale the time."""
SOURCE = "sglang#17801"
PUBLISHED: Mapping[str, float] = {
    "unfused_ms@kda_m4096": 0.57,
    "fused_ms@kda_m4096": 0.50,
    "unfused_ms@kda_m8192": 1.03,
    "fused_ms@kda_m8192": 0.98,
    "unfused_ms@kda_m16384": 1.99,
    "fused_ms@kda_m16384": 1.91,
    "unfused_ms@kda_decode": 0.0388,
    "fused_ms@kda_decode": 0.0117,
}
"""Figures of the pull request, which names neither the GPU nor the rows of the decode step. Its baseline is
`unfused` here."""
Figures = dict[str, float]


@dataclass(frozen=True)
class Group:
    """Projections of one input `[m, width]`, and in `behind` projections of the last results, one for each."""

    width: int
    outputs: tuple[Output, ...]
    behind: tuple[Output, ...] = ()

    def __str__(self) -> str:
        first, last = (", ".join(str(output.rows) for output in outputs) for outputs in (self.outputs, self.behind))
        return f"{self.width} -> {first}" + (f"; {self.outputs[-1].rows} -> {last}" if last else "")


def _heads(width: int, dim: int, **columns: int) -> Group:
    return Group(width, tuple(Output(name, count // dim, dim) for name, count in columns.items()))


GROUPS: Mapping[str, Group] = {
    "kda": Group(
        2304,
        (
            *(Output(name, 8, 128) for name in ("q", "k", "v")),
            Output("b", 8),
            *(Output(name, 1, 128, sharded=False) for name in ("f_a", "g_a")),
        ),
        (Output("f_b", 8, 128), Output("g_b", 8, 128)),
    ),
    "qkv": _heads(2048, 64, q=2048, k=512, v=512),
    "gate_up": _heads(2048, 1, gate=5632, up=5632),
}
"""KDA of Kimi-Linear-48B over four shards; attention and MLP of a Llama of 1.1 B parameters."""
SECONDS = 3.0
"""Minimum seconds of measurement for each number of rows."""
SMALL = 8
"""Divisor of all sizes for a quick run."""


def smaller(group: Group) -> Group:
    """Return the group with an eighth of the width and of each head."""

    def less(outputs: Sequence[Output]) -> tuple[Output, ...]:
        return tuple(
            Output(o.name, o.units if o.width > 1 else max(1, o.units // SMALL), max(1, o.width // SMALL), o.sharded)
            for o in outputs
        )

    return Group(group.width // SMALL, less(group.outputs), less(group.behind))


class Projections(nnx.Module):
    """Module of a group, `[m, width]` -> its results; with `apart`, one layer per output."""

    def __init__(self, build: Build, group: Group, *, apart: bool):
        def layers(outputs: Sequence[Output]) -> list[Sequence[Output]]:
            return [(output,) for output in outputs] if apart else [outputs]

        self.first = nnx.List([FusedLinear(build, group.width, own) for own in layers(group.outputs)])
        inputs = len(group.behind)
        depth = group.outputs[-1].columns(1)
        self.behind = nnx.List([BatchedLinear(build, depth, own) for own in layers(group.behind)] if inputs else [])
        self.inputs = inputs

    def __call__(self, x: jax.Array) -> list[jax.Array]:
        """Return all results, including those of the second projections."""
        made = [y for layer in self.first for y in layer(x)]
        low, last = made[len(made) - self.inputs :], []
        for layer in self.behind:
            count = len(layer.outputs)
            last += layer(*low[:count])
            low = low[count:]
        one = len(self.first) == 1 and self.first[0].fused
        # Return one GEMM's output as one array, as layers read slices of it; separate program outputs would be copied.
        first = [jnp.concatenate(made, axis=-1)] if one else made
        if one and last and self.behind[0].kernel != matmul.NATIVE:
            last = [jnp.stack(last, axis=2)]
        return [y.reshape(x.shape[0], -1) for y in (*first, *last)]


class Bench:
    """Layers of one group in one dtype, to be run with any number of rows."""

    def __init__(self, group: Group, mesh: Mesh, dtype: str, kernel: str = "auto"):
        self.group, self.mesh, self.dtype = group, mesh, jnp.dtype(dtype)
        self.kernel = matmul.choose(kernel, mesh)

    def calls(self, variant: str, rows: int) -> Calls:
        """Return the program of a variant."""

        def make() -> Projections:
            return Projections(Build(nnx.Rngs(0), self.dtype, self.mesh), self.group, apart=variant == UNFUSED)

        options = (SEPARATE if variant == UNFUSED else SERIAL) if self.mesh.devices.flat[0].platform != "cpu" else {}
        layer = Layer(make, self.kernel, variant != APART, options)
        return Calls.of(layer, [(rows, self.group.width)], self.dtype)

    def measure(self, rows: int, repeats: int, seconds: float = 0.0) -> Figures:
        """Measure each variant at this number of rows: milliseconds, and ratios within a round as median and
        quartiles.
        """
        made = {variant: self.calls(variant, rows) for variant in (UNFUSED, FUSED, APART)}
        found = in_turns({variant: calls.timer() for variant, calls in made.items()}, repeats, seconds)
        figures = {f"{variant}_ms": 1e3 * median(passes) for variant, passes in found.items()}
        figures |= {f"{variant}_products": calls.products for variant, calls in made.items()}
        ratios = [one / other for one, other in zip(found[UNFUSED], found[FUSED], strict=True)]
        low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
        figures |= {"unfused_over_fused": middle, "unfused_over_fused_q25": low, "unfused_over_fused_q75": high}
        return figures | {"apart_over_fused": median(a / f for a, f in zip(found[APART], found[FUSED], strict=True))}


def measure(
    groups: Mapping[str, Group],
    rows: Sequence[int] | None,
    repeats: int,
    *,
    dtype: str,
    kernel: str = "auto",
    seconds: float = 0.0,
) -> Figures:
    """Measure all groups, each for at least `seconds`.

    Args:
        groups: groups by name.
        rows: numbers of rows; by default suited to the device.
        repeats: rounds of measurement.
        dtype: dtype of inputs and weights.
        kernel: see `EngineConfig.matmul_kernel`.
        seconds: minimum seconds for each number of rows.
    """
    mesh = make_mesh(1)
    sizes = rows or (CPU_ROWS if mesh.devices.flat[0].platform == "cpu" else ROWS)
    figures: Figures = {}
    for name, group in groups.items():
        bench = Bench(group, mesh, dtype, kernel)
        for count in sizes:
            figures |= {
                f"{metric}@{name}_m{count}": value for metric, value in bench.measure(count, repeats, seconds).items()
            }
    ratios = [value for name, value in figures.items() if name.startswith("unfused_over_fused@")]
    return figures | {"least_unfused_over_fused": min(ratios)}


def h100() -> Figures:
    """Count the kernels of a greedy decode step of `gpu.models.KIMI_LINEAR_4`, compiled for an H100 without one.

    Before: separate projections, which XLA is kept from merging; after: fused, with XLA's defaults.
    """
    from benchmarks.gpu.compiled import compile_step
    from benchmarks.gpu.models import KIMI_LINEAR_4

    merging_off = {name: value for name, value in SEPARATE.items() if name not in SERIAL}
    figures: Figures = {}
    for variant, fused, options in ((APART, False, merging_off), (FUSED, True, {})):
        step = compile_step(KIMI_LINEAR_4, "decode", 1, fuse_projections=fused, **options)
        figures[f"{variant}_kernels@h100_decode"] = len(step.kernels)
        figures[f"{variant}_products@h100_decode"] = products(step.executable)
    return figures


def published(figures: Figures) -> Figures:
    """Return the published figures, with their ratios, for what was measured."""
    own = {name: value for name, value in PUBLISHED.items() if name in figures or name.endswith("_decode")}
    ratios = {
        name.replace("unfused_ms", "unfused_over_fused"): value / own[name.replace("unfused", "fused")]
        for name, value in own.items()
        if name.startswith("unfused")
    }
    return own | ratios
