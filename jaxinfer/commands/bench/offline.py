"""`jaxinfer bench throughput` and `jaxinfer bench latency`: one model in this process."""

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from typing import Any

from jaxinfer._utils.checks import KV_CACHE_DTYPES, QUANTIZATIONS
from jaxinfer.commands.bench import trace as traces
from jaxinfer.commands.bench.measure import alternate
from jaxinfer.commands.bench.options import count
from jaxinfer.commands.bench.texts import texts
from jaxinfer.commands.bench.work import Work, random_work
from jaxinfer.commands.overrides import add_hf_overrides

ENGINE = ("dtype", "quantization", "kv_cache_dtype", "tensor_parallel_size", "max_model_len", "max_num_seqs")
ENGINE += ("hf_overrides",)
"""Options that are arguments of `LLM`, passed on where they are given."""


def add_throughput(parser: argparse.ArgumentParser) -> None:
    """Add the options of `jaxinfer bench throughput`."""
    add = parser.add_argument
    add("--num-prompts", type=count, default=64, metavar="N", help="requests (%(default)s)")
    add("--input-len", type=count, default=128, metavar="N", help="tokens of a prompt (%(default)s)")
    add("--output-len", type=count, default=64, metavar="N", help="new tokens of a request (%(default)s)")
    add("--text", action="store_true", help="prompts of --input-len words, as bench serve sends: with tokenizer")
    add("--repeats", type=count, default=3, metavar="N", help="passes, of which the median counts (%(default)s)")
    _add_model(parser)


def add_latency(parser: argparse.ArgumentParser) -> None:
    """Add the options of `jaxinfer bench latency`."""
    add = parser.add_argument
    add("--batch-size", type=count, default=8, metavar="N", help="requests of the batch (%(default)s)")
    add("--input-len", type=count, default=32, metavar="N", help="tokens of a prompt (%(default)s)")
    add("--output-len", type=count, default=128, metavar="N", help="new tokens of a request (%(default)s)")
    add("--num-iters", type=count, default=10, metavar="N", help="passes that count (%(default)s)")
    add("--num-iters-warmup", type=count, default=2, metavar="N", help="passes before them (%(default)s)")
    _add_model(parser)


def _add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", help="a checkpoint's directory, GGUF file or Hub id, or smollm2; by default the packaged one")
    add("--seed", type=int, default=0, metavar="N", help="seed of the prompts (%(default)s)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"))
    add("--quantization", choices=QUANTIZATIONS, metavar="METHOD", help=", ".join(QUANTIZATIONS))
    add("--kv-cache-dtype", choices=KV_CACHE_DTYPES, help="keep keys and values in a byte an element")
    for name in ("tensor-parallel-size", "max-model-len", "max-num-seqs"):
        add(f"--{name}", type=count, metavar="N", help="as in jaxinfer.LLM")
    add("--profile", metavar="DIR", help="trace one more pass with JAX's profiler into DIR")
    add_hf_overrides(parser)


def _traced(args: argparse.Namespace) -> AbstractContextManager[Any]:
    """Trace what runs within the context, for `--profile`."""
    import jax

    return jax.profiler.trace(args.profile)


@contextmanager
def _loaded(args: argparse.Namespace, **defaults: Any) -> Iterator[Any]:
    """Load the model of the command line, and release it at the end."""
    from jaxinfer import demo
    from jaxinfer.commands.bench.ours import Offline

    given = {name: getattr(args, name) for name in ENGINE if getattr(args, name) is not None}
    made = Offline(args.model or demo.path(), defaults | given)
    try:
        yield made
    finally:
        made.close()


def _random(args: argparse.Namespace, made: Any, requests: int) -> Work:
    """Return requests of equal lengths."""
    lengths = (args.input_len, args.input_len), (args.output_len, args.output_len)
    return random_work(requests, *lengths, vocab=made.llm._input_processor.limits.vocab_size, seed=args.seed)


def _finish(made: Any, figures: dict[str, Any]) -> dict[str, Any]:
    """Add what was compiled."""
    steps, seconds = made.compiled()
    return figures | {"compiled_steps": steps, "compile_seconds": seconds}


def throughput(args: argparse.Namespace) -> dict[str, Any]:
    """Measure throughput and return the figures, with the names of `vllm bench throughput`."""
    if args.text:
        return _text_throughput(args)
    with _loaded(args, max_model_len=args.input_len + args.output_len) as made:
        work = _random(args, made, args.num_prompts)
        runs = alternate(made, [], work, repeats=args.repeats)[made.name]
        if args.profile is not None:
            with _traced(args):
                made.run(work)
        figures = traces.medians([traces.throughput(work, run) for run in runs])
        sizes = {"num_requests": args.num_prompts, "total_num_tokens": work.prompt_tokens + work.new_tokens}
        return _finish(made, sizes | figures)


def _text_throughput(args: argparse.Namespace) -> dict[str, Any]:
    """Measure throughput over texts, which are tokenised, and whose results are texts."""
    from jaxinfer import demo
    from jaxinfer.llm import LLM
    from jaxinfer.sampling_params import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=args.output_len, ignore_eos=True)
    given = {name: getattr(args, name) for name in ENGINE if getattr(args, name) is not None}
    source, runs = texts(args.input_len, args.seed), []
    with LLM(args.model or demo.path(), **given) as llm:
        for number in range(args.repeats + 1):  # the first compiles what it needs
            prompts = list(islice(source, args.num_prompts))
            start = time.perf_counter()
            outputs = llm.generate(prompts, params, use_tqdm=False)
            seconds = time.perf_counter() - start
            print(f"pass {number}: {seconds:.2f} s", file=sys.stderr)
            read = sum(len(output.prompt_token_ids) for output in outputs)
            made = sum(len(output.outputs[0].token_ids) for output in outputs)
            runs.append(
                {
                    "total_num_tokens": read + made,
                    "elapsed_time": seconds,
                    "requests_per_second": args.num_prompts / seconds,
                    "tokens_per_second": (read + made) / seconds,
                    "output_tokens_per_second": made / seconds,
                }
            )
        if args.profile is not None:
            with _traced(args):
                llm.generate(list(islice(source, args.num_prompts)), params, use_tqdm=False)
    return {"num_requests": args.num_prompts} | traces.medians(runs[1:])


def latency(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the latency of one batch and return the figures."""
    with _loaded(args, max_model_len=args.input_len + args.output_len) as made:
        work = _random(args, made, args.batch_size)
        runs = alternate(made, [], work, repeats=args.num_iters, warmup=args.num_iters_warmup)[made.name]
        if args.profile is not None:
            with _traced(args):
                made.run(work)
        return _finish(made, {"batch_size": args.batch_size, **traces.latency(runs)})
