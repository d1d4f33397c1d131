"""Generate text or transcripts of prompts: `jaxinfer generate`; without --model, use the packaged checkpoint."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from jaxinfer import demo, distributed
from jaxinfer.commands.exit_status import status_of
from jaxinfer.commands.generate import sanity
from jaxinfer.commands.generate.options import add_arguments, as_inputs, finish, open_image, read_prompts
from jaxinfer.commands.generate.printing import as_json, collect, report, show
from jaxinfer.commands.generate.rates import Rates
from jaxinfer.commands.overrides import chat_tokenizer, read_template
from jaxinfer.llm import LLM
from jaxinfer.media import read_wav
from jaxinfer.sampling_params import SamplingParams

DEFAULT_PROMPTS = ("What is 17 plus 25?", "What is the capital of France?")
"""Default prompts for the packaged checkpoint."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command without `python -m jaxinfer`; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, usage="%(prog)s [OPTIONS]")
    add_arguments(parser)
    return run(parser, parser.parse_args(argv))


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Run the command with parsed arguments and return its exit status."""
    finish(parser, args)
    return status_of(lambda: _run(args), parser)


def _run(args: argparse.Namespace) -> int:
    """Dispatch to the mode that the command line selects."""
    if args.coordinator is not None:
        distributed.initialize(args.coordinator, args.num_processes, args.process_id)
    if args.process_id:
        return follow(args)
    if args.audio:
        return transcribe(args)
    return compare(args) if args.samples else generate(args)


def make_llm(args: argparse.Namespace, **settings: Any) -> LLM:
    """Load the model of the command line."""
    if args.tensor_parallel_size is None:
        import jax

        args.tensor_parallel_size = 1 if args.coordinator is None else jax.device_count()
    model, template = args.model or demo.path(), read_template(args.chat_template)
    return LLM(
        model,
        tokenizer=chat_tokenizer(model, template) if args.chat and not args.process_id else None,
        dtype=args.dtype,
        quantization=args.quantization,
        max_model_len=args.max_model_len,
        tensor_parallel_size=args.tensor_parallel_size,
        peer_timeout=args.peer_timeout,
        hf_overrides=args.hf_overrides,
        speculative_config=args.speculative_config,
        chat_template=template,
        **settings,
    )


def params_of(args: argparse.Namespace) -> SamplingParams:
    """Return the sampling parameters of the command line."""
    default = None if args.chat or args.audio else 128
    return SamplingParams(
        n=args.n,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        seed=args.seed,
        max_tokens=default if args.max_tokens is None else args.max_tokens,
    )


def generate(args: argparse.Namespace) -> int:
    """Generate from the prompts and stream the texts to stdout."""
    prompts = list(args.prompt)
    if args.prompts_file is not None:
        prompts += read_prompts(args.prompts_file)
    prompts = prompts or list(DEFAULT_PROMPTS)
    inputs = as_inputs(prompts, [open_image(file) for file in args.image], args.chat)
    params = params_of(args)
    with make_llm(args) as llm:
        rates = Rates(llm)
        updates = rates.watch(llm.stream_chat(inputs, params) if args.chat else llm.stream(inputs, params))
        if args.json:
            outputs = collect(updates, prompts, params.n)
            for prompt, output in zip(prompts, outputs, strict=True):
                print(json.dumps({"prompt": prompt, **as_json(output)}), flush=True)
        else:
            outputs = show(updates, prompts, params.n, args.chat)
        report(rates.of(outputs))
    return 1 if any(c.finish_reason == "error" for output in outputs for c in output.outputs) else 0


def transcribe(args: argparse.Namespace) -> int:
    """Transcribe audio files with timestamps."""
    sounds = [read_wav(file) for file in args.audio]
    with make_llm(args) as llm:
        found = llm.transcribe(sounds, params_of(args), language=args.language, task=args.task)
    for file, transcript in zip(args.audio, found, strict=True):
        if args.json:
            print(json.dumps({"file": str(file), **asdict(transcript)}), flush=True)
            continue
        print(f"{file} ({transcript.duration:.1f} s{f', {transcript.language}' if transcript.language else ''})")
        for segment in transcript.segments:
            print(f"[{segment.start:.2f} - {segment.end:.2f}]{segment.text}")
        print()
    return 1 if any(transcript.finish_reason == "error" for transcript in found) else 0


def compare(args: argparse.Namespace) -> int:
    """Answer built-in questions with block sharing and prefix caching on and, with --compare, off."""

    def make(on: bool) -> LLM:
        return make_llm(args, enable_prefix_caching=on, enable_block_sharing=on)

    sanity.compare(make, modes(args), args.samples, params_of(args), prefix=args.add_prefix)
    return 0


def follow(args: argparse.Namespace) -> int:
    """Run a worker process (any but process 0): serve process 0 until it ends, with one model for each of its
    models.
    """
    for _ in modes(args):
        with make_llm(args) as llm:
            llm.follow()
    return 0


def modes(args: argparse.Namespace) -> tuple[bool, ...]:
    """Return, for each model to load, whether block sharing and prefix caching are on."""
    return (True, False) if args.samples and args.compare else (True,)
