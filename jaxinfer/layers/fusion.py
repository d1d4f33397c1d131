"""Up to how many rows projections of one input are one GEMM: the one place that knows.

One GEMM instead of several saves launches, and reads of the input, while reading the weights is what takes the time. With
many rows multiplying takes it, nothing is saved, and a GEMM of odd width can lose to several of even ones: another GPU lost
past a few hundred rows (SGLang #17801 and what followed it). So it is decided for each compiled step, by its rows.
"""

from collections.abc import Mapping

from jax.sharding import Mesh

from jaxinfer.errors import ConfigError

AUTO = "auto"
ALWAYS, NEVER = float("inf"), 0

CROSSOVERS: Mapping[str, float] = {"cpu": ALWAYS, "gpu": ALWAYS}
"""By platform: the most rows for which one GEMM is at least as fast as several.

CPU: a KDA layer of width 1024 with 8 heads of 128, bfloat16, native products, one against eight and two: 2.7 against 4.0 ms
at 32 rows, 15 against 24 at 512, no difference at 8 (jax 0.12, two cores of an AMD EPYC with other work on them).
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
