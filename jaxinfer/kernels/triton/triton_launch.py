"""Triton kernels inside JAX programs: compiled to PTX without a device, launched by XLA.

XLA has a custom call that launches PTX text (`__gpu$xla.gpu.ptx`; openxla/xla, `kernel_call.cc`), so no bridge package
or FFI handler is needed, and the kernel is part of the step's command buffer like any fusion. Importing this module
does not import triton.
"""

import importlib.metadata
import importlib.util
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxinfer.errors import ConfigError

OLDEST = (3, 6)
"""Oldest supported triton version."""
LEAST_CAPABILITY = 80
"""Ampere: the first architecture with bfloat16 and asynchronous copies to shared memory."""
TYPES = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32", "int32": "*i32", "int8": "*i8", "uint8": "*u8"}
"""Triton signature types by dtype."""
ALIGNED = [["tt.divisibility", 16]]
"""XLA aligns every buffer to more than 16 bytes."""
CALL = "__gpu$xla.gpu.ptx"
_TRITON = threading.Lock()
"""Lock held while Triton compiles: steps are compiled in several threads, its settings are global, and in CPython 3.11
`ast.parse` fails where two threads run it (SystemError: AST constructor recursion depth mismatch).
"""


@dataclass(frozen=True)
class Target:
    """Properties of a device that kernels are compiled for."""

    capability: int
    """Compute capability, 90 for 9.0."""
    cores: int
    """Number of streaming multiprocessors."""
    kind: str = ""
    """JAX's `device_kind`, by which measured tiles are found (`tuned`)."""


@dataclass(frozen=True)
class Binary:
    """A compiled kernel."""

    name: str
    ptx: str
    shared_bytes: int
    """Shared memory per program."""
    threads: int
    """Threads per program."""


@dataclass(frozen=True)
class Options:
    """Compilation options of a kernel."""

    warps: int
    """Warps (of 32 threads) per program."""
    stages: int
    """Pipeline stages of loops: concurrent loads plus one."""


def lacking() -> str | None:
    """Return why triton cannot be used, with the remedy, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install 'jaxinfer[cuda13]' (or cuda12) installs it"
    version = importlib.metadata.version("triton")
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST:
        return f"triton is {version}, older than {'.'.join(map(str, OLDEST))}; pip install -U triton"
    return None


def target(mesh: Mesh) -> Target | None:
    """Return the target for a mesh's devices; None unless they are NVIDIA GPUs with bfloat16 tensor cores."""
    device = mesh.devices.flat[0]
    capability = re.fullmatch(r"(\d+)\.(\d)", str(getattr(device, "compute_capability", "")))
    if device.platform not in ("gpu", "cuda") or capability is None:
        return None
    found = Target(int(capability[1]) * 10 + int(capability[2]), device.core_count, device.device_kind)
    return found if found.capability >= LEAST_CAPABILITY else None


def supports(setting: str, requested: str, mesh: Mesh) -> tuple[bool, str]:
    """Return whether Triton kernels support the devices of a mesh; if not, why.

    Args:
        setting: name of the setting, for errors.
        requested: its value: "auto" or "triton".
        mesh: the devices.

    Raises:
        ConfigError: "triton" cannot run; names the setting and the reason.
    """
    device = mesh.devices.flat[0]
    reason = lacking()
    if target(mesh) is None:
        reason = (
            f"the device is {device.device_kind} ({device.platform}), not an NVIDIA GPU of compute capability "
            f"{LEAST_CAPABILITY / 10} or more; 'auto' selects a kernel that can run"
        )
    if reason is not None and requested == "triton":
        raise ConfigError(f"{setting} is 'triton', but {reason}")
    return reason is None, reason or ""


def _ptx_version(capability: int) -> int:
    """Return the oldest PTX version that supports the device, so that the oldest drivers JAX allows can read it.

    CUDA 12.0 reads PTX 8.0, 12.9 reads 8.8. Triton's default is the newest version it can write.
    """
    return 80 if capability < 100 else 88


