"""The readings that the other tests rely on can fail."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from support import lowering
from support.lowering import FALLBACK, large_copies, require_cuda_compiler


def test_copies_are_seen_by_size_in_any_computation_and_layout():
    text = """
    %p = f32[8,4]{1,0} parameter(0)
    %copy.1 = bf16[64,4,16]{2,1,0} copy(%p), metadata={scheduling_name="copy.1"}
    ROOT %copy.2 = f32[2,4]{0,1} copy(%p)
    %copy-start.1 = (f32[4096]{0:S(5)}, f32[4096]{0}, u32[]) copy-start(%p)
    %convert.1 = f32[64,64]{1,0} convert(%p)
    %fusion = f32[4096]{0} fusion(%p), calls=%copy_fusion
    """
    assert [found.split()[0] for found in large_copies(text, 4096)] == ["%copy.1", "%copy-start.1", "%convert.1"]
    assert len(large_copies(text, 8)) == 4


def test_an_array_that_is_not_donated_is_seen_as_a_copy():
    array = jax.ShapeDtypeStruct((512, 64), jnp.float32)

    def compiled(**options: int) -> jax.stages.Compiled:
        return jax.jit(lambda a: a.at[3].set(1.0), **options).lower(array).compile()

    kept, donated = compiled(), compiled(donate_argnums=0)
    assert donated.memory_analysis().alias_size_in_bytes == 512 * 64 * 4
    assert kept.memory_analysis().alias_size_in_bytes == 0
    assert large_copies(donated.as_text(), 512 * 64) == []
    assert len(large_copies(kept.as_text(), 512 * 64)) == 1


def test_a_missing_compiler_skips_but_fails_in_ci(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lowering, "PLUGINS", ("no_such_package.plugin",))
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="CUDA plugin"):
        require_cuda_compiler()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no reason to skip"):
        require_cuda_compiler()


SORT = """
import jax
from jax.sharding import NamedSharding, PartitionSpec
from support.lowering import h100_mesh

logits = jax.ShapeDtypeStruct((64, 151936), "float32", sharding=NamedSharding(h100_mesh(1), PartitionSpec()))
jax.jit(jax.numpy.sort).lower(logits).compile(compiler_options={"xla_backend_optimization_level": 3})
"""


@pytest.mark.slow
def test_a_sort_that_is_not_a_gpus_is_seen():
    """The warning that fails the other tests of this folder still reads so. XLA prints it once in a process."""
    require_cuda_compiler()
    path = os.pathsep.join(str(Path(lowering.__file__).parents[up]) for up in (1, 2))
    environment = os.environ | {"PYTHONPATH": path, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run([sys.executable, "-c", SORT], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert FALLBACK in done.stderr
