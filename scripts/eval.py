#!/usr/bin/env python
"""Measure a model's accuracy on the questions of a file, or its perplexity on a text.

    python scripts/eval.py --model DIR --questions FILE --shots 5
    python scripts/eval.py --questions demo     # of the packaged checkpoint
    python scripts/eval.py --model DIR --perplexity text.txt --quantization int8

The questions file has one JSON object per line with "question" and "answer", as in GSM8K (arXiv:2110.14168). Decoding
is greedy. If the answer contains "#### 72", a response is correct if its number equals that one: the number after its
last "####", else its last number (commas, dollar signs and trailing zeros after the decimal point are ignored).
Any other answer must equal the response, apart from surrounding white space.

Perplexity is computed over consecutive windows of `--window` tokens, each token conditioned on the tokens before it in
its window.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import perplexity

from jaxinfer import LLM, SamplingParams, demo
from jaxinfer._utils.checks import QUANTIZATIONS
from jaxinfer.commands.exit_status import status_of
from jaxinfer.commands.help import Paragraphs
from jaxinfer.commands.overrides import add_hf_overrides

MARK = "####"
DEMO = "demo"
NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")
STOP = ["\nQuestion:"]
"""Stop string at which a base model starts to write the next question."""


@dataclass(frozen=True)
class Question:
    """Question and reference answer from one line of the file."""

    question: str
    answer: str

    @property
    def prompt(self) -> str:
        """Return the prompt text that the answer continues."""
        return f"Question: {self.question}\nAnswer:"

    def is_right(self, said: str) -> bool:
        """Return whether a model's text counts as the correct answer."""
        if MARK not in self.answer:
            return said.strip() == self.answer.strip()
        return number(said) == number(self.answer)


@dataclass(frozen=True)
class Result:
    """Accuracy and timing of an evaluation."""

    accuracy: float
    right: int
    questions: int
    cut_off: int
    """Number of answers truncated at `--max-tokens`."""
    seconds: float


def number(text: str) -> Decimal | None:
    """Extract the number after the last "####", else the last number of the text; None if there is none."""
    marked = MARK in text
    found = NUMBER.findall(text.rpartition(MARK)[2] if marked else text)
    return Decimal(re.sub(r"[,$]", "", found[0 if marked else -1])) if found else None


