"""Command-line options and prompt inputs of `jaxinfer generate`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxinfer import demo, distributed
from jaxinfer._utils.checks import QUANTIZATIONS
from jaxinfer.commands.overrides import SPECULATIVE, add_hf_overrides


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to a parser."""
    add = parser.add_argument
    add("--model", help="a checkpoint's directory, GGUF file or Hub id, or smollm2; by default the packaged one")
    add("--prompt", action="append", default=[], help="repeatable")
    add("--prompts-file", type=Path, help="a text file with a prompt a line; blank lines are left out")
    add(
        "--image",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="repeatable: an image that every prompt is "
        "about, for a model that reads them; without --chat a prompt says <image> where it belongs",
    )
    add(
        "--audio",
        type=Path,
        action="append",
        default=[],
        metavar="FILE.wav",
        help="repeatable: an audio file of any length to transcribe with timestamps, by a speech model",
    )
    add("--language", help="with --audio: its code or name; by default it is detected")
    add("--task", choices=("transcribe", "translate"), help="with --audio: translate is into English")
    add("--max-tokens", type=int, default=None, help="by default to the end for chat and --audio, else 128")
    add("--temperature", type=float, default=0.0, help="0 is greedy (%(default)g)")
    add("--top-p", type=float, default=1.0, help="(%(default)g)")
    add("--top-k", type=int, default=0, help="0 is all tokens (%(default)s)")
    add("--seed", type=int, default=None, help="by default one that is the same for every run")
    add("--n", type=int, default=1, help="samples a prompt")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    add("--quantization", default=None, choices=QUANTIZATIONS, metavar="METHOD", help=", ".join(QUANTIZATIONS))
    add("--max-model-len", type=int, default=None)
    add_hf_overrides(parser)
    add("--speculative-config", **SPECULATIVE)
    add("--tensor-parallel-size", type=int, default=None, help="by default 1, or all devices of several processes")
    add(
        "--coordinator",
        metavar="HOST:PORT",
        help="run this on several machines: where process 0 listens, the same on all",
    )
    add("--num-processes", type=int, help="with --coordinator: how many there are, one a machine")
    add(
        "--process-id",
        type=int,
        help="with --coordinator: this one's number; 0 takes the prompts, the others end with it",
    )
    add(
        "--peer-timeout",
        type=float,
        default=distributed.PEER_TIMEOUT,
        metavar="SECONDS",
        help="with --coordinator: how soon a process that has died or hangs ends all of them",
    )
    add("--chat", action="store_true", help="put each prompt through the chat template")
    add("--chat-template", type=Path, metavar="FILE", help="with --chat: Jinja source instead of the model's")
    add("--json", action="store_true", help="one object a request on stdout, everything else on stderr")
    add("--samples", type=int, default=0, metavar="N", help="ask N built-in questions (at most 20)")
    add("--add-prefix", action="store_true", help="with --samples: put a shared prefix before each question")
    add("--compare", action="store_true", help="with --samples: side by side without sharing")


def finish(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse options that contradict each other, and derive those that follow from others."""
    check(parser, args)
    args.chat |= args.samples > 0 or (args.model is None and not args.prompt and args.prompts_file is None)


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other."""
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
        parser.error(
            "--audio is transcribed, window by window: no --prompt, --prompts-file, --image, --chat, --samples or --n"
        )
    if args.audio and not args.model:
        parser.error("--audio needs --model, one that transcribes")
    if not args.audio and (args.language or args.task):
        parser.error("--language and --task go with --audio")
    if any(not prompt for prompt in args.prompt):
        parser.error("--prompt is empty; write what the model is to continue")
    if args.chat_template is not None and not (args.chat or args.samples):
        parser.error("--chat-template goes with --chat")
    if args.model == "":
        parser.error("--model is empty; leave it out for the packaged checkpoint")


def read_prompts(file: Path) -> list[str]:
    """Read the non-blank lines of a file as prompts.

    Raises:
        ValueError: the file cannot be read, is not UTF-8, or has no prompt.
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


def as_inputs(prompts: Sequence[str], images: Sequence[Any], chat: bool) -> list[Any]:
    """Build `LLM` inputs: prompts, or one-message conversations, each with its images."""
    if not chat:
        return [{"prompt": text, "multi_modal_data": {"image": list(images)}} if images else text for text in prompts]
    parts = [{"type": "image", "image": image} for image in images]
    return [
        [{"role": "user", "content": [*parts, {"type": "text", "text": text}] if images else text}] for text in prompts
    ]


def open_image(file: Path) -> Any:
    """Open an image and apply its EXIF orientation.

    Raises:
        ValueError: the file cannot be read, or Pillow is missing.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ValueError("--image needs Pillow: pip install 'jaxinfer[vision]'") from error
    try:
        return ImageOps.exif_transpose(Image.open(file))
    except Exception as error:  # Pillow raises errors of many types for unreadable and broken files
        raise ValueError(f"--image {file}: {getattr(error, 'strerror', None) or error}") from error
