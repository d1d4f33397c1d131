"""`jaxinfer bench serve`: load on a running server with OpenAI's API, and its latencies as `vllm bench serve` has."""

import argparse
import asyncio
import os
import random
import time
from collections.abc import Iterator, Sequence
from statistics import mean, pstdev
from typing import Any

import numpy as np

from jaxinfer.commands.bench.client import Answer, Target, make_client, model_of, send
from jaxinfer.commands.bench.options import count, percentiles, positive, whole
from jaxinfer.commands.bench.texts import texts


def add_serve(parser: argparse.ArgumentParser) -> None:
    """Add the options of `jaxinfer bench serve`."""
    add = parser.add_argument
    add("--base-url", default="http://127.0.0.1:8000", metavar="URL", help="the server (%(default)s)")
    add("--model", metavar="NAME", help="model on the server; by default the first of its list")
    add("--endpoint", choices=("completions", "chat"), default="completions", help="of /v1 (%(default)s)")
    add("--api-key", metavar="KEY", help="by default the environment's OPENAI_API_KEY")
    add("--num-prompts", type=count, default=256, metavar="N", help="requests (%(default)s)")
    add("--num-warmups", type=whole, metavar="N", help="requests before, not measured; by default --max-concurrency")
    add("--duration", type=positive, metavar="S", help="send requests for S seconds instead")
    add("--max-concurrency", type=count, default=64, metavar="N", help="requests at a time (%(default)s)")
    add("--request-rate", type=positive, metavar="R", help="requests a second, at random times; default: no limit")
    add("--input-len", type=count, default=64, metavar="N", help="words of a prompt (%(default)s)")
    add("--output-len", type=count, default=32, metavar="N", help="new tokens of a request (%(default)s)")
    add("--stop-at-eos", action="store_true", help="do not ask for ignore_eos, which not all servers have")
    add("--seed", type=int, metavar="N", help="seed of prompts and times; by default new ones in each run")
    add("--percentiles", type=percentiles, default=(50, 90, 99), metavar="P,P", help="to print (50,90,99)")
    add("--timeout", type=positive, default=600.0, metavar="S", help="seconds without data (%(default)g)")


def serve(args: argparse.Namespace) -> dict[str, Any]:
    """Send the load and return the figures.

    Raises:
        RuntimeError: the server cannot be reached, or no request was answered.
        ValueError: httpx is missing, or the address is not an HTTP URL.
    """
    return asyncio.run(_serve(args))


def arrivals(args: argparse.Namespace) -> Iterator[float]:
    """Yield the seconds at which requests are to be sent: all at once, or as a Poisson process of a rate."""
    rng, at = random.Random(args.seed), 0.0
    sent = 0
    while args.duration is not None or sent < args.num_prompts:
        yield at
        sent += 1
        at += rng.expovariate(args.request_rate) if args.request_rate is not None else 0.0


async def _serve(args: argparse.Namespace) -> dict[str, Any]:
    key = args.api_key or os.environ.get("OPENAI_API_KEY")
    async with make_client(args.base_url, key, args.timeout, args.max_concurrency) as client:
        model = args.model or await model_of(client)
        target = Target(model, args.endpoint, args.output_len, ignore_eos=not args.stop_at_eos)
        prompts, times, answers = texts(args.input_len, args.seed), arrivals(args), []
        warmups = args.max_concurrency if args.num_warmups is None else args.num_warmups
        await asyncio.gather(*(send(client, target, next(prompts)) for _ in range(warmups)))
        start = time.perf_counter()

        async def worker() -> None:
            for at in times:
                await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
                if args.duration is not None and time.perf_counter() - start >= args.duration:
                    return
                answers.append(await send(client, target, next(prompts)))

        await asyncio.gather(*(worker() for _ in range(args.max_concurrency)))
        seconds = time.perf_counter() - start
    given = {"base_url": args.base_url, "model": model, "endpoint": args.endpoint}
    given |= {"max_concurrency": args.max_concurrency, "request_rate": args.request_rate}
    return given | figures(answers, seconds, args.percentiles)


def figures(answers: Sequence[Answer], seconds: float, shown: Sequence[float]) -> dict[str, Any]:
    """Return throughput and latencies, with the names of `vllm bench serve`.

    Args:
        answers: one a request, also for those that failed.
        seconds: from the first request to the last answer.
        shown: percentiles.

    Raises:
        RuntimeError: no request was answered.
    """
    done = [answer for answer in answers if answer.error is None]
    failed = [answer for answer in answers if answer.error is not None]
    if not done:
        reason = failed[0].error if failed else "none was sent"
        raise RuntimeError(f"none of {len(answers)} requests was answered, the first because: {reason}")
    read, made = sum(answer.prompt_tokens for answer in done), sum(answer.new_tokens for answer in done)
    found: dict[str, Any] = {
        "duration": seconds,
        "completed": len(done),
        "failed": len(failed),
        "error": failed[0].error if failed else None,
        "total_input_tokens": read,
        "total_output_tokens": made,
        "request_throughput": len(done) / seconds,
        "output_throughput": made / seconds,
        "total_token_throughput": (read + made) / seconds,
    }
    latencies = {
        "ttft": [answer.first for answer in done],
        "tpot": [answer.per_token for answer in done if answer.new_tokens > 1],
        "itl": [gap for answer in done for gap in answer.gaps],
        "e2el": [answer.seconds for answer in done],
    }
    for name, values in latencies.items():
        found |= _statistics(name, values, shown)
    return found


def _statistics(name: str, seconds: Sequence[float], shown: Sequence[float]) -> dict[str, float]:
    """Return mean, deviation and percentiles in milliseconds; nothing if there are no values."""
    if not seconds:
        return {}
    parts = {f"p{one:g}": float(np.percentile(seconds, one)) for one in shown}
    parts = {"mean": mean(seconds), "std": pstdev(seconds), **parts}
    return {f"{kind}_{name}_ms": 1e3 * value for kind, value in parts.items()}
