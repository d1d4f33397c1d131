"""Compile programs for devices that need not be present, and inspect the compiled programs."""

import importlib.util
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh

from jaxinfer.checkpoint import rules
from jaxinfer.engine.runner.batch import Bucket
from jaxinfer.engine.runner.device_state import abstract_cache
from jaxinfer.engine.runner.logits import programs as programs_of
from jaxinfer.engine.runner.lowering import lower
from jaxinfer.engine.runner.shapes import Shapes
from jaxinfer.functional import DecodeBatch, Program, decode, split
from jaxinfer.kv import cache as kv_cache
from jaxinfer.loading import weights
from jaxinfer.sharding import make_mesh
from jaxinfer.sharding import rules as sharding_rules
from support import compiler

PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
"""JAX plugins that can compile for NVIDIA GPUs; one suffices."""
FALLBACK = "Missing deviceless CUB scratch size"
"""Start of XLA's warning that a program compiled without a device has another sort than on one."""
TARGET = Path(__file__).parent.parent / "h100" / "h100.txtpb"

MEDIUM = dict(
    architectures=["LlamaForCausalLM"],
    vocab_size=32000,
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=16,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=64,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    dtype="bfloat16",
)
"""config.json of a Llama of 0.25 B parameters."""

# Converting or transposing a whole array moves as many bytes as copying it.
_COPY = re.compile(r"^\s*(?:ROOT )?%?\S+ = .*? (?:copy|copy-start|convert|transpose)\(", re.MULTILINE)
_ARRAY = re.compile(r"\w+\[([\d,]*)\]")
_THUNK = re.compile(r"^ *\d+: k(\w+) *\[[^\]]*\] (\S+)", re.MULTILINE)
_NO_KERNELS = ("CommandBuffer", "AsyncStart", "AsyncDone", "PartitionId", "ReplicaId")
_INSTRUCTION = re.compile(r"^ *(?:ROOT )?%([\w.-]+) = (\([^=]*?\)|\S+) ([\w-]+)\((.*)$", re.MULTILINE)
_BITS = {"bf16": 16, "f16": 16, "f64": 64, "s64": 64, "u64": 64, "s8": 8, "u8": 8, "pred": 8}
_COLLECTIVE = re.compile(
    r"\b(all-reduce|all-gather|collective-permute|collective-broadcast|all-to-all|reduce-scatter)(?:-start)?\("
)


def require_cuda_compiler() -> None:
    """Skip the test if the CUDA plugin is not installed; in CI, fail it."""
    if any(_installed(plugin) for plugin in PLUGINS):
        return
    reason = f"compiling for an H100 needs the CUDA plugin of the extra `test` ({PLUGINS[0]}; Linux on x86-64)"
    if os.environ.get("CI"):
        pytest.fail(f"{reason}; in CI this is no reason to skip")
    pytest.skip(reason)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing, too
        return False


@cache
def h100_mesh(tp: int) -> Mesh:
    """Return a mesh over `tp` H100s of one host, which need not be present."""
    topology = topologies.get_topology_desc(platform="cuda", target_config=TARGET.read_text(), topology=f"1x1x{tp}")
    return make_mesh(tp, devices=list(topology.devices))


def abstract_model(
    hf: Mapping[str, Any],
    mesh: Mesh,
    *,
    fuse_projections: bool = True,
    kv_cache_dtype: str = "auto",
    attention_kernel: str = "auto",
    **how: Any,
) -> tuple[Program, list[jax.ShapeDtypeStruct]]:
    """Return the program of a config.json, with the shapes and shardings of its parameters.

    `how`: quantisation and placement arguments of `weights.abstract_stored`.
    """
    model_family, config = weights.parse(hf)
    module = weights.abstract_stored(model_family, config, jnp.dtype(hf["dtype"]), mesh, hf=hf, **how)
    settings = {"kv_cache_dtype": kv_cache_dtype, "attention_kernel": attention_kernel}
    program, leaves = split(module, mesh, fuse_projections=fuse_projections, **settings)
    params = []
    for leaf, (path, param) in zip(leaves, rules.parameters(module).items(), strict=True):
        placed = sharding_rules.of(mesh, param.get_metadata(), leaf.shape, path)
        params.append(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed))
    return program, params


