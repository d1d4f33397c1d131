"""Triton launches: supported devices, errors where it cannot run, and the program that launches a kernel."""

import importlib.metadata
import importlib.util
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxinfer._utils.log import warn_once
from jaxinfer.errors import ConfigError
from jaxinfer.kernels.attention import choose as attention
from jaxinfer.kernels.attention import xla_attention
from jaxinfer.kernels.attention.triton_attention import TritonAttention
from jaxinfer.kernels.matmul import choose as matmul
from jaxinfer.kernels.triton import triton_launch
from jaxinfer.kernels.triton.triton_launch import Binary, Options, Target
from jaxinfer.sharding import make_mesh


@dataclass(frozen=True)
class Device:
    """Stand-in for the attributes read from a device."""

    platform: str = "gpu"
    compute_capability: str = "9.0"
    core_count: int = 132
    device_kind: str = "NVIDIA H100"
    process_index: int = 0


def given(monkeypatch: pytest.MonkeyPatch, device: Device, version: str | None = "3.6.0") -> Mesh:
    """Make a mesh of such a device, with this version of triton installed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: version)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    return Mesh(np.array([device], object), ("model",))


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        (Device(), Target(90, 132, "NVIDIA H100")),
        (Device("cuda", "8.0"), Target(80, 132, "NVIDIA H100")),
        (Device("gpu", "12.0"), Target(120, 132, "NVIDIA H100")),
        (Device("gpu", "7.5"), None),
        (Device("gpu", "gfx942"), None),
    ],
)
def test_targets_are_nvidia_gpus_from_ampere_on(
    monkeypatch: pytest.MonkeyPatch, device: Device, expected: Target | None
):
    mesh = given(monkeypatch, device)
    assert triton_launch.target(mesh) == expected
    assert attention.choose("auto", mesh) == ("xla" if expected is None else "triton")
    kernels = attention.implementation(attention.choose("auto", mesh), mesh)
    assert kernels == (xla_attention if expected is None else TritonAttention(expected))


def test_fp8_codes_need_a_gpu_that_converts_them(monkeypatch: pytest.MonkeyPatch):
    for device, codes in ((Device(), "fp8"), (Device("cuda", "8.9"), "fp8_e4m3"), (Device("cuda", "8.0"), "int8")):
        attention.check_cache("triton", codes, np.dtype(jnp.bfloat16), given(monkeypatch, device))
    old = given(monkeypatch, Device("cuda", "8.0"))
    with pytest.raises(ConfigError, match="kv_cache_dtype is 'fp8', which needs .* 8.9; this one has 8.0; use 'int8'"):
        attention.check_cache("triton", "fp8", np.dtype(jnp.bfloat16), old)
    attention.check_cache("xla", "fp8", np.dtype(jnp.bfloat16), old)
    with pytest.raises(ConfigError, match="kv_cache_dtype must be auto, int8, fp8, fp8_e4m3, got 'int4'"):
        attention.check_cache("xla", "int4", np.dtype(jnp.bfloat16), old)


def test_triton_where_it_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match="NVIDIA GPU of compute capability 8.0 or more; 'auto' selects"):
        attention.choose("triton", make_mesh())
    with pytest.raises(ConfigError, match="must be .*triton or mosaic, got 'cudnn'"):
        attention.choose("cudnn", make_mesh())
    mesh = given(monkeypatch, Device(), version=None)
    with pytest.raises(ConfigError, match="triton is not installed; pip install"):
        attention.choose("triton", mesh)
    assert attention.choose("xla", mesh) == "xla"


@pytest.mark.parametrize(
    ("version", "said"), [(None, "not installed; pip install"), ("3.5.1", "3.5.1, older than 3.6")]
)
@pytest.mark.parametrize("kernels", [attention, matmul], ids=["attention", "matmul"])
def test_a_gpu_without_triton_uses_xla_and_warns_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, version: str | None, said: str, kernels: Any
):
    mesh = given(monkeypatch, Device(), version=version)
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert [kernels.choose("auto", mesh) for _ in range(2)] == ["xla", "xla"]
    assert len(caplog.records) == 1 and said in caplog.text


def test_kernels_are_compiled_one_at_a_time(monkeypatch: pytest.MonkeyPatch):
    """Threads that compile steps side by side; in CPython 3.11 two that parse a kernel's source at a time fail."""
    triton, compiler = pytest.importorskip("triton"), pytest.importorskip("triton.compiler")
    inside, crowded = [], []

    def compile_kernel(source: Any, **options: Any) -> SimpleNamespace:
        inside.append(source)
        time.sleep(0.002)  # another thread would come in
        crowded.append(len(inside) > 1)
        inside.pop()
        return SimpleNamespace(metadata=SimpleNamespace(name="one", shared=0, num_warps=4), asm={"ptx": ""})

    monkeypatch.setattr(triton, "compile", compile_kernel)
    monkeypatch.setattr(compiler, "ASTSource", lambda **source: source)
    kernel, target = type("Kernel", (), {"arg_names": ["x", "SIZE"]}), Target(90, 132)
    with ThreadPoolExecutor(4) as pool:
        made = [
            pool.submit(triton_launch.binary, kernel, (("x", "*fp32"),), (("SIZE", n),), target, Options(4, 2))
            for n in range(8)
        ]
    assert [one.result().name for one in made] == ["one"] * 8
    assert crowded == [False] * 8


def test_the_buffers_of_a_launch_are_the_kernels_parameters_in_order(monkeypatch: pytest.MonkeyPatch):
    """Operands, results, and the two buffers that triton adds; None arguments are constants."""
    text = ".entry double(.param .u64 a, .param .u64 b, .param .u64 c, .param .u64 d, .param .u64 e)\n{ ret; }"
    seen = {}

    def binary(kernel, signature, constants, target, options):
        seen.update(signature=signature, constants=dict(constants))
        return Binary("double", text, 1024, 128)

    monkeypatch.setattr(triton_launch, "binary", binary)
    kernel = SimpleNamespace(arg_names=["x", "absent", "kept", "new", "SIZE"])

    def call(x: jax.Array, kept: jax.Array) -> jax.Array:
        found = triton_launch.launch(
            kernel,
            {"x": x, "absent": None, "kept": kept},
            {"new": jax.ShapeDtypeStruct((4,), jnp.bfloat16)},
            aliases={"kept": "new", "absent": "nothing"},
            constants={"SIZE": 4},
            grid=(3, 2),
            target=Target(90, 132),
            options=Options(4, 3),
        )
        return found["new"]

    shapes = jax.ShapeDtypeStruct((4,), jnp.float32), jax.ShapeDtypeStruct((4,), jnp.bfloat16)
    program = jax.jit(call).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert seen["signature"] == (("x", "*fp32"), ("kept", "*bf16"), ("new", "*bf16"))
    assert seen["constants"] == {"SIZE": 4, "absent": None}
    assert "grid_x = 3 : i32, grid_y = 2 : i32" in program and "shared_mem_bytes = 1024 : i32" in program
    assert "output_indices = dense<[2, 3, 4]>" in program and program.count("tensor<1xi8>") >= 2
    assert "output_tuple_indices = [0], operand_index = 1" in program
