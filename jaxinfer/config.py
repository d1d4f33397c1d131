"""Engine settings: one frozen dataclass, each field with unit and default."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any

import numpy as np

from jaxinfer._utils.checks import KV_CACHE_DTYPES, MAX_LOGPROBS, QUANTIZATIONS
from jaxinfer.distributed import PEER_TIMEOUT
from jaxinfer.errors import ConfigError
from jaxinfer.sharding.policy import Placement
from jaxinfer.speculative_config import SpeculativeConfig

CPU_CACHE_BYTES = 1 << 30
"""Default cache size on a CPU in bytes: fixed, as the host has other work."""
CACHES = (PAGED, CONTIGUOUS) = ("paged", "contiguous")
"""Cache implementations."""
LOGPROBS_MODES = (RAW_LOGPROBS, PROCESSED_LOGPROBS, RAW_LOGITS, PROCESSED_LOGITS) = (
    "raw_logprobs",
    "processed_logprobs",
    "raw_logits",
    "processed_logits",
)
"""Modes of log-probabilities, named as in vLLM."""
LOGITS_MODES, PROCESSED_MODES = (RAW_LOGITS, PROCESSED_LOGITS), (PROCESSED_LOGPROBS, PROCESSED_LOGITS)
MAX_MODEL_LEN = 1 << 22
MAX_SEQS = 1 << 14
MAX_DECODE_STEPS = 64
MAX_BATCHED_TOKENS = 1 << 20

_LIMITS = {
    "tensor_parallel_size": (1, 4096),
    "max_model_len": (2, MAX_MODEL_LEN),
    "max_num_seqs": (1, MAX_SEQS),
    "max_num_batched_tokens": (1, MAX_BATCHED_TOKENS),
    "block_size": (1, 1024),
    "kv_cache_memory_bytes": (1, 1 << 50),
    "pool_blocks": (1, 1 << 31),
    "max_logprobs": (0, MAX_LOGPROBS),
    "feature_cache_tokens": (1, 1 << 30),
    "max_adapters": (0, 1024),
    "max_adapter_rank": (1, 1024),
    "seed": (0, 2**63 - 1),
}
"""Smallest and largest value of each integer setting."""
_BOOLEANS = (
    "fuse_projections",
    "enable_prefix_caching",
    "enable_block_sharing",
    "check_invariants",
    "pad_heads",
    "freeze_gc",
    "deterministic",
    "return_routed_experts",
)
CLOSE = 0.75
"""Similarity from which a known setting is suggested for an unknown one."""
REPLACED = {
    "enable_lora": "pass adapters={name: folder}, or max_adapters for those added later",
    "lora_modules": "pass adapters={name: folder}",
    "max_loras": "use max_adapters",
    "max_lora_rank": "use max_adapter_rank",
    "enforce_eager": "leave it out: every step is a compiled program",
    "trust_remote_code": "leave it out: code of checkpoints is never run",
    "num_gpu_blocks_override": "use pool_blocks",
    "swap_space": "leave it out: preempted sequences are computed again",
    "cpu_offload_gb": "leave it out: weights are not offloaded",
    "pipeline_parallel_size": "use tensor_parallel_size",
    "data_parallel_size": 'pass axes={"data": AXIS} and a mesh',
    "device": "set JAX_PLATFORMS in the environment",
    "device_map": "use tensor_parallel_size or mesh",
    "torch_dtype": "use dtype",
    "load_in_8bit": 'use quantization="int8"',
    "max_length": "use max_model_len",
    "max_batch_size": "use max_num_seqs",
}
"""Hints for settings of other libraries."""


@dataclass(frozen=True)
class EngineConfig:
    """Engine settings. None means that a value is chosen for the model and the device, and logged."""

    dtype: str = "auto"
    """Dtype of weights, activations and cache: "auto" (the checkpoint's), "float32", "bfloat16" or "float16"."""
    quantization: str | None = None
    """None: matrices have the checkpoint's form where products with it exist (4 bits of AWQ, GPTQ,
    compressed-tensors and MXFP4; FP8), else `dtype`. "int8": they are stored in int8 with a scale per output channel
    and multiplied in int8. "fp8": projections of the language model are stored in FP8 (e4m3) with a scale per output
    channel, and multiplied with activations in FP8 with a scale per token; heads, experts and embeddings have `dtype`.
    "dequantize": quantised ones are converted to `dtype`. "awq", "gptq", "compressed-tensors", "modelopt" or
    "mxfp4": as None, and an error if the checkpoint has another format.
    """
    tensor_parallel_size: int = 1
    """Number of devices that weights and kv heads are divided over."""
    placement: Mapping[str, str] | Placement | None = None
    """Which modules are sharded and which are replicated and computed on every device: path patterns mapped to
    "shard", "replicate" or, for mixtures of experts, "experts" (`sharding.policy.Placement`); None shards all.
    """
    pad_heads: bool = False
    """Whether to add zero attention heads if a model's heads are not divisible by the number of devices, which
    otherwise is an error. The output is the same; padded heads take memory, cache and time.
    """
    max_model_len: int | None = None
    """Maximum length of a sequence in tokens, prompt included; by default what the model supports and the cache
    holds.
    """
    max_num_seqs: int | None = None
    """Maximum number of running sequences; by default 64 on a CPU, 256 on a GPU."""
    max_num_batched_tokens: int | None = None
    """Maximum number of tokens per step, prefill and decode together; by default 512 on a CPU, 2048 on a GPU."""
    attention_kernel: str = "auto"
    """"triton" (NVIDIA GPUs, with extra `cuda13` or `cuda12`), "native" (CPUs with AVX2 and a C++ compiler),
    "xla" (everywhere), or "auto": the first of these that is available. "mosaic" (Hopper) decodes with a Pallas
    kernel and prefills with XLA: slower than "triton", for a JAX that cannot launch Triton's kernels.
    """
    matmul_kernel: str = "auto"
    """"native" (CPUs, as above, on one device), "triton" (GPUs, as above, for products of experts and, on one device,
    with dense weights of 4 bits or FP8; XLA's for all others), "xla" (everywhere), or "auto": the first of these
    that is available.
    """
    fuse_projections: bool = True
    """Whether projections of the same input are one GEMM; False: one each. The output is the same."""
    cache: str = "paged"
    """"paged": sequences allocate blocks as they grow, share them, and reuse those of cached prefixes. "contiguous":
    each of `max_num_seqs` rows has a fixed region of `max_model_len` positions (`kv.contiguous`): blocks are not
    shared, prefixes are not cached, and samples copy the prompt's region.
    """
    block_size: int = 16
    """Number of positions in a cache block; for a contiguous cache, the step by which the read length grows."""
    kv_cache_dtype: str = "auto"
    """How keys and values are stored: "auto", in `dtype`; "int8" or "fp8" (also "fp8_e4m3"), in one byte an element
    with a bfloat16 scale for each position and head, which takes half the memory of bfloat16 and changes results
    slightly.
    """
    kv_cache_memory_bytes: int | None = None
    """Cache size in bytes over all devices; by default 1 GiB on a CPU, on a GPU what `gpu_memory_utilization` leaves.
    If set, no step is compiled at start to measure its memory.
    """
    gpu_memory_utilization: float = 0.9
    """GPU: fraction of the memory of JAX's allocator that weights, cache and steps may take together. The temporaries
    of the largest steps, compiled at start, are measured; the cache takes the rest.
    """
    pool_blocks: int | None = None
    """Number of cache blocks that the host uses, at most those allocated; changes no array shape."""
    enable_prefix_caching: bool = True
    """Whether prompts reuse the blocks of cached prefixes."""
    enable_block_sharing: bool = True
    """Whether the samples of a request share its prompt's blocks."""
    snapshot_memory_fraction: float = 0.1
    """Models with recurrent layers: fraction of the cache memory for state snapshots that prompts can resume from.
    It comes in addition to two slots for each of max_num_seqs, and nothing else uses it.
    """
    feature_cache_tokens: int | None = None
    """Number of image tokens whose encoder output is kept on the device, for prompts being prefilled and for
    repeated images; by default 8 times max_num_batched_tokens, and at least 16 tiles. A prompt may not have more of
    them.
    """
    decode_buckets: Sequence[int] | None = field(default=None)
    """Numbers of sequences that decode steps are compiled for; by default chosen for the device
    (`engine.sizing.setup`).
    """
    prefill_buckets: Sequence[int] | None = field(default=None)
    """Numbers of tokens that prefill steps are compiled for; by default chosen for the device
    (`engine.sizing.setup`).
    """
    compilation_cache_dir: str | None = "auto"
    """Folder of JAX's persistent compilation cache: "auto" is the user's cache folder (`~/.cache/jaxinfer/xla`),
    unless JAX has one configured; None leaves JAX's settings unchanged.
    """
    max_logprobs: int = 20
    """Maximum number of log-probabilities per position that a request may ask for, at most 20."""
    logprobs_mode: str = RAW_LOGPROBS
    """What `logprobs` and `prompt_logprobs` are, as in vLLM: "raw_logprobs", log-probabilities of the model's own
    distribution; "processed_logprobs", those of the distribution that tokens are drawn from, after biases, masks,
    penalties, temperature, min-p, top-k and top-p (-inf for tokens that they remove; of greedy requests, before the
    argmax); "raw_logits" and "processed_logits", logits in their place. Tokens of a prompt are not drawn, so for them
    the processed modes give what the raw ones do.
    """
    decode_steps: int | str = "auto"
    """Number of decode steps dispatched at once when nothing is waiting, so that the host works once for all of
    them; "auto": as many as take 0.1 s, at most 8. Tokens are the same; they, and new requests, wait for the last
    step.
    """
    joint_steps: bool | None = None
    """Whether prefill chunks and decoding sequences of a step run in one forward, a joint step, so that weights are
    read once; steps that ask for what it does not serve are two, as with False. None: on GPUs. With the native
    kernel on a CPU True saves 4 to 8% of the processor time of mixed loads, after more compilations.
    """
    speculative_config: Mapping[str, Any] | SpeculativeConfig | None = None
    """Speculative decoding: `{"method": "ngram"}` drafts the tokens that followed the last ones where they occurred
    before, `{"method": "draft_model", "model": DIR}` those of a smaller model; several are verified in one step. Fields
    as in `SpeculativeConfig`. None for one token a step.
    """
    deterministic: bool = False
    """Whether tokens and log-probabilities are the same bit for bit whatever else runs: batch, order, chunks, prefix
    hits, preemption, forks, restarts. Prefill and decode then run in one program of `max_num_batched_tokens` tokens (by
    default 128 on a CPU, 256 on a GPU), which costs throughput; the log says how much (docs/rl.md).
    """
    capture: Sequence[str] = ()
    """Deterministic engines: paths of modules whose outputs `LLM.hidden_states` may return, beside the model's own. The
    one program of such an engine returns them in each step; other engines compile a program for the paths of a call.
    """
    return_routed_experts: bool = False
    """Whether outputs have the experts of each token (`CompletionOutput.routed_experts`). Steps then return them, and
    prompts do not reuse cached prefixes, which keep none.
    """
    max_adapters: int | None = None
    """Maximum number of LoRA adapters at a time; by default as many as are given to `LLM`, at least 4, and 0 without:
    only then steps are compiled without them. Each takes memory and time in every step, used or not.
    """
    max_adapter_rank: int = 16
    """Largest rank of an adapter; all take the memory and time of this rank."""
    seed: int = 0
    """Seed of requests without one of their own."""
    check_invariants: bool = False
    """Whether to check the block accounting after every step (slow; for tests and debugging)."""
    log_interval: float = 10.0
    """Seconds between log lines of throughput and cache use while there is work."""
    peer_timeout: float = PEER_TIMEOUT
    """With several processes (`jaxinfer.distributed`): seconds within which a process that has died, hangs or has
    diverged ends all of them. Process 0's value applies to all, like its other settings.
    """
    freeze_gc: bool = True
    """Whether objects that are alive once the model is loaded are excluded from Python's garbage collection
    (`gc.freeze`), whose full collections stall every request; closing the `LLM` undoes it. Set it to False in an
    application that calls gc.freeze itself, or that drops large objects in reference cycles while serving.
    """
    compiler_options: Mapping[str, bool | int | float | str] | None = None
    """XLA compiler options for the steps, by name; None for none. They are passed with each compilation, so that the
    environment is unchanged.
    """

    def __post_init__(self) -> None:
        self._check_integers()
        self._check_fractions()
        Placement.of(self.placement)
        for name in _BOOLEANS:
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}")
        self._check_buckets()
        self._check_choices()
        if isinstance(self.capture, str) or not all(isinstance(path, str) for path in self.capture):
            raise ConfigError(f"capture must be a list of paths such as 'layers.11', got {self.capture!r}")
        if self.speculative_config is not None:
            object.__setattr__(self, "speculative_config", SpeculativeConfig.of(self.speculative_config))
        self._check_cache()
        self._check_compilation()

    def _check_integers(self) -> None:
        for name, (least, most) in _LIMITS.items():
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise ConfigError(f"{name} must be an integer, got {value!r}")
            if not least <= value <= most:
                raise ConfigError(f"{name} must be in [{least}, {most}], got {value}")
        steps = self.decode_steps
        if steps != "auto" and (
            isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MAX_DECODE_STEPS
        ):
            raise ConfigError(f"decode_steps must be 'auto' or an integer in [1, {MAX_DECODE_STEPS}], got {steps!r}")

    def _check_fractions(self) -> None:
        fractions = ("gpu_memory_utilization", 1), ("snapshot_memory_fraction", 0.9)
        for name, most in (*fractions, ("log_interval", 1e9), ("peer_timeout", 86400)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
                raise ConfigError(f"{name} must be a number in (0, {most:g}], got {value!r}")

    def _check_buckets(self) -> None:
        for name in ("decode_buckets", "prefill_buckets"):
            sizes = getattr(self, name)
            valid = isinstance(sizes, list | tuple) and sizes and all(isinstance(s, int) and s > 0 for s in sizes)
            if sizes is not None and not valid:
                raise ConfigError(f"{name} must be a list of positive integers, got {sizes!r}")

    def _check_choices(self) -> None:
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ConfigError(f"dtype must be auto, float32, bfloat16 or float16, got {self.dtype!r}")
        if self.logprobs_mode not in LOGPROBS_MODES:
            modes = ", ".join(LOGPROBS_MODES)
            raise ConfigError(f"logprobs_mode must be one of {modes}, got {self.logprobs_mode!r}")
        if self.quantization not in (None, *QUANTIZATIONS):
            raise ConfigError(f"quantization must be None or {', '.join(QUANTIZATIONS)}, got {self.quantization!r}")

    def _check_cache(self) -> None:
        if self.joint_steps is not None and not isinstance(self.joint_steps, bool):
            raise ConfigError(f"joint_steps must be None, True or False, got {self.joint_steps!r}")
        if self.cache not in CACHES:
            raise ConfigError(f"cache must be {' or '.join(map(repr, CACHES))}, got {self.cache!r}")
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            raise ConfigError(
                f"kv_cache_dtype must be one of {', '.join(KV_CACHE_DTYPES)}, got {self.kv_cache_dtype!r}"
            )
        if self.cache == CONTIGUOUS and self.pool_blocks is not None:
            raise ConfigError(
                f"pool_blocks is {self.pool_blocks}, but cache='contiguous' has no block pool; set max_num_seqs and "
                "max_model_len instead"
            )

    def _check_compilation(self) -> None:
        folder = self.compilation_cache_dir
        if folder is not None and (not isinstance(folder, str) or not folder):
            raise ConfigError(f"compilation_cache_dir must be 'auto', a folder or None, got {folder!r}")
        options = self.compiler_options or {}
        if not isinstance(options, Mapping) or not all(
            isinstance(k, str) and isinstance(v, bool | int | float | str) for k, v in options.items()
        ):
            raise ConfigError(
                "compiler_options must map names to booleans, numbers or strings, such as "
                f"{{'xla_gpu_autotune_level': 4}}; got {options!r}"
            )

    @classmethod
    def of(cls, settings: dict[str, Any]) -> "EngineConfig":
        """Create a config from keyword arguments; an unknown one is reported with the closest existing name.

        Raises:
            TypeError: a keyword is not a field.
            ConfigError: a value is invalid, or contradicts another.
        """
        known = [f.name for f in fields(cls)]
        for name in settings:
            if name not in known:
                close = get_close_matches(name, known, 1, CLOSE)
                hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
                hint = f": {REPLACED[name]}" if name in REPLACED else hint
                raise TypeError(f"unknown setting {name!r}{hint}")
        if settings.get("cache") == CONTIGUOUS and settings.get("enable_prefix_caching"):
            raise ConfigError(
                "enable_prefix_caching is True, but cache='contiguous' does not support it; remove it, or use "
                "cache='paged'"
            )
        if "dtype" in settings and not isinstance(settings["dtype"], str):
            settings = settings | {"dtype": _dtype_name(settings["dtype"])}
        return cls(**settings)


def _dtype_name(value: Any) -> str:
    """Return the name of a NumPy or jax.numpy dtype."""
    try:
        return np.dtype(value).name
    except TypeError:
        raise ConfigError(f"dtype must be a name or a NumPy dtype, got {value!r}") from None
