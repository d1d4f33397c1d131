"""Compile the engine's steps for H100s without one, and summarise the programs (`bench.py compiled`).

Needs what the tests in `tests/h100` need: JAX's CUDA plugin and nvcc, but no GPU.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[3] / "tests"
ROWS, POSITIONS, BLOCK, CHUNK = 8, 4096, 16, 2048
"""Number of sequences; their maximum length; positions per block; tokens of a prefill."""
STEPS = ["decode", "prefill", "joint"]
SHAPES = {"0.25B": "LLAMA_250M", "8B": "LLAMA_8B"}
COLUMNS = (
    "model",
    "step",
    "tp",
    "kernels",
    "a layer",
    "command buffers",
    "launched alone",
    "large copies",
    "temporaries",
    "all-reduces, others",
    "bytes / fewest",
    "compile s",
)


def main(words: Sequence[str]) -> int:
    """Print the table, each line as soon as it is available."""
    parser = argparse.ArgumentParser(prog="bench.py compiled", description=__doc__)
    parser.add_argument("--model", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--step", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--tp", nargs="+", type=int, default=[1, 4, 8], help="GPUs")
    parser.add_argument("--layers", type=int, help="of each model; by default its own")
    args = parser.parse_args(words)
    print(_line(*COLUMNS), _line(*["---"] * len(COLUMNS)), sep="\n", flush=True)
    for model in args.model:
        for step in args.step:
            for tp in args.tp:
                print(_line(*_row(model, step, tp, args.layers)), flush=True)
    return 0


def _line(*cells: Any) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _row(model: str, step: str, tp: int, layers: int | None) -> list[Any]:
    """Return the table cells of one program."""
    from benchmarks.gpu import models

    hf = getattr(models, SHAPES[model])
    hf = hf if layers is None else hf | {"num_hidden_layers": layers}
    start = time.perf_counter()
    compiled = compile_step(hf, step, tp)
    seconds = time.perf_counter() - start
    fewer, more = (len(compile_step(hf | {"num_hidden_layers": count}, step, tp).kernels) for count in (2, 3))
    counted = compiled.collectives
    others = sum(counted.values()) - counted["all-reduce"]
    return [
        model,
        step,
        tp,
        len(compiled.kernels),
        more - fewer,
        compiled.command_buffers,
        len(compiled.launched_alone),
        len(compiled.large_copies),
        f"{compiled.temporary_bytes / 2**20:.1f} MiB",
        f"{counted['all-reduce']}, {others}",
        f"{compiled.moved_bytes / fewest_bytes(hf, step, tp):.3f}",
        f"{seconds:.0f}",
    ]


def compile_step(hf: dict[str, Any], step: str, tp: int, **options: Any) -> Any:
    """Compile an engine step for `tp` H100s to a `support.lowering.Compiled`; `options` as in `step_and_lowered`."""
    return step_and_lowered(hf, step, tp, **options)[0]


def step_and_lowered(hf: dict[str, Any], step: str, tp: int, **options: Any) -> tuple[Any, Any]:
    """Return a compiled engine step, and its logits' program before compilation.

    `options` are sizes as in `lower_step`, and compiler options.
    """
    sizes = {name: options.pop(name) for name in ("fuse_projections", "rows", "chunk") if name in options}
    lowered, described = lower_step(hf, step, tp, **sizes)
    from support import lowering

    return lowering.compile_step(*described, **options), lowered


def lower_step(
    hf: dict[str, Any], step: str, tp: int, *, fuse_projections: bool = True, rows: int = ROWS, chunk: int = CHUNK
) -> tuple[Any, tuple[Any, ...]]:
    """Return the logits' program of an engine step for `tp` H100s before compilation, and what describes the step.

    Args:
        hf: contents of config.json.
        step: one of `STEPS`.
        tp: number of devices.
        fuse_projections: as in `EngineConfig`.
        rows: number of sequences.
        chunk: number of tokens of a prefill.
    """
    if str(TESTS) not in sys.path:
        sys.path.insert(0, str(TESTS))
    from support import lowering  # the only code that compiles without a device

    from jaxinfer.engine.runner.buckets import Needs, decode_bucket, joint_bucket, prefill_bucket
    from jaxinfer.engine.runner.logits import programs as programs_of
    from jaxinfer.engine.runner.lowering import lower
    from jaxinfer.engine.runner.shapes import Shapes

    program, params = lowering.abstract_model(hf, lowering.h100_mesh(tp), fuse_projections=fuse_projections)
    width = POSITIONS // BLOCK
    shapes = Shapes(
        # Large enough that no activation array has the size of a cache array.
        num_blocks=16 * rows * width,
        block_size=BLOCK,
        rows=rows,
        width=width,
        decode_buckets=(rows,),
        prefill_buckets=(chunk,),
        prefill_rows=rows,
        max_logprobs=5,
        max_length=POSITIONS,
        sampled_vocab=program.vocab,
        groups=program.layout.groups,
        state_slots=4 * rows if program.layout.states else 0,
        joint_buckets=((chunk, rows),),
    )
    if step == "decode":
        bucket = decode_bucket(program, shapes, rows, 0, Needs())
    elif step == "joint":
        bucket = joint_bucket(program, shapes, chunk - rows, rows, 0, Needs())
    else:
        bucket = prefill_bucket(program, shapes, chunk, Needs())
    lowered = lower(programs_of(shapes, bucket)[0], program, shapes, params, None)
    return lowered, (program, params, shapes, bucket)


def fewest_bytes(hf: dict[str, Any], step: str, tp: int) -> int:
    """Return the minimum bytes a device moves in a step, without attention: weights once, and each product's input
    and output once.
    """
    tokens, logits = (ROWS, ROWS) if step == "decode" else (CHUNK, ROWS)
    size, width, ffn, vocab = 2, hf["hidden_size"], hf["intermediate_size"] // tp, hf["vocab_size"] // tp
    heads = hf["num_attention_heads"] // tp
    # With more shards than kv heads, each shard has one.
    kv_heads = max(1, hf["num_key_value_heads"] // tp)
    qkv = (heads + 2 * kv_heads) * hf["head_dim"]
    products = ((width, qkv), (heads * hf["head_dim"], width), (width, 2 * ffn), (ffn, width))
    layer = sum(one * other + tokens * (one + other) for one, other in products) + 2 * width
    head = width * vocab + logits * width
    return size * (hf["num_hidden_layers"] * layer + head + width + 2 * tokens * width) + 4 * logits * vocab
