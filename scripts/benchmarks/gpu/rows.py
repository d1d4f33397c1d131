"""Define every row with its goals; this module does not import JAX."""

import importlib
from dataclasses import dataclass

from benchmarks.gpu.context import Context, Figures


@dataclass(frozen=True)
class Goal:
    """Figure of a row with its target value."""

    figure: str
    text: str
    at_least: float | None = None
    at_most: float | None = None

    def met(self, value: float) -> bool:
        """Return whether a measured value reaches the goal."""
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)


@dataclass(frozen=True)
class Row:
    """Measurement that runs in a process of its own."""

    name: str
    what: str
    function: str
    """"module:function" in this package, called with a `Context`."""
    limit: float
    """Time limit in seconds."""
    goals: tuple[Goal, ...] = ()
    needs: tuple[str, ...] = ()
    """Rows whose figures this row uses; they run first, even if not requested."""
    memory: float = 0.75
    """Share of the GPU memory that JAX allocates."""

    def run(self, context: Context) -> Figures:
        """Run the row and return its figures.

        Raises:
            Skip: the row cannot run here.
        """
        module, _, function = self.function.partition(":")
        return getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)(context)


ROWS = (
    Row("roofline", "what the device can do at most", "roofline:run", 40),
    Row(
        "decode-1",
        "8 B-shaped Llama, one sequence: share of peak bandwidth",
        "llama_8b:decode",
        45,
        (Goal("step_share_of_peak", "80%", at_least=0.8),),
        ("roofline",),
    ),
    Row(
        "throughput-64",
        "64 requests 512 + 256 of a 1 B-shaped Llama: generated tokens per second",
        "throughput:run",
        45,
    ),
    Row(
        "throughput-static",
        "throughput-64 over transformers' generate with a compiled static cache",
        "throughput:static",
        45,
        (Goal("over_hf-static", "2 x static-cache generate", at_least=2),),
        ("throughput-64",),
    ),
    Row(
        "attention-decode",
        "attention decode, 64 sequences of 4096, GQA 8 (H = 32, K = 4, D = 128): live K/V bytes against copy bandwidth",
        "attention:run",
        45,
        (Goal("share_of_copy", "80%", at_least=0.8),),
        ("roofline",),
    ),
    Row(
        "prefill-4096",
        "8 B-shaped, prefill of 4096 tokens: share of the bf16 matmul rate",
        "llama_8b:prefill",
        45,
        (Goal("share_of_matmul", "60%", at_least=0.6),),
        ("roofline",),
    ),
    Row(
        "kda-decode",
        "KDA's decode projections at TP4 shapes, weights rotated, one row",
        "projections:kda_decode",
        45,
        (Goal("fused_us", "8 us", at_most=8),),
    ),
    Row(
        "cross-attention",
        "cross-attention projections of an Mllama-11B shape, batch 16, over padded QKV",
        "projections:cross",
        30,
        (Goal("ratio", "2 x", at_least=2),),
    ),
    Row(
        "growth",
        "growth 3072 + 1024, a 1 B-shaped Llama, 8 sequences",
        "growth:run",
        45,
        (
            Goal("concatenation_over_paged", "1.10 x over concatenation", at_least=1.1),
            Goal("static_over_paged", "level with a static cache", at_least=0.97),
        ),
    ),
    Row(
        "command-buffers",
        "decode of the 8 B shape: one command buffer a step, GPU busy",
        "llama_8b:command_buffers",
        45,
        (Goal("busy_share", "95%", at_least=0.95), Goal("graph_launches_a_step", "1 a step", at_most=1)),
    ),
    Row(
        "kimi-linear",
        "Kimi-Linear-48B widths (12 of its 27 layers), one sequence: share of peak bandwidth on the weights touched",
        "kimi_linear:decode",
        45,
        (Goal("step_share_of_peak", "60%", at_least=0.6),),
        ("roofline",),
    ),
    Row("tests", "the tests that need a GPU", "gpu_tests:run", 45, (Goal("failed", "0 failed", at_most=0),)),
    Row(
        "throughput-batching",
        "throughput-64 over transformers' continuous batching",
        "throughput:batching",
        45,
        (Goal("over_hf-cb", "4 x continuous batching", at_least=4),),
        ("throughput-64",),
    ),
    Row(
        "fused-m",
        "fused over separate projections at m = 1 to 16384",
        "projections:fused_m",
        45,
        (Goal("least_ratio", "never slower", at_least=1),),
    ),
    Row("startup", "compilation of the 8 B shape's steps, cold and from the cache on disk", "llama_8b:startup", 45),
    Row("attention-tiles", "tiles of the attention kernel for 64 sequences of 4096", "attention:tiles", 45),
    Row("flags", "XLA's options, decode and prefill of 8 layers of the 8 B shape", "flags:run", 45),
)
"""Rows in order of worth, so that the first minutes on a GPU give the figures that matter most; each after those it
needs. A row that its limit ends has written the figures until then, and goes on there in the next run."""


def chosen(names: list[str] | None) -> list[Row]:
    """Return the rows of these names (default: all) and their dependencies.

    Raises:
        ValueError: a name is unknown.
    """
    known = {row.name: row for row in ROWS}
    wanted = set(known if names is None else names)
    for name in sorted(wanted):
        if name not in known:
            raise ValueError(f"--only {name}: no such row; there are {', '.join(known)}")
        wanted |= set(known[name].needs)
    return [row for row in ROWS if row.name in wanted]