def read(name: str, limit: int | None) -> list[Question]:
    """Read at most `limit` questions from a file, or from the packaged checkpoint's held-out set.

    Raises:
        ValueError: the file cannot be read, or a line is malformed; names file, line and field.
    """
    if name == DEMO:
        return [Question(one.text, one.answer) for one in demo.heldout_questions(limit or 400)]
    try:
        lines = Path(name).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--questions {name}: {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}") from error
    found = [_line(name, place, line) for place, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise ValueError(f"--questions {name} has no question in it; write one JSON object a line")
    return found[:limit]


def _line(name: str, place: int, line: str) -> Question:
    where = f"--questions {name}, line {place}"
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    for field in ("question", "answer"):
        if not isinstance(value, dict) or not isinstance(value.get(field), str) or not value[field].strip():
            raise ValueError(f'{where}: "{field}" must be text; a line is {{"question": "...", "answer": "..."}}')
    if MARK in value["answer"] and number(value["answer"]) is None:
        raise ValueError(f'{where}: "answer" has no number behind {MARK}, got {value["answer"][-80:]!r}')
    return Question(value["question"], value["answer"])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    args = parse(argv)
    return status_of(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Run the requested evaluation and print its result."""
    if args.perplexity is not None:
        return run_perplexity(args)
    questions = read(args.questions, None if args.limit is None else args.limit + args.shots)
    if len(questions) <= args.shots:
        raise ValueError(
            f"--shots {args.shots} takes the first lines as examples, but there are {len(questions)}; ask for fewer"
        )
    result = ask(args, questions[: args.shots], questions[args.shots :])
    if args.json:
        print_json(args, result)
    else:
        cut = f", {result.cut_off} cut off by --max-tokens {args.max_tokens}" if result.cut_off else ""
        print(
            f"accuracy {result.accuracy:.4f} ({result.right} of {result.questions} right{cut}) in {result.seconds:.1f} "
            "s"
        )
    return 0


def run_perplexity(args: argparse.Namespace) -> int:
    """Measure the perplexity on the text of a file and print it."""
    text = perplexity.read(args.perplexity)
    with LLM(args.model or demo.path(), **settings(args), use_tqdm=False) as llm:
        result = perplexity.measure(llm, text, args.window)
    if args.json:
        print_json(args, result)
    else:
        print(f"perplexity {result.perplexity:.4f} ({result.tokens} tokens scored) in {result.seconds:.1f} s")
    return 0


def print_json(args: argparse.Namespace, result: Result | perplexity.Perplexity) -> None:
    """Print a result and the settings it was measured with as one JSON object."""
    given = {name: value for name, value in vars(args).items() if name not in ("json", "wrong")}
    print(json.dumps(asdict(result) | {"settings": given}))


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the model and engine settings of the command line."""
    return dict(
        dtype=args.dtype,
        quantization=args.quantization,
        max_model_len=args.max_model_len,
        tensor_parallel_size=args.tensor_parallel_size,
        fuse_projections=args.fuse_projections,
        hf_overrides=args.hf_overrides,
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Paragraphs)
    add = parser.add_argument
    add("--model", help="a checkpoint's directory, GGUF file or Hub id, or smollm2; by default the packaged one")
    work = parser.add_mutually_exclusive_group(required=True)
    work.add_argument("--questions", metavar="FILE", help=f"a JSON object a line, or {DEMO!r}")
    work.add_argument("--perplexity", metavar="FILE", help="print the perplexity on this UTF-8 text instead")
    add(
        "--window",
        type=int,
        default=perplexity.WINDOW,
        metavar="N",
        help="tokens of a window of --perplexity's text (default: %(default)s)",
    )
    add("--limit", type=int, metavar="N", help=f"ask the first N; by default all (of {DEMO!r} 400)")
    add(
        "--shots",
        type=int,
        default=0,
        metavar="N",
        help="put the first N before each of the others, with their answers",
    )
    add("--chat", action="store_true", help="put questions through the chat template")
    add("--max-tokens", type=int, default=256, help="of an answer (default: %(default)s)")
    add(
        "--fuse-projections",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compute projections of one input as one matrix product",
    )
    add("--tensor-parallel-size", type=int, default=1, metavar="N", help="devices (default: %(default)s)")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    add("--quantization", choices=QUANTIZATIONS, metavar="METHOD", help=", ".join(QUANTIZATIONS))
    add("--max-model-len", type=int, default=None)
    add_hf_overrides(parser)
    add("--wrong", type=int, default=0, metavar="N", help="show the first N wrong answers, on stderr")
    add("--json", action="store_true", help="one object with the result and the settings")
    args = parser.parse_args(argv)
    for name, least in (("limit", 1), ("shots", 0), ("max_tokens", 1), ("wrong", 0), ("window", 2)):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    return args


def ask(args: argparse.Namespace, shots: Sequence[Question], questions: Sequence[Question]) -> Result:
    """Generate answers to all questions and score them."""
    params = SamplingParams(temperature=0, max_tokens=args.max_tokens, stop=None if args.chat else STOP)
    with LLM(args.model or demo.path(), **settings(args), use_tqdm=False) as llm:
        start = time.perf_counter()
        if args.chat:
            turns = [turn for shot in shots for turn in (_said("user", shot.question), _said("assistant", shot.answer))]
            outputs = llm.chat([[*turns, _said("user", one.question)] for one in questions], params, use_tqdm=False)
        else:
            before = "".join(f"{shot.prompt} {shot.answer}\n\n" for shot in shots)
            outputs = llm.generate([before + one.prompt for one in questions], params, use_tqdm=False)
        seconds = time.perf_counter() - start
    answers = [output.outputs[0] for output in outputs]
    wrong = [(one, made.text) for one, made in zip(questions, answers, strict=True) if not one.is_right(made.text)]
    for one, text in wrong[: args.wrong]:
        print(f"{one.question!r}: {text!r}, not {one.answer!r}", file=sys.stderr)
    right = len(questions) - len(wrong)
    cut_off = sum(made.finish_reason == "length" for made in answers)
    return Result(right / len(questions), right, len(questions), cut_off, seconds)


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


if __name__ == "__main__":
    sys.exit(main())