@dataclass(frozen=True)
class Compiled:
    """A compiled step, with the sizes of its cache per device; figures include those of its sampler."""

    executable: jax.stages.Compiled
    cache_bytes: int
    """Size of all arrays of the cache, in bytes."""
    array_elements: int
    """Number of elements of one array of keys or values."""
    thunks: str = ""
    """XLA's dump of the launched thunks, in order and grouped by command buffer; GPU programs only."""
    sampler: "Compiled | None" = None
    """Program of the sampler, if it is one of its own."""

    @property
    def texts(self) -> list[str]:
        """Return the text of each program."""
        return [one.executable.as_text() for one in self.programs]

    @property
    def programs(self) -> list["Compiled"]:
        """Return the programs of the step in their order."""
        return [self] if self.sampler is None else [self, self.sampler]

    @property
    def kernels(self) -> list[str]:
        """Return the names of the kernels, copies and collectives that the device runs."""
        return [name for one in self.programs for kind, name in _THUNK.findall(one.thunks) if kind not in _NO_KERNELS]

    @property
    def command_buffers(self) -> int:
        """Return the number of command buffers (CUDA graphs), each of which the host launches once."""
        return sum(one.thunks.count("kCommandBuffer") for one in self.programs)

    @property
    def launched_alone(self) -> list[str]:
        """Return the kernels outside command buffers, each of which the host launches by itself."""
        thunks = "\n".join(one.thunks for one in self.programs)
        alone = "\n".join(line for line in thunks.splitlines() if not line.startswith(" "))
        return [name for kind, name in _THUNK.findall(alone) if kind not in _NO_KERNELS]

    @property
    def moved_bytes(self) -> int:
        """Return the bytes of operands and results of all launches but custom kernels, which may read only parts."""
        return sum(map(moved_bytes, self.texts))

    @property
    def aliased_bytes(self) -> int:
        """Return the bytes of arguments whose buffers are reused for results (donated)."""
        return sum(one.executable.memory_analysis().alias_size_in_bytes for one in self.programs)

    @property
    def temporary_bytes(self) -> int:
        """Return the bytes that one of the programs needs in addition to its arguments and results."""
        return max(one.executable.memory_analysis().temp_size_in_bytes for one in self.programs)

    @property
    def large_copies(self) -> list[str]:
        """Return copies, also in fusions and loops, of at least as many elements as one array of the cache."""
        return [copy for text in self.texts for copy in large_copies(text, self.array_elements)]

    @property
    def touching_new_addresses(self) -> list[str]:
        """Return the kernels of the first program whose operands or results lie elsewhere at each call.

        These are the step's packed inputs, its last argument, and results that alias no argument. XLA updates the
        nodes of a CUDA graph that use such an address, before it launches the graph, and leaves the others alone.
        """
        return touching_new_addresses(self.texts[0])

    @property
    def collectives(self) -> Counter[str]:
        """How often each kind occurs in the step."""
        return sum(map(collectives, self.texts), Counter())


def collectives(program: str) -> Counter[str]:
    """How often each kind occurs in a program's text."""
    return Counter(_COLLECTIVE.findall(program))


def touching_new_addresses(program: str) -> list[str]:
    """Return the instructions of a program's entry that read its last parameter or write results of their own."""
    text = re.sub(r"/\*index=\d+\*/", "", program)
    aliased = {int(index) for index in re.findall(r"\{(\d+)\}: \(\d+,", text[: text.index("\n")])}
    entry = _INSTRUCTION.findall(text[text.index("\nENTRY") :])
    operands = {name: re.findall(r"%([\w.-]+)", rest.split(")")[0]) for name, _, _, rest in entry}
    views = {name for name, _, op, _ in entry if op in ("bitcast", "get-tuple-element")}
    numbers = {name: int(rest.split(")")[0]) for name, _, op, rest in entry if op == "parameter"}
    new, found = {max(numbers, key=numbers.__getitem__)}, []
    for name in operands:
        if not new.isdisjoint(operands[name]):
            (new.add if name in views else found.append)(name)
    root, _, operation, _ = entry[-1]
    for index, name in enumerate(operands[root] if operation == "tuple" else [root]):
        while name in views:
            [name] = operands[name]
        if index not in aliased and name not in numbers:
            found.append(name)
    return sorted(set(found) - {root})


