"""Measure the documents of `bench.py cross`: tokens per second, encoder runs, and blocks held with sharing."""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks import checkpoint
from benchmarks.blocks import Read
from benchmarks.report import Report
from benchmarks.systems import Subject, compare, finish, systems
from jaxinfer import LLM, SamplingParams
from jaxinfer.commands.bench import trace as traces
from jaxinfer.commands.bench.measure import alternate
from jaxinfer.commands.bench.trace import Trace
from jaxinfer.commands.bench.work import Work as Requests
from jaxinfer.commands.bench.work import random_work
from jaxinfer.engine.metrics import PREFIX

STARTS = 8
"""Maximum number of tokens that a decoder starts with."""
COUNTED = 8
"""New tokens of each sample and beam if only blocks are counted."""
SMALL = 8
"""Divisor of lengths for a quick run."""
Figures = dict[str, float]


@dataclass(frozen=True)
class Work:
    """Documents of mixed lengths."""

    count: int
    document: tuple[int, int]
    """Tokens of the shortest and the longest document."""
    new: int
    """New tokens for each document."""


def smaller(work: Work) -> Work:
    """Return the sizes with an eighth of the lengths and a quarter of the documents."""
    shortest, longest = (max(1, size // SMALL) for size in work.document)
    return replace(work, count=max(2, work.count // 4), document=(shortest, longest), new=max(2, work.new // SMALL))


def config(model: Subject) -> dict[str, Any]:
    """Return the config.json of a checkpoint."""
    return json.loads((model.folder / "config.json").read_text())


def subject(hf: dict[str, Any], args: argparse.Namespace) -> Subject:
    """Return a random checkpoint of this configuration."""
    folder = checkpoint.kept(hf, args.seed, args.checkpoint_dir)
    title = f"random BART, {checkpoint.parameters(hf) / 1e6:.4g} M parameters, {hf['dtype']}"
    return Subject(folder, hf["vocab_size"], title)


def add(report: Report, args: argparse.Namespace, model: Subject, work: Work) -> None:
    """Add the requested parts to the report: "documents" and "int8", each with a model of its own, and "shared"."""
    requests = random_work(work.count, work.document, (work.new, work.new), vocab=model.vocab, seed=args.seed)
    report.work |= {"documents": asdict(work)}
    # The decoder's own sequences are short, however long the documents are.
    own = {"max_model_len": STARTS + max(work.new, COUNTED)} | args.settings
    if {"documents", "shared"} & set(args.parts):
        with systems(_with(args, own, args.peer), model, [requests]) as (ours, peers):
            if "documents" in args.parts:
                _throughput(report, ours, peers, requests, args.repeats)
            if "shared" in args.parts:
                report.jaxinfer |= shared(ours.llm, requests, args.samples, args.beams)
            finish(report, model, ours, peers)
    if "int8" in args.parts:
        with systems(_with(args, own | {"quantization": "int8"}, []), model, [requests]) as (ours, _):
            _throughput(report, ours, [], requests, args.repeats, "@int8")
            report.work |= {"model": model.title}


def _with(args: argparse.Namespace, settings: dict[str, Any], peers: list[str]) -> argparse.Namespace:
    return argparse.Namespace(**vars(args) | {"settings": settings, "peer": peers})


def _throughput(report: Report, ours: Any, peers: list[Any], requests: Requests, repeats: int, label: str = "") -> None:
    def figures(runs: list[Trace]) -> Figures:
        return traces.medians([traces.throughput(requests, run) for run in runs])

    measured = alternate(ours, peers, requests, repeats=repeats)
    report.add(compare(measured, ours, figures), ours.name, fast="output_tokens_per_second", label=label)


def shared(llm: LLM, requests: Requests, samples: int, beams: int) -> Figures:
    """Count encoder runs, and the most encoder-output blocks held at a time, against the fewest possible."""
    prompts = [{"prompt_token_ids": prompt} for prompt in requests.prompts]
    several = SamplingParams(n=samples, temperature=1.0, seed=0, max_tokens=COUNTED, ignore_eos=True)
    search = SamplingParams(ignore_eos=True)
    asked: dict[str, Callable[[], Any]] = {
        "samples": lambda: llm.generate(prompts, several, use_tqdm=False),
        "beams": lambda: llm.beam_search(prompts, beams, COUNTED, sampling_params=search, use_tqdm=False),
    }
    figures: Figures = {}
    for name, ask in asked.items():
        llm.reset_prefix_cache()
        before = encoder_runs(llm)
        with Read(llm._engine) as found:
            ask()
        figures |= {
            f"encoder_runs@{name}": encoder_runs(llm) - before,
            f"fewest_encoder_runs@{name}": len({tuple(prompt) for prompt in requests.prompts}),
            f"cross_blocks@{name}": found.held,
            f"fewest_cross_blocks@{name}": found.fewest,
        }
    return figures


def encoder_runs(llm: LLM) -> int:
    """Return the number of encoded inputs so far."""
    return next(int(metric.value) for metric in llm.get_metrics() if metric.name == f"{PREFIX}encoder_inputs")