@cache
def binary(
    kernel: Any,
    signature: tuple[tuple[str, str], ...],
    constants: tuple[tuple[str, Any], ...],
    target: Target,
    options: Options,
) -> Binary:
    """Compile a kernel for a target, which need not be present; takes about a second unless in triton's disk cache.

    Args:
        kernel: a function decorated with `triton.jit`.
        signature: name and type of each array argument, in the kernel's order.
        constants: name and value of all other arguments.
        target: the device.
        options: warps and stages.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    arrays = dict(signature)
    types = {name: arrays.get(name, "constexpr") for name in names}
    aligned = {(i,): ALIGNED for i, name in enumerate(names) if name in arrays}
    with _TRITON, triton.knobs.compilation.scope():
        # The PTX text is embedded in every program that launches it; line info would double its size.
        triton.knobs.compilation.disable_line_info = True
        compiled = triton.compile(
            ASTSource(fn=kernel, signature=types, constexprs=dict(constants), attrs=aligned),
            target=GPUTarget("cuda", target.capability, 32),
            options={
                "num_warps": options.warps,
                "num_stages": options.stages,
                "enable_fp_fusion": True,
                "ptx_version": _ptx_version(target.capability),
            },
        )
    if getattr(compiled.metadata, "global_scratch_size", 0):
        raise NotImplementedError(
            f"kernel {compiled.metadata.name} needs global scratch memory, which the launcher does not provide"
        )
    found = compiled.metadata
    return Binary(found.name, compiled.asm["ptx"], found.shared, 32 * found.num_warps)


def launch(
    kernel: Any,
    operands: Mapping[str, jax.Array | None],
    results: Mapping[str, jax.ShapeDtypeStruct | None],
    *,
    aliases: Mapping[str, str],
    constants: Mapping[str, Any],
    grid: tuple[int, int],
    target: Target,
    options: Options,
) -> dict[str, jax.Array | None]:
    """Launch a kernel in the program being traced.

    Args:
        kernel: a function decorated with `triton.jit` whose parameters are `operands`, `results`, `constants`.
        operands: arrays by parameter; None for missing ones, which the kernel sees as None.
        results: likewise for arrays that the kernel writes.
        aliases: maps operands to results in the same memory.
        constants: compile-time constants.
        grid: programs along x and y.
        target: the device.
        options: warps and stages.

    Returns:
        The results by name.
    """
    given = {name: array for name, array in operands.items() if array is not None}
    wanted = {name: shape for name, shape in results.items() if shape is not None}
    both = given | wanted
    signature = tuple((name, TYPES[jnp.dtype(both[name].dtype).name]) for name in kernel.arg_names if name in both)
    missing = {name: None for name in (*operands, *results) if name not in both}
    built = binary(kernel, signature, tuple(sorted({**constants, **missing}.items())), target, options)
    # Triton appends scratch-memory parameters to kernels, which these kernels do not use.
    hidden = len(re.findall(r"\.param", built.ptx[: built.ptx.index(")")])) - len(signature)
    order = list(wanted)
    call = jax.ffi.ffi_call(
        CALL,
        [*wanted.values(), *[jax.ShapeDtypeStruct((1,), jnp.int8)] * hidden],
        custom_call_api_version=4,
        input_output_aliases={
            list(given).index(one): order.index(other) for one, other in aliases.items() if one in given
        },
    )
    found = call(
        *given.values(),
        name=built.name,
        kernel_type="ptx",
        kernel_data=built.ptx,
        grid_x=np.int32(grid[0]),
        grid_y=np.int32(grid[1]),
        grid_z=np.int32(1),
        block_x=np.int32(built.threads),
        block_y=np.int32(1),
        block_z=np.int32(1),
        shared_mem_bytes=np.int32(built.shared_bytes),
        output_indices=np.arange(len(given), len(given) + len(wanted) + hidden, dtype=np.int32),
    )
    return dict.fromkeys(results) | dict(zip(order, found[: len(order)], strict=True))