def large_copies(program: str, elements: int) -> list[str]:
    """Return the instructions of a program's text that copy, convert or transpose at least `elements` elements."""
    found = []
    for match in _COPY.finditer(program):
        sizes = [math.prod(map(int, filter(None, dims.split(",")))) for dims in _ARRAY.findall(match[0])]
        if max(sizes, default=0) >= elements:
            found.append(match[0].strip())
    return found


def moved_bytes(program: str) -> int:
    """Return the bytes of operands and results of the instructions of a program's entry, without custom kernels.

    For a fusion that gathers or slices, the largest operand counts with the size of the result.
    """
    bodies = dict(re.findall(r"^%(\S+) [^\n]*\{\n(.*?)^\}", program, re.MULTILINE | re.DOTALL))
    program = re.sub(r"/\*index=\d+\*/", "", program)  # in the types of long tuples
    sizes, total = {}, 0
    for name, shape, op, rest in _INSTRUCTION.findall(program[program.index("\nENTRY") :]):
        sizes[name] = sum(
            _BITS.get(kind, 32) // 8 * math.prod(map(int, filter(None, dims.split(","))))
            for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape)
        )
        own = op == "custom-call" and not re.search(r'custom_call_target="__cu(blas|dnn)', rest)
        if own or op in ("parameter", "constant", "bitcast", "tuple", "get-tuple-element"):
            continue
        read = [sizes[operand] for operand in dict.fromkeys(re.findall(r"%([\w.-]+)", rest.split(")")[0]))]
        called = re.search(r"calls=%([\w.-]+)", rest)
        within = set(re.findall(r" (gather|dynamic-slice|slice|dot)\(", bodies[called[1]])) if called else set()
        if within and "dot" not in within and max(read) > sizes[name]:
            read.remove(max(read))
            read.append(sizes[name])
        total += sizes[name] + sum(read)
    return total


def compile_step(program: Program, params: list[Any], shapes: Shapes, bucket: Bucket, **options: Any) -> Compiled:
    """Compile the engine's step for a bucket, for the devices of the program's mesh; `options`: compiler options."""
    cache = abstract_cache(program, shapes)
    made, *rest = (
        compile_lowered(lower(key, program, shapes, params, None), cache, **options)
        for key in programs_of(shapes, bucket)
    )
    return replace(made, sampler=rest[0]) if rest else made


def unread_in_decode(hf: Mapping[str, Any], mesh: Mesh, rows: int = 8) -> tuple[set[str], list[str]]:
    """Return the parameters of an encoder-decoder that a decode step does not read, and all its parameters."""
    program, params = abstract_model(hf, mesh)
    cache = kv_cache.abstract(program.layout.array_specs, 64, 16, program.dtype, mesh)
    whole = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    tables = whole((program.layout.groups, rows, 4))
    batch = DecodeBatch(whole((rows,)), whole((rows,)), tables, seen=whole((rows, 2)))
    closed = jax.make_jaxpr(partial(decode, program))(params, cache, batch).jaxpr
    read = {id(var) for equation in closed.eqns for var in equation.invars}
    names = list(rules.parameters(weights.abstract(*weights.parse(hf), jnp.dtype(hf["dtype"]), mesh)))
    return {name for name, var in zip(names, closed.invars, strict=False) if id(var) not in read}, names


def compile_lowered(lowered: jax.stages.Lowered, cache: Any, **options: Any) -> Compiled:
    """Compile a lowered program that takes this cache."""
    arrays = jax.tree.leaves(cache)
    local = [math.prod(array.sharding.shard_shape(array.shape)) for array in arrays]
    size = sum(np.dtype(array.dtype).itemsize * count for array, count in zip(arrays, local, strict=True))
    least = min(count for array, count in zip(arrays, local, strict=True) if array.shape[-1] > 1)  # not of scales
    if arrays[0].sharding.mesh.devices.flat[0].platform == "cpu":
        return Compiled(lowered.compile(compiler_options=options or None), size, least)
    with TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True} | compiler.GPU | options
        executable = lowered.compile(compiler_options=options)
        # Of a program with fewer kernels than a command buffer must have, XLA writes only the first of the two.
        *_, thunks = sorted(Path(folder).glob("*.thunk_sequence*.txt"))
        return Compiled(executable, size, least, thunks.read_text())
