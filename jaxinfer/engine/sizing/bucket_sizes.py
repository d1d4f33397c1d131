"""Choose the sizes of batches that steps are compiled for, by the device."""

from collections.abc import Sequence

from jaxinfer.config import CONTIGUOUS, EngineConfig
from jaxinfer.errors import ConfigError
from jaxinfer.functional import Program
from jaxinfer.kernels.attention import choose as attention
from jaxinfer.kernels.matmul import choose as matmul
from jaxinfer.kv.groups import full_group
from jaxinfer.speculative_config import DRAFT_MODEL

CPU_DECODE, CPU_PREFILL = (1, 2, 4, 8, 16), (32, 64)
"""Smallest buckets in tokens. On a CPU the time of a step is proportional to its size, so there are sizes between the
doublings, too."""
CPU_ENCODE, GPU_ENCODE = (1, 2, 4, 8), (1, 2, 4, 8, 16, 32)
"""Inputs per encoder step. The remaining inputs are encoded in a smaller step instead of being padded."""
CPU_JOINT, GPU_JOINT = (16, 64), (64, 256)
"""Values per step of an encoder that sees images whole; an image of 256 x 256 pixels has 64 for Qwen3-VL."""
CPU_CROSS, GPU_CROSS = (1, 2, 4), (1, 2, 4, 8, 16)
"""The same for cross-attention to audio and images; texts have the buckets of prefill, up to the longest."""
CPU_VERIFY, GPU_VERIFY = (2, 4, 8, 16), (16, 64)
"""Tokens of steps that verify drafts. More tokens would take longer than the decode steps that they save."""
GPU_DECODE, GPU_PREFILL = (1, 8, 32), (256, 512)
"""Smallest buckets in tokens. On a GPU any small step takes as long as reading the weights."""
CPU_FEW, GPU_FEW = 16, 64
"""Sequences of the smaller joint steps; the larger have room for all rows. Head and sampler compute all of them, so
that with 64 for 16 a joint step on a CPU saves half as much."""
LEAST_JOINT = 4
"""Least number of tokens of a joint step for each of its sequences. It bounds the number of programs."""


def decode_buckets(program: Program, config: EngineConfig, rows: int, *, gpu: bool) -> tuple[int, ...]:
    """Return the numbers of rows that decode steps are compiled for."""
    first = GPU_DECODE if gpu else CPU_DECODE
    if not gpu and matmul.choose(config.matmul_kernel, program.mesh) != matmul.NATIVE:
        first = CPU_DECODE[2:]  # XLA on a CPU takes ten times as long for one row of bfloat16 as for four
    return _buckets(config.decode_buckets, rows, first, "decode_buckets", halves=not gpu)


def prefill_buckets(program: Program, config: EngineConfig, tokens: int, *, gpu: bool) -> tuple[int, ...]:
    """Return the numbers of tokens that prefill steps are compiled for; a deterministic engine has one."""
    if program.deterministic:
        return (tokens,)
    first = GPU_PREFILL if gpu else CPU_PREFILL
    return _buckets(config.prefill_buckets, tokens, first, "prefill_buckets", halves=True)


def verify_buckets(program: Program, config: EngineConfig, rows: int, *, gpu: bool) -> tuple[int, ...]:
    """Return the numbers of tokens of the steps that verify drafts.

    Raises:
        ConfigError: the model or another setting does not support speculative decoding.
    """
    speculative = config.speculative_config
    if speculative is None:
        return ()
    reasons = {
        "deterministic=True": config.deterministic,
        "cache='contiguous'": config.cache == CONTIGUOUS,
        "return_routed_experts=True": config.return_routed_experts,
        "a model with recurrent layers": bool(program.layout.states),
        "a model with an encoder for cross-attention": program.cross is not None,
        "a draft model for one whose layers all have sliding windows": (
            speculative.method == DRAFT_MODEL and full_group(program.layout.kinds) is None
        ),
    }
    if found := next((reason for reason, holds in reasons.items() if holds), None):
        raise ConfigError(f"speculative_config does not support {found} yet; leave one of them out")
    most = min(GPU_VERIFY[-1] if gpu else CPU_VERIFY[-1], rows * (speculative.num_speculative_tokens + 1))
    sizes = [size for size in (GPU_VERIFY if gpu else CPU_VERIFY) if size < most]
    return (*sizes, most)


def joint_buckets(
    program: Program, config: EngineConfig, rows: int, tokens: Sequence[int], *, gpu: bool
) -> tuple[tuple[int, int], ...]:
    """Return tokens and sequences of the joint steps; none where they are not wanted or, on a CPU, not requested.

    There they save 4 to 8% of the processor time of mixed loads, less than compiling them takes in minutes.

    Args:
        program, config: model and settings.
        rows: maximum number of running sequences.
        tokens: the prefill buckets.
        gpu: whether the steps are for GPUs.

    Raises:
        ConfigError: joint steps are requested, and the model or another setting does not support them.
    """
    reasons = {
        "deterministic=True, which has a step of its own for both": config.deterministic,
        f"attention_kernel {program.kernel!r}": program.kernel not in (attention.NATIVE, attention.TRITON),
        "a model with recurrent layers": bool(program.layout.states),
        "a model with an encoder for cross-attention": program.cross is not None,
        "a draft model": program.draft is not None,
    }
    found = next((reason for reason, holds in reasons.items() if holds), None)
    if config.joint_steps and found:
        raise ConfigError(f"joint_steps=True does not support {found}; leave it out")
    wanted = gpu if config.joint_steps is None else config.joint_steps
    if found or not wanted:
        return ()
    sizes = sorted({min(GPU_FEW if gpu else CPU_FEW, rows), rows})
    return tuple((size, most) for size in tokens for most in sizes if most * LEAST_JOINT <= size)


def encode_buckets(program: Program, largest: int, *, gpu: bool) -> tuple[int, ...]:
    """Return the numbers of inputs per encoder step; a deterministic engine encodes one at a time.

    Where an input is encoded whole, they are numbers of its values, up to the `largest` input.
    """
    if program.features is None:
        return ()
    if program.features.joint is not None:
        first = [size for size in (GPU_JOINT if gpu else CPU_JOINT) if size < largest] or [largest]
        return _buckets(None, largest, first, "encode_buckets", halves=False)
    return (1,) if program.deterministic else GPU_ENCODE if gpu else CPU_ENCODE


def cross_buckets(program: Program, tokens: int, *, gpu: bool) -> tuple[int, ...]:
    """Return the numbers of values per encoder step for cross-attention; the longest text fits in the largest."""
    if program.cross is None:
        return ()
    if not program.cross.joint:
        return GPU_CROSS if gpu else CPU_CROSS
    largest = max(tokens, program.cross.longest // program.cross.rows)
    return _buckets(None, largest, GPU_PREFILL if gpu else CPU_PREFILL, "cross_buckets", halves=True)


def _buckets(
    requested: Sequence[int] | None, largest: int, first: Sequence[int], name: str, *, halves: bool
) -> tuple[int, ...]:
    """Return the requested buckets, else the `first` ones, doubled up to `largest`; `halves`: with 1.5 times each."""
    if requested is not None:
        if max(requested) < largest:
            raise ConfigError(
                f"{name} ends at {max(requested)}, but up to {largest} are needed; add a bucket of {largest}"
            )
        return tuple(sorted(set(requested)))
    sizes = list(first)
    while (size := sizes[-1]) < largest:
        sizes += [size * 3 // 2, size * 2] if halves else [size * 2]
    # A size that is nearly the largest saves little.
    return (*(size for size in sizes if size * 4 <= largest * 3), largest)
