"""Table of all text families: parity, bytes and speed of tiny random checkpoints (`bench.py families`).

Each family's tiny model of the tests is written by transformers and run by both. At such sizes a step is the work of
the host, so the speed says what a family's steps cost beside their arithmetic. Needs torch and transformers.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

TESTS = Path(__file__).resolve().parents[2] / "tests"
ROWS, PROMPT, NEW, PASSES = 8, 32, 64, 3
"""Sequences, tokens of each prompt, new tokens of each, and measured passes."""
COLUMNS = "family", "difference", "weights, kB", "a published model", "its weights, GiB", "a token's cache, kB"
SPEEDS = "tok/s", "transformers", "ratio"


def main(words: Sequence[str]) -> int:
    """Print the table, each line as soon as it is available."""
    parser = argparse.ArgumentParser(prog="bench.py families", description=__doc__)
    parser.add_argument("--family", nargs="+", help="families of tests/families; by default all that have a tiny model")
    args = parser.parse_args(words)
    sys.path.insert(0, str(TESTS))
    from support.families import families

    known = {name: data for name, data in families().items() if data.cases}
    names = args.family or list(known)
    if unknown := sorted(set(names) - set(known)):
        print(f"error: --family {' '.join(unknown)}: not in tests/families, or without a tiny model", file=sys.stderr)
        return 1
    print(_line(*COLUMNS, *SPEEDS), _line(*["---"] * len(COLUMNS + SPEEDS)), sep="\n", flush=True)
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            print(_line(*_row(name, known[name], Path(folder))), flush=True)
    return 0


def _line(*cells: Any) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _row(name: str, data: Any, folder: Path) -> list[Any]:
    """Return the cells of one family."""
    import torch
    from support import loaded
    from support import reference as ref
    from support.tiny import prompt

    case = next(iter(data.cases.values()))
    model = ref.model(name, head=case.head, **case.changes)
    ref.save(model, folder)
    asked = [prompt(length, seed) for seed, length in enumerate(case.lengths)]
    found = loaded.logits(folder, asked, [[] for _ in asked])
    pairs = zip(found, (ref.logits(model, ids, cached=case.cached) for ids in asked), strict=True)
    difference = max(np.abs(ours - theirs).max() for ours, theirs in pairs)
    prompts = [prompt(PROMPT, seed) for seed in range(ROWS)]
    size = sum(param.numel() * param.element_size() for param in model.parameters())
    cells = [name, f"{difference:.1e}", f"{size / 1e3:.0f}", *_published(data)]
    ours, theirs = _ours(folder, prompts), _theirs(model, torch.tensor(prompts))
    return [*cells, f"{ours:.0f}", f"{theirs:.0f}", f"{ours / theirs:.1f}"]


def _published(data: Any) -> list[Any]:
    """Return the name of the family's first published model, its weights and a token's share of the cache."""
    from support.families import published

    from jaxinfer.loading.plan import plan

    name = next(iter(data.published))
    made = plan(published()[name])
    return [
        name,
        f"{made.device_bytes / 2**30:.1f}",
        f"{made.cache.block_device_bytes / made.cache.block_size / 1e3:.1f}",
    ]


def _ours(folder: Path, prompts: list[list[int]]) -> float:
    """Return generated tokens a second, the median of the passes."""
    from jaxinfer import LLM, SamplingParams

    llm = LLM(folder, dtype="float32", max_num_seqs=ROWS, max_model_len=128, skip_tokenizer_init=True)
    params = SamplingParams(max_tokens=NEW, ignore_eos=True, temperature=0.0)
    return _median(lambda: llm.generate(prompts, params, use_tqdm=False))


def _theirs(model: Any, prompts: Any) -> float:
    """Return the same for transformers' `generate`."""
    import torch

    def run() -> None:
        with torch.inference_mode():
            model.generate(prompts, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)

    return _median(run)


def _median(run: Any) -> float:
    seconds = []
    for _ in range(PASSES + 1):  # the first one compiles
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return ROWS * NEW / statistics.median(seconds[1:])
