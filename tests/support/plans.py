"""Plans beside the programs that they are about."""

import re
from collections import Counter
from collections.abc import Mapping
from functools import cache
from typing import Any

from jax.sharding import Mesh

from jaxinfer.engine.runner.batch import Bucket
from jaxinfer.engine.sampling.sampling_rows import Level
from jaxinfer.sharding import Plan, plan
from jaxinfer.sharding.collectives import DECODE
from jaxinfer.sharding.policy import Placement
from support import cross, internvl, mllama, whisper
from support.lowering import Compiled, abstract_model, compile_step
from support.tiny import ARCHITECTURES, BLOCK, CHUNK, CONFIG, FULL, LENGTH, ROWS, config, shapes

LLAMA = CONFIG | {"architectures": ["LlamaForCausalLM"], "num_attention_heads": 8, "dtype": "bfloat16"}
"""Eight query heads, two of keys and values, a vocabulary of 97 that is padded."""
MOE = config("qwen3_moe") | {"num_attention_heads": 8, "dtype": "bfloat16"}
"""Eight experts in every layer."""
TIED = LLAMA | {"tie_word_embeddings": True}
OLMO = config("olmo3") | {"num_attention_heads": 8, "dtype": "bfloat16", "layer_types": [FULL] * 2}
"""Queries and keys are normalised over their whole width; kv heads serve several devices."""

CASES: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "sharded": (LLAMA, {}),
    "attention replicated": (LLAMA, {"placement": {"*.attention": "replicate"}}),
    "mlp replicated": (LLAMA, {"placement": {"*.mlp": "replicate"}}),
    "first layer replicated": (LLAMA, {"placement": {"layers.0": "replicate"}}),
    "ends replicated": (LLAMA, {"placement": {"embedding": "replicate", "head": "replicate"}}),
    "all replicated": (LLAMA, {"placement": {"*": "replicate"}}),
    "tied": (TIED, {}),
    "tied, int8": (TIED, {"quantization": "int8"}),
    "int8": (LLAMA, {"quantization": "int8"}),
    "norms over the whole width": (OLMO, {}),
    "norms over the whole width, attention replicated": (OLMO, {"placement": {"*.attention": "replicate"}}),
    "experts": (MOE, {}),
    "by experts": (MOE, {"placement": {"*.mlp": "experts"}}),
    "experts replicated, int8": (MOE, {"placement": {"*.mlp": "replicate"}, "quantization": "int8"}),
}
"""config.json and settings."""


EVERY: Mapping[str, Mapping[str, Any]] = {
    **{name: config(name) for name in ARCHITECTURES},
    "bart": cross.CONFIG,
    "mbart": cross.CONFIG | {"architectures": ["MBartForConditionalGeneration"]},
    "whisper": whisper.CONFIG,
    "internvl": internvl.config(),
    "mllama": mllama.config(),
}
"""A tiny config.json of every family, but for its dtype."""


def planned(case: str, tp: int) -> Plan:
    """The plan, which sees no device."""
    hf, settings = CASES[case]
    return plan(hf, tensor_parallel_size=tp, **settings)


@cache
def compiled(case: str, kind: str, mesh: Mesh) -> Compiled:
    """The engine's own greedy step, compiled for the devices of the mesh."""
    hf, settings = CASES[case]
    how = settings | {"placement": Placement.of(settings.get("placement"))}
    program, params = abstract_model(hf, mesh, **how)
    tokens = ROWS if kind == DECODE else CHUNK
    bucket = Bucket(kind, tokens, ROWS, LENGTH // BLOCK, Level.GREEDY, -1, tile=program.tile)
    return compile_step(program, params, shapes(switched=False), bucket)


def on_gpu(made: Plan, step: str) -> Counter[str]:
    """The collectives of a program for GPUs: those of the plan, no others."""
    return Counter(made.collectives(step))


def on_cpu(made: Plan, step: str) -> Counter[str]:
    """The collectives of a program for CPUs, whose compiler differs in two things.

    It does not let arrays that could go together do so: each array is a collective. And the sampler's largest logits,
    which a GPU has of the search for their tokens, it looks for a second time, with an all-reduce.
    """
    found = Counter()
    for exchange in made.exchanges:
        if step in exchange.steps:
            found[exchange.collective.kind] += exchange.collective.arrays
            found["all-reduce"] += exchange.module == "sampler"
    return found


def payloads(program: str) -> list[tuple[str, int, int]]:
    """Of every all-reduce of a program's text: the dtype, rows and numbers a row of what it adds up."""
    found = re.findall(r"= (\w+)\[(\d+),(\d+)\]\S* all-reduce(?:-start)?\(", program)
    return [(kind, int(rows), int(width)) for kind, rows, width in found]
