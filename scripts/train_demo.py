"""Train a small checkpoint on text that `jaxinfer.demo` generates, and measure it.

    python scripts/train_demo.py --out DIR      # what comes with the package
    python scripts/train_demo.py --out DIR --arch kimi_linear

Trains the tokenizer and the model, writes them to DIR, reads them back and prints the accuracy on held-out questions.

`llama`, two million parameters, is trained with torch and takes about 17 minutes of CPU time. `kimi_linear`, a hybrid
of one million with recurrent layers, MLA and experts, is trained through jaxinfer's own layers
(`jaxinfer.functional.training`) with optax, which comes with flax. Both need the extra `test`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

import transformers

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

from demos import text

from jaxinfer.commands.help import Paragraphs
from jaxinfer.demo import corpus

ARCHITECTURES = ("llama", "kimi_linear")
"""Architectures, each a module in `demos` with `Trainer`, `answers(folder, prompts, limit)` and the `LENGTHS` that
batches are padded to."""
LONGEST_ANSWER = 48


class Trainer(Protocol):
    """Interface of a model in training."""

    parameters: int

    def step(self, ids: Any, weights: Any, rate: float) -> float:
        """Train on a batch (ids and weights `[B, T]`); return the loss before the update."""

    def save(self, out: pathlib.Path) -> None:
        """Write the weights, config.json and generation_config.json."""


def rate(step: int, done: float, highest: float) -> float:
    """Return the learning rate: linear warm-up over 100 steps, constant, then linear decay to zero for `done` from
    0.3 to 1.
    """
    return highest * min((step + 1) / 100, 1.0, (1 - done) / 0.7)


def train(trainer: Trainer, source: Any, args: argparse.Namespace) -> None:
    """Train in place; the learning rate reaches zero at --steps, or earlier if --minutes runs out."""
    start, running = time.monotonic(), None
    for step in range(args.steps):
        minutes = (time.monotonic() - start) / 60
        done = max(step / args.steps, minutes / args.minutes if args.minutes else 0.0)
        if done >= 1:
            break
        loss = trainer.step(*next(source), rate(step, done, args.lr))
        running = loss if running is None else 0.98 * running + 0.02 * loss
        if step % 100 == 99:
            print(f"step {step + 1:5d}  loss {running:.4f}  {minutes:5.1f} min", flush=True)


def save(trainer: Trainer, tokenizer: transformers.PreTrainedTokenizerFast, out: pathlib.Path) -> None:
    """Write the checkpoint in a form that older transformers can read too."""
    out.mkdir(parents=True, exist_ok=True)
    trainer.save(out)
    tokenizer.save_pretrained(out)
    config = out / "tokenizer_config.json"
    settings = json.loads(config.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.write_text(json.dumps(settings, indent=2) + "\n")
    # safetensors creates files that only the owner can read, but everyone must be able to read a package.
    (out / "model.safetensors").chmod(0o644)


def evaluate(answers: Callable[..., list[list[int]]], out: pathlib.Path, n: int) -> float:
    """Print the saved checkpoint's accuracy on `n` held-out questions for every prompt form; return the mean."""
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(out)
    asked = corpus.heldout_questions(n)
    put = [text.forms(question, asked[i - 1]) for i, question in enumerate(asked)]
    prompts = [text.token_ids(tokenizer, one[form]) for form in put[0] for one in put]
    made = [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers(out, prompts, LONGEST_ANSWER)]
    shares = []
    for number, form in enumerate(put[0]):
        own = made[number * n : (number + 1) * n]
        wrong = [(q, said) for q, said in zip(asked, own, strict=True) if not q.is_correct(said)]
        shares.append(1 - len(wrong) / n)
        print(f"{form:15s} {shares[-1]:7.2%} of {n} held-out questions", flush=True)
        for question, said in wrong[:4]:
            print(f"    {question.text!r}: {said!r}, not {question.answer!r}")
    mean = sum(shares) / len(shares)
    print(f"accuracy on held-out questions: {mean:.2%}")
    return mean


def arguments() -> argparse.Namespace:
    """Parse the command line; the packaged checkpoint was trained with the defaults and `--threads 1`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Paragraphs)
    add = parser.add_argument
    add("--out", type=pathlib.Path, required=True, help="directory to write the checkpoint to")
    add("--arch", choices=ARCHITECTURES, default=ARCHITECTURES[0], help="what to train (default: %(default)s)")
    add("--steps", type=int, default=2400, help="training steps (default: %(default)s)")
    add("--minutes", type=float, help="end the training by then; the result then depends on the machine")
    add("--batch-tokens", type=int, default=2048, help="tokens in a step (default: %(default)s)")
    add("--lr", type=float, default=3e-3, help="highest learning rate (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of the text and of the weights (default: %(default)s)")
    add("--questions", type=int, default=400, help="held-out questions to ask (default: %(default)s)")
    add("--threads", type=int, default=2, help="CPU threads of torch (default: %(default)s)")
    add("--least", type=float, default=0.95, help="accuracy below which the exit status is 1 (default: %(default)s)")
    return parser.parse_args()


def main() -> int:
    """Train, save and evaluate; return 1 if the accuracy is below `--least`."""
    args = arguments()
    arch = importlib.import_module(f"demos.{args.arch}")
    tokenizer = text.build_tokenizer(args.seed)
    trainer = arch.Trainer(len(tokenizer), args.seed, args.threads)
    print(f"{trainer.parameters:,} parameters, {len(tokenizer)} tokens", flush=True)
    source = text.batches(tokenizer.backend_tokenizer, args.seed, args.batch_tokens, arch.LENGTHS)
    start = time.monotonic()
    train(trainer, source, args)
    print(f"trained in {time.monotonic() - start:.0f} s", flush=True)
    save(trainer, tokenizer, args.out)
    return 0 if evaluate(arch.answers, args.out, args.questions) >= args.least else 1


if __name__ == "__main__":
    raise SystemExit(main())
