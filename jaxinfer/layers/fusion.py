"""Up to how many rows projections of one input are one GEMM: the one place that knows.

One GEMM instead of several saves launches, and reads of the input, while reading the weights is what takes the time.
With many rows multiplying takes it, nothing is saved, and a GEMM of odd width can lose to several of even ones: another
GPU lost past a few hundred rows (SGLang #17801 and what followed it). So it is decided for each compiled step, by its
rows.
"""

from collections.abc import Mapping

from jax.sharding import Mesh

from jaxinfer.errors import ConfigError

AUTO = "auto"
ALWAYS, NEVER = float("inf"), 0

CROSSOVERS: Mapping[str, float] = {"cpu": ALWAYS, "gpu": ALWAYS}
"""By platform: the most rows for which one GEMM is at least as fast as several.

CPU: of the projections of a KDA, an attention and an MLP layer at 1 to 4096 rows several took 1.00 to 1.12 of the time
of one in bfloat16, and 0.96 to 1.09 in float32, where no upper quartile lies below 1.00 (`scripts/bench.py
projections`, docs/results/cpu.md; jax 0.12, two cores of an AMD EPYC).
GPU: not measured yet.
"""


def rows_fused(asked: str | bool, mesh: Mesh) -> float:
    """The most rows that are multiplied as one GEMM on these devices.

    Raises:
        ConfigError: what was asked for is neither "auto" nor True nor False.
    """
    if isinstance(asked, bool):
        return ALWAYS if asked else NEVER
    if asked != AUTO:
        raise ConfigError(f"fuse_projections must be {AUTO!r}, True or False, got {asked!r}")
    platform = mesh.devices.flat[0].platform
    return CROSSOVERS.get("gpu" if platform == "cuda" else platform, ALWAYS)
