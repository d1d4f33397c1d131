"""Compiled programs without the devices they are for, and what can be read off them."""

import importlib.util
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh

from jaxinfer.checkpoint import rules
from jaxinfer.engine.batch import Bucket
from jaxinfer.engine.steps import Shapes, abstract_arguments, make_step
from jaxinfer.functional import Program, split
from jaxinfer.models import loading
from jaxinfer.sharding import make_mesh
from jaxinfer.sharding import rules as sharding_rules

PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
"""Either of them compiles for an NVIDIA GPU."""
TARGET = Path(__file__).parent.parent / "h100" / "h100.txtpb"

MEDIUM = dict(
    architectures=["LlamaForCausalLM"], vocab_size=32000, hidden_size=1024, intermediate_size=2816,
    num_hidden_layers=16, num_attention_heads=16, num_key_value_heads=4, head_dim=64, max_position_embeddings=4096,
    rms_norm_eps=1e-5, dtype="bfloat16",
)  # fmt: skip
"""config.json of a Llama of 0.25 B parameters."""

# A conversion or a transposition of a whole array moves as much as a copy does.
_COPY = re.compile(r"^\s*(?:ROOT )?%?\S+ = .*? (?:copy|copy-start|convert|transpose)\(", re.MULTILINE)
_ARRAY = re.compile(r"\w+\[([\d,]*)\]")
_COLLECTIVE = re.compile(
    r"\b(all-reduce|all-gather|collective-permute|collective-broadcast|all-to-all|reduce-scatter)(?:-start)?\("
)


def require_cuda_compiler() -> None:
    """Skips the test where the CUDA plugin is not installed; fails it there in CI."""
    if any(_installed(plugin) for plugin in PLUGINS):
        return
    reason = f"compiling for an H100 needs the CUDA plugin of the extra `test` ({PLUGINS[0]}; Linux on x86-64)"
    if os.environ.get("CI"):
        pytest.fail(f"{reason}; in CI this is no reason to skip")
    pytest.skip(reason)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package around it
        return False


@cache
def h100_mesh(tp: int) -> Mesh:
    """A mesh over `tp` H100s of one host, none of which need be here."""
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=TARGET.read_text(), topology=f"1x1x{tp}"
    )
    return make_mesh(tp, devices=list(topology.devices))


def abstract_model(hf: Mapping[str, Any], mesh: Mesh) -> tuple[Program, list[jax.ShapeDtypeStruct]]:
    """A model of this config.json as a program and the shapes and shardings of its parameters."""
    served, config = loading.parse(hf)
    module = loading.abstract(served, config, jnp.dtype(hf["dtype"]), mesh)
    program, leaves = split(module, mesh)
    params = []
    for leaf, (path, param) in zip(leaves, rules.parameters(module).items(), strict=True):
        placed = sharding_rules.sharding(mesh, param.get_metadata()["logical_axes"], leaf.shape, path)
        params.append(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed))
    return program, params


@dataclass(frozen=True)
class Compiled:
    """A compiled step and the sizes of its cache on one device."""

    executable: jax.stages.Compiled
    cache_bytes: int
    """Of all lanes."""
    lane_elements: int
    """Of one array of keys or values."""

    @property
    def aliased_bytes(self) -> int:
        """Of arguments that the results lie in."""
        return self.executable.memory_analysis().alias_size_in_bytes

    @property
    def temporary_bytes(self) -> int:
        """What the step needs beside its arguments and results."""
        return self.executable.memory_analysis().temp_size_in_bytes

    @property
    def large_copies(self) -> list[str]:
        """Copies, also inside fusions and loops, of at least as many elements as one array of the cache has."""
        return large_copies(self.executable.as_text(), self.lane_elements)

    @property
    def collectives(self) -> Counter[str]:
        """How often each kind occurs in the program."""
        return Counter(_COLLECTIVE.findall(self.executable.as_text()))


def large_copies(program: str, elements: int) -> list[str]:
    """The instructions of a program's text that copy, convert or transpose at least `elements` elements."""
    found = []
    for match in _COPY.finditer(program):
        sizes = [math.prod(map(int, filter(None, dims.split(",")))) for dims in _ARRAY.findall(match[0])]
        if max(sizes, default=0) >= elements:
            found.append(match[0].strip())
    return found


def compile_step(program: Program, params: list[Any], shapes: Shapes, bucket: Bucket) -> Compiled:
    """The engine's own step for a bucket, compiled for the devices of the program's mesh."""
    arguments = abstract_arguments(program, shapes, bucket)
    lanes = jax.tree.leaves(arguments[0])
    local = [math.prod(lane.sharding.shard_shape(lane.shape)) for lane in lanes]
    return Compiled(
        make_step(program, shapes, bucket).lower(params, *arguments).compile(),
        sum(np.dtype(lane.dtype).itemsize * count for lane, count in zip(lanes, local, strict=True)), min(local),
    )  # fmt: skip
