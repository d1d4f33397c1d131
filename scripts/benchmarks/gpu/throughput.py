"""Measure a batch of requests through `LLM`, beside transformers on the same GPU in the same run."""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import checkpoint
from benchmarks.gpu.context import Context, Figures
from benchmarks.peer import Peer
from jaxinfer.commands.bench.work import Work, random_work

PEERS = ("hf-static", "hf-cb")
"""Peers: transformers' `generate` with a static cache, which it compiles on a GPU, and its continuous batching."""
REPEATS = 2


def run(context: Context) -> Figures:
    """Measure generated tokens per second of 64 requests of 512 + 256 tokens on a 1 B-shaped Llama: medians over the
    passes.

    Systems run one after another, each with the whole GPU memory; peers run first, because JAX does not return memory.
    """
    from benchmarks.gpu.models import LLAMA_1B, TOY  # imports JAX, which does not allocate GPU memory yet

    config: dict[str, Any] = context.size(LLAMA_1B, TOY)
    requests, prompt, new = context.size((64, 512, 256), (3, 12, 6))
    folder = _checkpoint(config)
    work = random_work(requests, (prompt, prompt), (new, new), vocab=config["vocab_size"], seed=0)
    figures: Figures = dict(context.kept) | {"requests": requests, "prompt_tokens": prompt, "new_tokens": new}
    for name in () if context.dry else PEERS:
        if f"{name}_tokens_per_second" in figures:
            continue
        try:
            figures |= _peer(context, name, folder, work)
        except RuntimeError as error:  # the figures of the other systems still count
            figures[f"{name}_error"] = str(error)[:300]
        context.save(figures)
    figures |= _ours(folder, work)
    mine = figures["tokens_per_second"]
    for name in PEERS:
        if f"{name}_tokens_per_second" in figures:
            figures[f"over_{name}"] = mine / figures[f"{name}_tokens_per_second"]
    return figures


def _checkpoint(config: dict[str, Any]) -> Path:
    """Write the checkpoint once to a temporary folder; leftovers of an interrupted run are removed."""
    name = hashlib.sha256(json.dumps(config).encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"jaxinfer-bench-gpu-{name}"
    if not (folder / checkpoint.SIDECAR).exists():
        shutil.rmtree(folder, ignore_errors=True)
    checkpoint.write(folder, config, 0)
    return folder


def _peer(context: Context, name: str, folder: Path, work: Work) -> Figures:
    peer = Peer(name, context.peer_python, folder, "auto")
    try:
        first = peer.run(work).seconds
        seconds = median(peer.run(work).seconds for _ in range(REPEATS))
    finally:
        peer.close()
    return {
        f"{name}_tokens_per_second": work.new_tokens / seconds,
        f"{name}_seconds": seconds,
        f"{name}_first_pass_seconds": first,
        f"{name}_versions": " ".join(f"{k} {v}" for k, v in peer.versions.items()),
    }


def _ours(folder: Path, work: Work) -> Figures:
    from jaxinfer.commands.bench.ours import Offline

    system = Offline(folder, {"max_model_len": work.longest, "max_num_seqs": len(work.prompts)})
    first = system.run(work).seconds
    seconds = median(system.run(work).seconds for _ in range(REPEATS))
    steps, compiling = system.compiled()
    system.close()
    return {
        "tokens_per_second": work.new_tokens / seconds,
        "seconds": seconds,
        "first_pass_seconds": first,
        "compiled_steps": steps,
        "compile_seconds": compiling,
    }
