"""Row limit up to which the fused projections of one input run as a single GEMM.

One GEMM instead of several saves kernel launches and reads of the input, which matters while reading weights dominates.
With many rows the multiplications dominate, nothing is saved, and a GEMM of odd width can be slower than several of
even width: on another GPU fusing lost past a few hundred rows (SGLang #17801 and its follow-ups). The choice is
therefore made for each compiled step, by its number of rows.
"""

from collections.abc import Mapping

from jax.sharding import Mesh

from jaxinfer.errors import ConfigError

AUTO = "auto"
ALWAYS, NEVER = float("inf"), 0

CROSSOVERS: Mapping[str, float] = {"cpu": ALWAYS, "gpu": ALWAYS}
"""The most rows for which one GEMM is at least as fast as several, by platform.

CPU: for the projections of a KDA, an attention and an MLP layer at 1 to 4096 rows, several GEMMs took 1.00 to 1.12
times the time of one in bfloat16, and 0.96 to 1.09 times in float32, where no upper quartile is below 1.00
(`scripts/bench.py projections`, docs/results/cpu.md; jax 0.12, two cores of an AMD EPYC). GPU: not measured yet. So
"auto" equals True on both; a measurement on a GPU may change the table.
"""


def rows_fused(requested: str | bool, mesh: Mesh) -> float:
    """Return the most rows that are multiplied as one GEMM on these devices.

    Raises:
        ConfigError: the setting is neither "auto" nor True nor False.
    """
    if isinstance(requested, bool):
        return ALWAYS if requested else NEVER
    if requested != AUTO:
        raise ConfigError(f"fuse_projections must be {AUTO!r}, True or False, got {requested!r}")
    platform = mesh.devices.flat[0].platform
    return CROSSOVERS.get("gpu" if platform == "cuda" else platform, ALWAYS)
