"""Sharding plans and the compiled programs that they describe."""

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
from support import cross, internvl, mllama, qwen3_vl, whisper
from support.lowering import Compiled, abstract_model, compile_step
from support.tiny import ARCHITECTURES, BLOCK, CHUNK, CONFIG, FOUR_BITS, FULL, LENGTH, ROWS, config, shapes

LLAMA = CONFIG | {"architectures": ["LlamaForCausalLM"], "num_attention_heads": 8, "dtype": "bfloat16"}
"""Llama with eight query heads, two KV heads, and a vocabulary of 97 that is padded."""
MOE = config("qwen3_moe") | {"num_attention_heads": 8, "dtype": "bfloat16"}
"""Mixture of experts with eight experts in every layer."""
TIED = LLAMA | {"tie_word_embeddings": True}
OLMO = config("olmo3") | {"num_attention_heads": 8, "dtype": "bfloat16", "layer_types": [FULL] * 2}
"""Model whose queries and keys are normalised over their whole width; KV heads are replicated over devices."""

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
    "fp8": (LLAMA, {"quantization": "fp8"}),
    "4 bits": (LLAMA | FOUR_BITS, {}),
    "norms over the whole width": (OLMO, {}),
    "norms over the whole width, attention replicated": (OLMO, {"placement": {"*.attention": "replicate"}}),
    "experts": (MOE, {}),
    "by experts": (MOE, {"placement": {"*.mlp": "experts"}}),
    "experts replicated, int8": (MOE, {"placement": {"*.mlp": "replicate"}, "quantization": "int8"}),
}
"""Name of a case -> (config.json, settings)."""


EVERY: Mapping[str, Mapping[str, Any]] = {
    **{name: config(name) for name in ARCHITECTURES},
    "bart": cross.CONFIG,
    "mbart": cross.CONFIG | {"architectures": ["MBartForConditionalGeneration"]},
    "whisper": whisper.CONFIG,
    "internvl": internvl.config(),
    "mllama": mllama.config(),
    "qwen3_vl": qwen3_vl.config(),
}
"""A tiny config.json of every family, without the dtype."""


def planned(case: str, tp: int) -> Plan:
    """Return the plan of a case, made without devices."""
    hf, settings = CASES[case]
    return plan(hf, tensor_parallel_size=tp, **settings)


@cache
def compiled(case: str, kind: str, mesh: Mesh) -> Compiled:
    """Compile the engine's greedy step for the devices of the mesh."""
    hf, settings = CASES[case]
    how = settings | {"placement": Placement.of(settings.get("placement"))}
    program, params = abstract_model(hf, mesh, **how)
    tokens = ROWS if kind == DECODE else CHUNK
    bucket = Bucket(kind, tokens, ROWS, LENGTH // BLOCK, Level.GREEDY, -1, tile=program.tile)
    return compile_step(program, params, shapes(switched=False), bucket)


def on_gpu(made: Plan, step: str) -> Counter[str]:
    """Return the collectives expected in a program for GPUs: exactly those of the plan."""
    return Counter(made.collectives(step))


def on_cpu(made: Plan, step: str) -> Counter[str]:
    """Return the collectives expected in a program for CPUs, whose compiler differs in two ways.

    It does not combine collectives: each array is a collective of its own. And it computes the sampler's maximum logits
    a second time, with an all-reduce, while a GPU takes them from the search for the maximum's token.
    """
    found = Counter()
    for exchange in made.exchanges:
        if step in exchange.steps:
            found[exchange.collective.kind] += exchange.collective.arrays
            found["all-reduce"] += exchange.module == "sampler"
    return found


def payloads(program: str) -> list[tuple[str, int, int]]:
    """Return dtype, rows and row width of the operand of every all-reduce in a program's text."""
    found = re.findall(r"= (\w+)\[(\d+),(\d+)\]\S* all-reduce(?:-start)?\(", program)
    return [(kind, int(rows), int(width)) for kind, rows, width in found]
