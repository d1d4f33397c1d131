"""Settings of the engine: one frozen value, each field with its unit and default."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any

import numpy as np

from jaxinfer._utils.checks import MAX_LOGPROBS
from jaxinfer.distributed import PEER_TIMEOUT
from jaxinfer.errors import ConfigError
from jaxinfer.sharding.policy import Placement

CPU_CACHE_BYTES = 1 << 30
"""The cache's default size on a CPU: a fixed share, as the host has other work."""
CACHES = (PAGED, CONTIGUOUS) = ("paged", "contiguous")
"""Implementations of the cache."""
QUANTIZATIONS = ("int8",)
"""What matrices may be kept in beside `dtype`."""
MAX_MODEL_LEN = 1 << 22
MAX_SEQS = 1 << 14
MAX_DECODE_STEPS = 64
MAX_BATCHED_TOKENS = 1 << 20


@dataclass(frozen=True)
class EngineConfig:
    """How the engine runs a model. None means: chosen from the model and the device, and logged."""

    dtype: str = "auto"
    """Of weights, activations and cache: "auto" (the checkpoint's), "float32", "bfloat16" or "float16"."""
    quantization: str | None = None
    """"int8": matrices are kept in int8, a scale an output channel, and multiplied in int8; None: in `dtype`."""
    tensor_parallel_size: int = 1
    """Devices over which weights and kv heads are divided."""
    placement: Mapping[str, str] | Placement | None = None
    """Which modules are divided and which are whole, and computed, on every device: patterns over their paths to
    "shard", "replicate" or, of mixtures of experts, "experts" (`sharding.policy.Placement`); None: all are divided."""
    pad_heads: bool = False
    """Whether attention heads of zeroes are added where a model's heads do not divide over the devices; without, that
    is an error. The output is the same; padded heads take memory, cache and time."""
    max_model_len: int | None = None
    """Tokens a sequence may have, prompt included; by default what the model allows and the pool holds."""
    max_num_seqs: int | None = None
    """Sequences that run at a time; by default 64 on a CPU, 256 on a GPU."""
    max_num_batched_tokens: int | None = None
    """Tokens of one step, prefill and decode together; by default 512 on a CPU, 2048 on a GPU."""
    attention_kernel: str = "auto"
    """"triton" (NVIDIA GPUs, with the extra `cuda13` or `cuda12`), "native" (CPUs with AVX-512 and a C++ compiler),
    "xla" (everywhere), or "auto": the first of these that can be."""
    matmul_kernel: str = "auto"
    """"native" (CPUs, as above, on one device), "triton" (GPUs, as above, for the products of experts; XLA's for all
    others), "xla" (everywhere), or "auto": the first of these that can be."""
    fuse_projections: str | bool = "auto"
    """Whether projections of one input are one GEMM; "auto": in steps of up to as many tokens as that is faster for
    (`layers.fusion`). The output is the same."""
    cache: str = "paged"
    """"paged": sequences take blocks as they grow, share them, and find those of prefixes again. "contiguous": each of
    `max_num_seqs` rows has room for `max_model_len` positions reserved from the start (`kv.contiguous`): no block is
    shared, no prefix found again, and samples of a prompt copy what it has written."""
    block_size: int = 16
    """Positions in a block of the cache; of a contiguous one the step by which rows grow."""
    kv_cache_memory_bytes: int | None = None
    """Bytes of the cache over all devices; by default 1 GiB on a CPU, a fraction of what is free on a GPU."""
    gpu_memory_utilization: float = 0.9
    """On a GPU: the fraction of the memory JAX's allocator may still give that the cache takes."""
    pool_blocks: int | None = None
    """Blocks of the cache the host uses of those there are; changes no array."""
    enable_prefix_caching: bool = True
    """Whether prompts reuse the blocks of prefixes computed before."""
    enable_block_sharing: bool = True
    """Whether the samples of a request share its prompt's blocks."""
    snapshot_memory_fraction: float = 0.1
    """Of a model with recurrent layers: the fraction of the cache's memory for states that prompts go on from. It is
    beside two slots for each of max_num_seqs, and nothing else uses it."""
    feature_cache_tokens: int | None = None
    """Tokens of encoded images kept on the device, for prompts that are being computed and for images that come again;
    by default 8 times max_num_batched_tokens, and at least 16 tiles. A prompt may have no more of them."""
    decode_buckets: Sequence[int] | None = field(default=None)
    """Numbers of sequences a decode step is compiled for; by default chosen for the device (`engine.setup`)."""
    prefill_buckets: Sequence[int] | None = field(default=None)
    """Numbers of tokens a prefill step is compiled for; by default chosen for the device (`engine.setup`)."""
    compilation_cache_dir: str | None = "auto"
    """Folder in which JAX keeps compiled programs from one process to the next: "auto" is the user's cache folder
    (`~/.cache/jaxinfer/xla`), unless JAX was given one; None leaves JAX's settings as they are."""
    max_logprobs: int = 20
    """The most log-probabilities a position that a request may ask for, at most 20."""
    decode_steps: int | str = "auto"
    """Decode steps dispatched at once when nothing waits, so that the host works once for all of them; "auto": as many
    as take 0.1 s, at most 8. Tokens are the same; they, and requests that come meanwhile, wait for the last step."""
    seed: int = 0
    """Seeds the requests that bring no seed of their own."""
    check_invariants: bool = False
    """Whether the block accounting is checked after every step (slow; for tests and for hunting bugs)."""
    log_interval: float = 10.0
    """Seconds between log lines of throughput and cache use while there is work."""
    peer_timeout: float = PEER_TIMEOUT
    """Where several processes serve one model (`jaxinfer.distributed`): seconds within which one that has died, hangs
    or computes something else ends all of them. Process 0's is for all, like its other settings."""
    freeze_gc: bool = True
    """Whether the objects of this process that are alive once the model is loaded are taken out of Python's garbage
    collection (`gc.freeze`), whose full runs stop every request; closing the `LLM` puts all of them back. Set it to
    False in a program that calls gc.freeze itself, or that drops large objects in reference cycles while it serves a
    model."""
    compiler_options: Mapping[str, bool | int | float | str] | None = None
    """XLA's options for the compilation of the steps, by name; None: none. They are passed with each compilation,
    so that the environment stays as it is."""

    def __post_init__(self) -> None:
        limits = {
            "tensor_parallel_size": (1, 4096),
            "max_model_len": (2, MAX_MODEL_LEN),
            "max_num_seqs": (1, MAX_SEQS),
            "max_num_batched_tokens": (1, MAX_BATCHED_TOKENS),
            "block_size": (1, 1024),
            "kv_cache_memory_bytes": (1, 1 << 50),
            "pool_blocks": (1, 1 << 31),
            "max_logprobs": (0, MAX_LOGPROBS),
            "feature_cache_tokens": (1, 1 << 30),
            "seed": (0, 2**63 - 1),
        }
        for name, (least, most) in limits.items():
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise ConfigError(f"{name} must be an integer, got {value!r}")
            if not least <= value <= most:
                raise ConfigError(f"{name} must be in [{least}, {most}], got {value}")
        fractions = ("gpu_memory_utilization", 1), ("snapshot_memory_fraction", 0.9)
        for name, most in (*fractions, ("log_interval", 1e9), ("peer_timeout", 86400)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
                raise ConfigError(f"{name} must be a number in (0, {most:g}], got {value!r}")
        Placement.of(self.placement)
        for name in ("enable_prefix_caching", "enable_block_sharing", "check_invariants", "pad_heads", "freeze_gc"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in ("decode_buckets", "prefill_buckets"):
            sizes = getattr(self, name)
            whole = isinstance(sizes, list | tuple) and sizes and all(isinstance(s, int) and s > 0 for s in sizes)
            if sizes is not None and not whole:
                raise ConfigError(f"{name} must be a list of positive integers, got {sizes!r}")
        steps = self.decode_steps
        if steps != "auto" and (
            isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MAX_DECODE_STEPS
        ):
            raise ConfigError(f"decode_steps must be 'auto' or an integer in [1, {MAX_DECODE_STEPS}], got {steps!r}")
        folder = self.compilation_cache_dir
        if folder is not None and (not isinstance(folder, str) or not folder):
            raise ConfigError(f"compilation_cache_dir must be 'auto', a folder or None, got {folder!r}")
        if self.cache not in CACHES:
            raise ConfigError(f"cache must be {' or '.join(map(repr, CACHES))}, got {self.cache!r}")
        if self.cache == CONTIGUOUS and self.pool_blocks is not None:
            raise ConfigError(
                f"pool_blocks is {self.pool_blocks}, but the rows of cache='contiguous' take no blocks of a pool; set "
                "max_num_seqs and max_model_len, or leave it out"
            )
        if not isinstance(self.fuse_projections, bool) and self.fuse_projections != "auto":
            raise ConfigError(f"fuse_projections must be 'auto', True or False, got {self.fuse_projections!r}")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ConfigError(f"dtype must be auto, float32, bfloat16 or float16, got {self.dtype!r}")
        options = self.compiler_options or {}
        if not isinstance(options, Mapping) or not all(
            isinstance(k, str) and isinstance(v, bool | int | float | str) for k, v in options.items()
        ):
            raise ConfigError(
                "compiler_options must map names to booleans, numbers or strings, such as "
                f"{{'xla_gpu_autotune_level': 4}}; got {options!r}"
            )
        if self.quantization not in (None, *QUANTIZATIONS):
            raise ConfigError(f"quantization must be None or {', '.join(QUANTIZATIONS)}, got {self.quantization!r}")

    @classmethod
    def of(cls, settings: dict[str, Any]) -> "EngineConfig":
        """From keywords; an unknown one is named, with the closest that exists.

        Raises:
            TypeError: a keyword that is no field.
            ConfigError: a value that cannot be, or that contradicts another.
        """
        known = [f.name for f in fields(cls)]
        for name in settings:
            if name not in known:
                close = get_close_matches(name, known, 1)
                hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
                raise TypeError(f"unknown setting {name!r}{hint}")
        if settings.get("cache") == CONTIGUOUS and settings.get("enable_prefix_caching"):
            raise ConfigError(
                "enable_prefix_caching is True, but cache='contiguous' keeps no prefixes; leave it out, or use "
                "cache='paged'"
            )
        if "dtype" in settings and not isinstance(settings["dtype"], str):
            settings = settings | {"dtype": _dtype_name(settings["dtype"])}
        return cls(**settings)


def _dtype_name(value: Any) -> str:
    """The name of a NumPy or jax.numpy dtype, which may stand for it."""
    try:
        return np.dtype(value).name
    except TypeError:
        raise ConfigError(f"dtype must be a name or a NumPy dtype, got {value!r}") from None
