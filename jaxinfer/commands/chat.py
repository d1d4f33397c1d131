"""Chat with a model in the terminal: `jaxinfer chat`.

Each turn sends the whole conversation; with the prefix cache only the new message is computed.
"""

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxinfer._utils.checks import QUANTIZATIONS
from jaxinfer.commands.exit_status import status_of
from jaxinfer.commands.overrides import add_hf_overrides, chat_tokenizer, read_template
from jaxinfer.errors import EngineError, JaxInferError

HELP = "/clear starts a new conversation, /exit or Ctrl-D ends, Ctrl-C stops an answer."
PROMPT = "> "


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to a parser."""
    add = parser.add_argument
    add("--model", help="a checkpoint's directory, GGUF file or Hub id, or smollm2; by default the packaged one")
    add("--system", metavar="TEXT", help="system message before the conversation")
    add("--max-tokens", type=int, default=None, help="new tokens of an answer; by default up to the model's length")
    # Unset ones are the model's own defaults, those of its generation_config.json.
    add("--temperature", type=float, default=None, help="0 is greedy; by default the model's own value")
    add("--top-p", type=float, default=None, help="by default the model's own value")
    add("--top-k", type=int, default=None, help="by default the model's own value")
    add("--seed", type=int, default=None, help="makes sampled answers repeatable")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    add("--quantization", default=None, choices=QUANTIZATIONS, metavar="METHOD", help=", ".join(QUANTIZATIONS))
    add("--max-model-len", type=int, default=None, help="tokens that a conversation may have")
    add("--tensor-parallel-size", type=int, default=1, help="devices that share the weights (%(default)s)")
    add("--chat-template", type=Path, metavar="FILE", help="Jinja source to use instead of the model's")
    add_hf_overrides(parser)


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Run the command with parsed arguments and return its exit status."""
    return status_of(lambda: _run(args), parser)


def _run(args: argparse.Namespace) -> int:
    from jaxinfer import demo
    from jaxinfer.llm import LLM

    model, template = args.model or demo.path(), read_template(args.chat_template)
    with LLM(
        model,
        tokenizer=chat_tokenizer(model, template),
        dtype=args.dtype,
        quantization=args.quantization,
        max_model_len=args.max_model_len,
        max_num_seqs=1,
        tensor_parallel_size=args.tensor_parallel_size,
        chat_template=template,
        hf_overrides=args.hf_overrides,
    ) as llm:
        changes = {name: getattr(args, name) for name in ("temperature", "top_p", "top_k", "seed")}
        given = {name: value for name, value in changes.items() if value is not None}
        params = dataclasses.replace(llm.default_params, n=1, max_tokens=args.max_tokens, **given)
        return converse(lambda messages: llm.stream_chat(messages, params), args.system, sys.stdin.isatty())


def converse(answer: Callable[[list[dict[str, str]]], Iterator[Any]], system: str | None, interactive: bool) -> int:
    """Read messages from stdin and print answers until the input ends.

    A turn that fails is taken back, so that the conversation can go on.

    Args:
        answer: streams the answer to a conversation.
        system: system message, if any.
        interactive: whether a person types: prints a prompt and help, and goes on after an error.

    Returns:
        Exit status: 1 if a turn failed and the input is not interactive.
    """
    first = [] if system is None else [{"role": "system", "content": system}]
    messages, status = list(first), 0
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives `input` a history and editing
        print(HELP, file=sys.stderr)
    for text in _lines(interactive):
        if text == "/clear":
            messages = list(first)
        elif text == "/exit":
            break
        elif text == "/help":
            print(HELP, file=sys.stderr)
        else:
            messages.append({"role": "user", "content": text})
            try:
                messages.append({"role": "assistant", "content": _show(answer(messages))})
            except (JaxInferError, ValueError) as error:
                messages.pop()
                status = 1
                print(f"error: {error}", file=sys.stderr)
                if interactive:
                    print("the message was taken back; /clear starts a new conversation", file=sys.stderr)
    return 0 if interactive else status


def _lines(interactive: bool) -> Iterator[str]:
    """Yield the messages of stdin, one a line, without blank ones; Ctrl-C clears a line that is being typed."""
    while True:
        try:
            text = input(PROMPT if interactive else "").strip()
        except EOFError:
            if interactive:
                print()
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            print()
            continue
        if text:
            yield text


def _show(updates: Iterator[Any]) -> str:
    """Print an answer as it grows and return its text; Ctrl-C keeps what there is and aborts the rest.

    Raises:
        EngineError: the request ended with an error.
    """
    parts, reason = [], None
    try:
        with contextlib.closing(updates):
            for update in updates:
                [output] = update.outputs
                print(output.text, end="", flush=True)
                parts.append(output.text)
                reason = output.finish_reason
                if reason == "error":
                    raise EngineError("the answer ended because of an error of the engine, which its log describes")
    except KeyboardInterrupt:
        reason = "interrupted"
    print()
    if reason in ("length", "interrupted"):
        print(f"[{'stopped' if reason == 'interrupted' else 'the limit of tokens was reached'}]", file=sys.stderr)
    return "".join(parts)
