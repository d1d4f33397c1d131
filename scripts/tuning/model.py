"""Find the calls of kernels in a model's steps, by tracing them for GPUs that need not be there."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.compiled import lower_step

from jaxinfer.checkpoint.hf import read_config
from jaxinfer.kernels.triton import tuned
from jaxinfer.loading import weights
from tuning.problems import KERNELS, Shape


def calls_of(folder: Path, tp: int, batch_sizes: Sequence[int], tokens: int) -> list[tuple[str, Shape]]:
    """Return kernels and shapes of a model's decode steps for these numbers of sequences, and of its prefill."""
    hf = read_config(folder, None)
    family, _ = weights.parse(hf, folder)
    stored = weights.config_dtype(hf) or family.stored_dtype
    hf = hf | {"dtype": weights.resolve_dtype("auto", stored, "gpu", family).name}
    with tuned.watching() as calls:
        for rows in batch_sizes:
            lower_step(hf, "decode", tp, rows=rows, chunk=tokens)
        lower_step(hf, "prefill", tp, chunk=tokens)
    found = [(kernel, _parsed(key)) for kernel, key in calls.estimated if kernel in KERNELS]
    if not found:
        raise ValueError(f"{folder}: its steps call none of the kernels that can be tuned: {', '.join(KERNELS)}")
    return found


def _parsed(key: str) -> Shape:
    """Return the shape of a table's key."""
    return {name: int(size) for name, _, size in (part.partition("=") for part in key.split())}
