#!/usr/bin/env python
"""Generates text from the command line; without --model, from the checkpoint that comes with the package."""

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from jaxinfer import LLM, CompletionOutput, RequestOutput, SamplingParams, demo, distributed
from jaxinfer.errors import JaxInferError
from jaxinfer.media import read_wav

DEFAULT_PROMPTS = ("What is 17 plus 25?", "What is the capital of France?")
"""Asked of the packaged checkpoint when no prompt is given."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; 2 for bad input, said in one line."""
    args = parse(argv)
    try:
        if args.coordinator is not None:
            distributed.initialize(args.coordinator, args.num_processes, args.process_id)
        if args.process_id:
            return follow(args)
        if args.audio:
            return transcribe(args)
        return compare(args) if args.samples else generate(args)
    except (JaxInferError, ValueError, TypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone; the interpreter's own flush at the end must not fail as well.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", help="a checkpoint's directory or Hub id; by default the packaged one")
    add("--prompt", action="append", default=[], help="repeatable")
    add("--prompts-file", type=Path, help="a text file with a prompt a line")
    add("--image", type=Path, action="append", default=[], metavar="FILE", help="repeatable: an image that every prompt is "
        "about, for a model that reads them; without --chat a prompt says <image> where it belongs")
    add("--audio", type=Path, action="append", default=[], metavar="FILE.wav", help="repeatable: sound of any length, which a "
        "model that does so transcribes, with times")
    add("--language", help="with --audio: its code or name; by default it is detected")
    add("--task", choices=("transcribe", "translate"), help="with --audio: translate is into English")
    add("--max-tokens", type=int, default=None, help="by default to the end for chat and --audio, else 128")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--top-p", type=float, default=1.0)
    add("--top-k", type=int, default=0)
    add("--seed", type=int, default=None, help="by default one that is the same for every run")
    add("--n", type=int, default=1, help="samples a prompt")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    add("--quantization", default=None, choices=("int8",), help="keep the weights in int8")
    add("--max-model-len", type=int, default=None)
    add("--tensor-parallel-size", type=int, default=None, help="by default 1, or all devices of several processes")
    add("--coordinator", metavar="HOST:PORT", help="run this on several machines: where process 0 listens, the same on all")
    add("--num-processes", type=int, help="with --coordinator: how many there are, one a machine")
    add("--process-id", type=int, help="with --coordinator: this one's number; 0 takes the prompts, the others end with it")
    add("--peer-timeout", type=float, default=distributed.PEER_TIMEOUT, metavar="SECONDS",
        help="with --coordinator: how soon a process that has died or hangs ends all of them")  # fmt: skip
    add("--chat", action="store_true", help="put each prompt through the chat template")
    add("--json", action="store_true", help="one object a request on stdout, everything else on stderr")
    add("--samples", type=int, default=0, metavar="N", help="ask N built-in questions (at most 20)")
    add("--add-prefix", action="store_true", help="with --samples: put a shared prefix before each question")
    add("--compare", action="store_true", help="with --samples: again without sharing and prefix reuse, side by side")
    args = parser.parse_args(argv)
    check(parser, args)
    args.chat |= args.samples > 0 or (args.model is None and not args.prompt and args.prompts_file is None)
    return args


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses flags that contradict each other."""
    most = len(demo.sample_questions())
    if not 0 <= args.samples <= most:
        parser.error(f"--samples must be from 1 to {most}, got {args.samples}")
    if args.samples and (args.prompt or args.prompts_file or args.json):
        parser.error("--samples asks built-in questions and prints a comparison: no --prompt, --prompts-file or --json")
    if not args.samples and (args.add_prefix or args.compare):
        parser.error("--add-prefix and --compare go with --samples")
    together = (args.coordinator, args.num_processes, args.process_id)
    if None in together and together != (None,) * 3:
        parser.error("--coordinator, --num-processes and --process-id go together")
    if args.image and not (args.model and (args.prompt or args.prompts_file)):
        parser.error("--image needs --model, one that reads images, and --prompt or --prompts-file")
    if args.audio and (args.prompt or args.prompts_file or args.image or args.chat or args.samples or args.n > 1):
        parser.error("--audio is transcribed, window by window: no --prompt, --prompts-file, --image, --chat, --samples or --n")
    if args.audio and not args.model:
        parser.error("--audio needs --model, one that transcribes")
    if not args.audio and (args.language or args.task):
        parser.error("--language and --task go with --audio")
    if args.model == "":
        parser.error("--model is empty; leave it out for the packaged checkpoint")


def read_prompts(file: Path) -> list[str]:
    """The lines of a file that are not blank.

    Raises:
        ValueError: it cannot be read, is not UTF-8, or has none.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ValueError(f"--prompts-file {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts-file {file} is not UTF-8 text: byte {error.start} is wrong") from error
    prompts = [line.rstrip("\r") for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts-file {file} has no prompt in it; write one a line")
    return prompts


def make_llm(args: argparse.Namespace, **settings: Any) -> LLM:
    """The model of the command line."""
    if args.tensor_parallel_size is None:
        import jax

        args.tensor_parallel_size = 1 if args.coordinator is None else jax.device_count()
    return LLM(
        args.model or demo.path(), dtype=args.dtype, quantization=args.quantization,
        max_model_len=args.max_model_len, tensor_parallel_size=args.tensor_parallel_size,
        peer_timeout=args.peer_timeout, **settings,
    )  # fmt: skip


def params_of(args: argparse.Namespace) -> SamplingParams:
    """The sampling parameters of the command line."""
    default = None if args.chat or args.audio else 128
    return SamplingParams(
        n=args.n, temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, seed=args.seed,
        max_tokens=default if args.max_tokens is None else args.max_tokens,
    )  # fmt: skip


def generate(args: argparse.Namespace) -> int:
    """Continues the prompts, streaming."""
    prompts = list(args.prompt)
    if args.prompts_file is not None:
        prompts += read_prompts(args.prompts_file)
    prompts = prompts or list(DEFAULT_PROMPTS)
    asked = as_asked(prompts, [open_image(file) for file in args.image], args.chat)
    params = params_of(args)
    with make_llm(args) as llm:
        start = time.perf_counter()
        if args.json:
            outputs = llm.chat(asked, params) if args.chat else llm.generate(asked, params)
            for output in outputs:
                print(json.dumps(as_json(output)), flush=True)
        else:
            updates = llm.stream_chat(asked, params) if args.chat else llm.stream(asked, params)
            outputs = show(updates, prompts, params.n, args.chat)
        report(outputs, time.perf_counter() - start)
    return 1 if any(c.finish_reason == "error" for output in outputs for c in output.outputs) else 0


def transcribe(args: argparse.Namespace) -> int:
    """Says what is said in sound, and when."""
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


def follow(args: argparse.Namespace) -> int:
    """Any process but 0: serves that one until it ends. It makes a model for each that process 0 makes."""
    for _ in modes(args):
        with make_llm(args) as llm:
            llm.follow()
    return 0


def modes(args: argparse.Namespace) -> tuple[bool, ...]:
    """Whether sharing and prefix reuse are on, for each model that is made."""
    return (True, False) if args.samples and args.compare else (True,)


def as_asked(prompts: Sequence[str], images: Sequence[Any], chat: bool) -> list[Any]:
    """Prompts, or conversations of one message each, as `LLM` takes them, with the images of each."""
    if not chat:
        return [{"prompt": text, "multi_modal_data": {"image": list(images)}} if images else text for text in prompts]
    parts = [{"type": "image", "image": image} for image in images]
    return [
        [{"role": "user", "content": [*parts, {"type": "text", "text": text}] if images else text}] for text in prompts
    ]


def open_image(file: Path) -> Any:
    """The image of a file, upright.

    Raises:
        ValueError: it cannot be read, or Pillow is missing.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ValueError("--image needs Pillow: pip install 'jaxinfer[vision]'") from error
    try:
        return ImageOps.exif_transpose(Image.open(file))
    except Exception as error:  # of many kinds: a file that is none, or broken
        raise ValueError(f"--image {file}: {getattr(error, 'strerror', None) or error}") from error


def show(
    updates: Iterable[RequestOutput], prompts: Sequence[str], n: int, chat: bool
) -> list[RequestOutput]:
    """Prints each prompt with its continuation as it is made. All run at once; what is not in turn yet waits."""
    printer = Printer(prompts, n, chat)
    for update in updates:
        printer.take(update)
    return printer.results()


class Printer:
    """Prints texts in the order of their prompts, the one in turn as it grows."""

    def __init__(self, prompts: Sequence[str], n: int, chat: bool):
        self._prompts, self._n, self._chat = prompts, n, chat
        self._last: dict[str, RequestOutput] = {}
        self._parts: dict[str, list[list[CompletionOutput]]] = {}
        self._turn = self._printed = 0

    def take(self, update: RequestOutput) -> None:
        """Keeps an update, and prints what is in turn."""
        self._last[update.request_id] = update
        parts = self._parts.setdefault(update.request_id, [[] for _ in range(self._n)])
        for part in update.outputs:
            parts[part.index].append(part)
        while self._turn < len(self._prompts):
            name = sorted(self._parts, key=int)[self._turn : self._turn + 1]
            if not name or not self._print(name[0]):
                break
            self._turn, self._printed = self._turn + 1, 0

    def _print(self, name: str) -> bool:
        """Prints what is new of the request in turn; whether that is all of it."""
        parts, done = self._parts[name], self._last[name].finished
        if not self._printed and (self._n == 1 or done):
            prompt = self._prompts[self._turn]
            shown = f"\033[1m{prompt}\033[0m" if sys.stdout.isatty() else prompt
            print(shown, end="\n" if self._chat or self._n > 1 else "")
        if self._n == 1:
            print("".join(part.text for part in parts[0][self._printed :]), end="", flush=True)
            self._printed = len(parts[0])
            if done:
                print("\n")
        elif done:
            for index, sample in enumerate(parts):
                print(f"[{index}] {''.join(part.text for part in sample).strip()}")
            print()
        return done

    def results(self) -> list[RequestOutput]:
        """Every request with all its tokens."""
        whole = []
        for name in sorted(self._parts, key=int):
            outputs = [
                replace(sample[-1], token_ids=[token for part in sample for token in part.token_ids])
                for sample in self._parts[name]
            ]
            whole.append(replace(self._last[name], outputs=outputs))
        return whole


def as_json(output: RequestOutput) -> dict[str, Any]:
    """What --json prints of a request."""
    return {
        "prompt_token_ids": list(output.prompt_token_ids),
        "outputs": [
            {"index": c.index, "token_ids": list(c.token_ids), "text": c.text, "finish_reason": c.finish_reason}
            for c in output.outputs
        ],
        "num_cached_tokens": output.num_cached_tokens,
    }


def report(outputs: Sequence[RequestOutput], seconds: float) -> None:
    """Speed and memory, on stderr: prompts until the last first token, generation from the first token on."""
    timed = [o.metrics for o in outputs if o.metrics is not None and o.metrics.first_token_time is not None]
    prompt = sum(len(o.prompt_token_ids) for o in outputs)
    made = sum(len(c.token_ids) for o in outputs for c in o.outputs)
    if timed:
        start = min(m.arrival_time for m in timed)
        reading = max(m.first_token_time for m in timed) - start
        writing = max(m.finished_time for m in timed) - min(m.first_token_time for m in timed)
        rates = f"prompt: {prompt / max(reading, 1e-9):.1f} tok/s, generation: {made / max(writing, 1e-9):.1f} tok/s"
    else:
        rates = "nothing was generated"
    print(
        f"{rates} ({prompt} + {made} tokens in {seconds:.1f} s, compilation included); peak memory: {peak_memory()}",
        file=sys.stderr,
    )


def peak_memory() -> str:
    """Of the host process, and of the device where it is another."""
    import jax

    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    text = f"{host / 2**30:.2f} GiB host"
    stats = jax.devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    return text if peak is None else f"{text}, {peak / 2**30:.2f} GiB {jax.devices()[0].platform}"


def compare(args: argparse.Namespace) -> int:
    """The sanity run of transformers' PR #42877: built-in questions, with sharing and prefix reuse on and off."""
    questions = demo.sample_questions()[: args.samples]
    prefix = demo.shared_prefix() if args.add_prefix else ""
    messages = [
        ([{"role": "system", "content": prefix}] if prefix else []) + [{"role": "user", "content": question}]
        for question, _ in questions
    ]
    params, runs = params_of(args), []
    for on in modes(args):
        with make_llm(args, enable_prefix_caching=on, enable_block_sharing=on) as llm:
            llm.chat(messages, params, use_tqdm=False)  # compiles
            llm.reset_prefix_cache()
            llm.chat(messages[0], params, use_tqdm=False)  # puts the prefix into the cache
            start = time.perf_counter()
            outputs = llm.chat(messages, params)
            runs.append((outputs, time.perf_counter() - start))
    print_comparison(questions, runs)
    return 0


def print_comparison(questions: Sequence[tuple[str, str]], runs: Sequence[tuple[list[RequestOutput], float]]) -> None:
    """Both outputs of every question side by side, the differences and the hits."""
    different = correct = 0
    for i, (question, answer) in enumerate(questions):
        columns = [" | ".join(c.text.strip() for c in outputs[i].outputs) for outputs, _ in runs]
        same = len(set(columns)) == 1
        different += not same
        correct += answer.lower() in columns[0].lower()
        hit = runs[0][0][i].num_cached_tokens
        print(f"{i + 1:2d}. {question}  [{hit} of {len(runs[0][0][i].prompt_token_ids)} prompt tokens from the cache]")
        for name, column in zip(("on ", "off"), columns):
            print(f"    {name} {column}")
        if not same:
            print("    ^ they differ")
    hits, asked = (sum(values) for values in zip(*[
        (o.num_cached_tokens, len(o.prompt_token_ids)) for o in runs[0][0]
    ]))  # fmt: skip
    print(f"\n{correct} of {len(questions)} answers as expected; {hits} of {asked} prompt tokens from the cache")
    if len(runs) > 1:
        print(f"{different} of {len(questions)} differ between sharing on and off")
    for name, (outputs, seconds) in zip(("on", "off"), runs):
        made = sum(len(c.token_ids) for o in outputs for c in o.outputs)
        print(f"sharing {name}: {made / seconds:.1f} tok/s generated")


if __name__ == "__main__":
    sys.exit(main())
