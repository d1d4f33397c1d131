"""Triton kernels inside JAX programs: compiled to PTX without a device, launched by XLA itself.

XLA has a custom call that launches PTX given as text (`__gpu$xla.gpu.ptx`; openxla/xla, `kernel_call.cc`), so a Triton
kernel needs neither a package between nor a handler of our own, and lies in the command buffer of its step like any
fusion. Importing this file does not import triton.
"""

import importlib.metadata
import importlib.util
import re
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
"""The triton that the kernels were first compiled with."""
LEAST_CAPABILITY = 80
"""Ampere: the first with bfloat16 and asynchronous copies to shared memory."""
TYPES = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32", "int32": "*i32", "int8": "*i8"}
"""What an array's dtype is called in a kernel's signature."""
ALIGNED = [["tt.divisibility", 16]]
"""XLA aligns every buffer to more than 16 bytes."""
CALL = "__gpu$xla.gpu.ptx"


@dataclass(frozen=True)
class Target:
    """What of a device shapes its kernels."""

    capability: int
    """Compute capability, 90 for 9.0."""
    cores: int
    """Streaming multiprocessors."""


@dataclass(frozen=True)
class Binary:
    """A compiled kernel."""

    name: str
    ptx: str
    shared_bytes: int
    """Shared memory of one program."""
    threads: int
    """Of one program."""


@dataclass(frozen=True)
class Options:
    """How a kernel is compiled."""

    warps: int
    """Of 32 threads, of one program."""
    stages: int
    """Loads of a loop that are under way at a time, and one."""


def lacking() -> str | None:
    """None if triton can be used, else what to do about it."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install 'jaxinfer[cuda13]' (or cuda12) brings it"
    version = importlib.metadata.version("triton")
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST:
        return f"triton is {version}, older than {'.'.join(map(str, OLDEST))}; pip install -U triton"
    return None


def target(mesh: Mesh) -> Target | None:
    """The devices of a mesh as a target of kernels; None if they are not NVIDIA GPUs with tensor cores for bfloat16."""
    device = mesh.devices.flat[0]
    capability = re.fullmatch(r"(\d+)\.(\d)", str(getattr(device, "compute_capability", "")))
    if device.platform not in ("gpu", "cuda") or capability is None:
        return None
    found = Target(int(capability[1]) * 10 + int(capability[2]), device.core_count)
    return found if found.capability >= LEAST_CAPABILITY else None


def serves(setting: str, asked: str, mesh: Mesh) -> tuple[bool, str]:
    """Whether Triton's kernels serve the devices of a mesh, where `asked` is "auto" or "triton"; if not, why.

    Raises:
        ConfigError: "triton" where it cannot be; names the setting and the reason.
    """
    device = mesh.devices.flat[0]
    reason = lacking()
    if target(mesh) is None:
        reason = (
            f"the device is {device.device_kind} ({device.platform}), not an NVIDIA GPU of compute capability "
            f"{LEAST_CAPABILITY / 10} or more; 'auto' chooses what it can run"
        )
    if reason is not None and asked == "triton":
        raise ConfigError(f"{setting} is 'triton', but {reason}")
    return reason is None, reason or ""


def _ptx_version(capability: int) -> int:
    """The oldest PTX that knows the device, so that the driver that reads it may be as old as JAX allows: CUDA 12.0
    reads PTX 8.0, 12.9 reads 8.8. Triton's default is the newest it can write."""
    return 80 if capability < 100 else 88


@cache
def binary(
    kernel: Any,
    signature: tuple[tuple[str, str], ...],
    constants: tuple[tuple[str, Any], ...],
    target: Target,
    options: Options,
) -> Binary:
    """Compiles a kernel for a target, which need not be here; about a second, or read from triton's cache on disk.

    Args:
        kernel: a function decorated with `triton.jit`.
        signature: name and type of each argument that is an array, in the kernel's order.
        constants: name and value of all others.
        target: the device it is for.
        options: warps and stages.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    arrays = dict(signature)
    types = {name: arrays.get(name, "constexpr") for name in names}
    aligned = {(i,): ALIGNED for i, name in enumerate(names) if name in arrays}
    with triton.knobs.compilation.scope():
        # The text travels in every program that launches it: lines of the source would double it.
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
        raise NotImplementedError(f"kernel {compiled.metadata.name} wants scratch memory from its launcher")
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
    """Launches a kernel in the program that is being traced.

    Args:
        kernel: a function decorated with `triton.jit` whose parameters are `operands`, `results`, `constants`.
        operands: arrays by parameter; None where there is none, which the kernel sees as None.
        results: the same for what the kernel fills.
        aliases: operand -> result that lies in the same memory.
        constants: the values that are fixed at compilation.
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
    # Triton ends a kernel's parameters with scratch memory that these kernels do not use.
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
