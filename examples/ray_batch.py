"""Generate for a file of prompts with Ray Data: one engine an actor, restartable, the results in the prompts' order.

    python examples/ray_batch.py --model DIR --prompts prompts.jsonl --out results --actors 2

Each line of the file is a JSON object with `prompt`. Each block of results is a file of `--out`, written when it is
complete, and a second run computes only the blocks that are missing. If an actor dies, Ray starts another one, which
computes the block again; greedy results are the same. `merge` joins the files in the order of the prompts.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np


class Generate:
    """An engine in an actor of its own, which completes blocks of prompts.

    Args:
        model: a checkpoint's directory or Hub id.
        out: folder of the results.
        max_tokens: new tokens of a prompt.
        settings: arguments of `LLM`.
    """

    def __init__(self, model: str, out: str, max_tokens: int, settings: dict[str, Any]):
        from jaxinfer import LLM, SamplingParams

        self._llm = LLM(model, use_tqdm=False, **settings)
        self._params = SamplingParams(temperature=0, max_tokens=max_tokens)
        self._out = Path(out)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Complete the prompts of one block and write its file."""
        [number] = set(batch["block"].tolist())
        outputs = self._llm.generate([str(one) for one in batch["prompt"]], self._params)
        made = [
            {"index": int(index), "prompt": str(prompt), "text": output.outputs[0].text}
            for index, prompt, output in zip(batch["index"], batch["prompt"], outputs, strict=True)
        ]
        file = block_file(self._out, number)
        part = file.with_suffix(f".{os.getpid()}.part")
        part.write_text("".join(f"{json.dumps(one)}\n" for one in made), encoding="utf-8")
        part.replace(file)  # a file is there as a whole or not at all
        return {"block": np.array([number]), "rows": np.array([len(made)])}


def block_file(out: Path, number: int) -> Path:
    """Return the file of a block's results."""
    return out / f"block-{number:06d}.jsonl"


def read_prompts(file: Path) -> list[str]:
    """Read the prompts; raises ValueError that names the line of a broken one."""
    prompts = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: no JSON: {error}") from None
        prompt = found.get("prompt") if isinstance(found, dict) else None
        if not isinstance(prompt, str) or not prompt:
            raise ValueError(f"{file}, line {number}: needs an object with a text `prompt`")
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{file} has no prompt in it")
    return prompts


def missing_rows(prompts: Sequence[str], size: int, out: Path) -> list[dict[str, Any]]:
    """Return the rows of the blocks that have no file yet."""
    rows = ({"index": i, "block": i // size, "prompt": prompt} for i, prompt in enumerate(prompts))
    return [row for row in rows if not block_file(out, row["block"]).exists()]


def merge(out: Path) -> Iterator[dict[str, Any]]:
    """Yield all results in the order of the prompts."""
    for file in sorted(out.glob("block-*.jsonl")):
        yield from map(json.loads, file.read_text(encoding="utf-8").splitlines())


def run(args: argparse.Namespace) -> int:
    """Compute the missing blocks and write `results.jsonl`."""
    import ray

    prompts = read_prompts(args.prompts)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = missing_rows(prompts, args.block, args.out)
    if rows:
        # One part a block, so that an actor gets whole blocks; the block of a lost actor is tried again.
        blocks = [rows[i : i + args.block] for i in range(0, len(rows), args.block)]
        parts = [ray.data.from_items(block, override_num_blocks=1) for block in blocks]
        data = parts[0].union(*parts[1:]) if len(parts) > 1 else parts[0]
        done = data.map_batches(
            Generate,
            fn_constructor_args=(args.model, str(args.out.resolve()), args.max_tokens, json.loads(args.settings)),
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(size=args.actors),
            num_cpus=args.cpus,
            max_restarts=-1,
            max_task_retries=-1,
        )
        print(f"computed {sum(row['rows'] for row in done.take_all())} of {len(prompts)} prompts", file=sys.stderr)
    results = list(merge(args.out))
    if [one["index"] for one in results] != list(range(len(prompts))):
        raise RuntimeError(f"{args.out} has {len(results)} results of {len(prompts)} prompts, or of another file")
    (args.out / "results.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in results), encoding="utf-8")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Generate for a file of prompts with Ray Data.")
    parser.add_argument("--model", required=True, help="a checkpoint's directory or Hub id")
    parser.add_argument("--prompts", type=Path, required=True, help="a JSON object with `prompt` a line")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results; a second run completes it")
    parser.add_argument("--actors", type=int, default=1, help="engines, each in a process of its own")
    parser.add_argument("--block", type=int, default=64, help="prompts of a block, the unit of a restart")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--cpus", type=float, default=1, help="CPUs that Ray reserves for an actor")
    parser.add_argument("--settings", default="{}", help="arguments of LLM as JSON")
    args = parser.parse_args(argv)
    try:
        return run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
