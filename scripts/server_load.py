#!/usr/bin/env python
"""Measure a running server under concurrent streams, and with --baseline `LLM.generate` on the same requests.

jaxinfer serve MODEL --served-model-name m --max-num-seqs 64 --warmup &
python scripts/server_load.py --model m --streams 64 --seconds 60
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice

PROMPT = "Write about number {}. " + "The quick brown fox jumps over the lazy dog. " * 5
"""Prompt of a request, with its number in front so that prompts share no prefix."""


@dataclass
class Figures:
    """Latencies of finished requests, in seconds."""

    first: list[float] = field(default_factory=list)
    """Time to the first token."""
    between: list[float] = field(default_factory=list)
    """Mean time between the tokens of a request."""
    tokens: int = 0


def new_numbers() -> Iterator[int]:
    """Yield numbers of ten digits that no earlier run has used, so that no prompt is found in the prefix cache."""
    return count(10**9 + 1000 * random.randrange(10**6))


async def one_request(client, args: argparse.Namespace, number: int, figures: Figures) -> None:
    """Stream one completion and record its latencies."""
    body = {"model": args.model, "prompt": PROMPT.format(number), "max_tokens": args.max_tokens, "temperature": 0}
    body |= {"stream": True, "ignore_eos": True, "stream_options": {"include_usage": True}}
    start, first = time.perf_counter(), None
    async with client.stream("POST", f"{args.url}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            first = first or time.perf_counter()
            usage = json.loads(line[6:]).get("usage")
            made = usage["completion_tokens"] if usage else 0
    figures.first.append(first - start)
    figures.between.append((time.perf_counter() - first) / max(made - 1, 1))
    figures.tokens += made


async def load(args: argparse.Namespace) -> dict[str, float]:
    """Keep `--streams` requests running for `--seconds`, let them end, and return the figures."""
    import httpx

    figures, numbers = Figures(), new_numbers()
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=args.streams)) as client:
        start = time.perf_counter()

        async def stream() -> None:
            while time.perf_counter() - start < args.seconds:
                await one_request(client, args, next(numbers), figures)

        await asyncio.gather(*(stream() for _ in range(args.streams)))
        passed = time.perf_counter() - start
    first, between = sorted(figures.first), figures.between
    return {
        "requests": len(first),
        "seconds": round(passed, 2),
        "requests_per_second": round(len(first) / passed, 3),
        "tokens_per_second": round(figures.tokens / passed, 1),
        "ttft_ms_median": round(1000 * statistics.median(first)),
        "ttft_ms_p99": round(1000 * first[int(0.99 * (len(first) - 1))]),
        "tpot_ms_median": round(1000 * statistics.median(between), 1),
    }


def baseline(args: argparse.Namespace, requests: int) -> dict[str, float]:
    """Run as many requests with `LLM.generate`, `--streams` at a time, after as many that compile what they need."""
    from jaxinfer import LLM, SamplingParams

    params = SamplingParams(temperature=0, max_tokens=args.max_tokens, ignore_eos=True)
    with LLM(args.baseline, max_num_seqs=args.streams, max_model_len=args.max_model_len) as llm:
        for _ in range(2):
            prompts = [PROMPT.format(number) for number in islice(new_numbers(), requests)]
            start = time.perf_counter()
            outputs = llm.generate(prompts, params, use_tqdm=False)
            passed = time.perf_counter() - start
    made = sum(len(output.outputs[0].token_ids) for output in outputs)
    return {"requests_per_second": round(requests / passed, 3), "tokens_per_second": round(made / passed, 1)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", required=True, help="name of the model on the server")
    parser.add_argument("--streams", type=int, default=64, help="concurrent requests")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long new requests are sent")
    parser.add_argument("--max-tokens", type=int, default=32, help="new tokens of a request")
    parser.add_argument("--baseline", metavar="DIR", help="instead of a server, run LLM.generate on this checkpoint")
    parser.add_argument("--max-model-len", type=int, help="with --baseline: as that of the server")
    parser.add_argument("--requests", type=int, default=256, help="with --baseline: number of requests")
    args = parser.parse_args(argv)
    print(json.dumps(baseline(args, args.requests) if args.baseline else asyncio.run(load(args))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
