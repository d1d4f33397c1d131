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

REPEATS = 2


def run(context: Context) -> Figures:
    """Measure generated tokens per second of 64 requests of 512 + 256 tokens on a 1 B-shaped Llama: the median over
    the passes.
    """
    folder, work = _given(context)
    return {
        "requests": len(work.prompts),
        "prompt_tokens": len(work.prompts[0]),
        "new_tokens": work.new_tokens // len(work.prompts),
        **_ours(folder, work),
    }


def static(context: Context) -> Figures:
    """Measure transformers' `generate` with a static cache, which it compiles on a GPU."""
    return _beside(context, "hf-static")


def batching(context: Context) -> Figures:
    """Measure transformers' continuous batching."""
    return _beside(context, "hf-cb")


def _beside(context: Context, name: str) -> Figures:
    """Measure a peer on the same work; systems run one after another, each with the whole GPU memory."""
    if context.dry:
        return {}
    figures = _peer(context, name, *_given(context))
    mine = context.figures("throughput-64").get("tokens_per_second")
    return figures | ({f"over_{name}": mine / figures[f"{name}_tokens_per_second"]} if mine else {})


def _given(context: Context) -> tuple[Path, Work]:
    """Return the checkpoint and the requests, the same for all systems."""
    from benchmarks.gpu.models import LLAMA_1B, TOY  # imports JAX, which does not allocate GPU memory yet

    config: dict[str, Any] = context.size(LLAMA_1B, TOY)
    requests, prompt, new = context.size((64, 512, 256), (3, 12, 6))
    return _checkpoint(config), random_work(requests, (prompt, prompt), (new, new), vocab=config["vocab_size"], seed=0)


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
