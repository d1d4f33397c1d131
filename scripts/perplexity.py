"""Measure a model's perplexity on a text with `prompt_logprobs`, over consecutive windows without overlap."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

from jaxinfer import LLM, SamplingParams

WINDOW = 1024
"""Default window size in tokens."""


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of a model on a text."""

    perplexity: float
    """exp of the mean negative log-probability of the scored tokens."""
    tokens: int
    """Number of scored tokens: all except those that start a window without a BOS token."""
    windows: int
    seconds: float


def read(name: str) -> str:
    """Read a text file.

    Raises:
        ValueError: the file cannot be read or is empty.
    """
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--perplexity {name}: {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}"
        ) from error
    if not text.strip():
        raise ValueError(f"--perplexity {name} has no text in it")
    return text


def measure(llm: LLM, text: str, window: int = WINDOW) -> Perplexity:
    """Compute the perplexity of a text, conditioning each token on the tokens before it in its window.

    A window starts with the BOS token if the tokenizer adds one. It needs room for one more token, which generation
    appends.

    Args:
        llm: model with a tokenizer.
        text: text to score; its tokens are divided into windows without overlap.
        window: tokens of the text in each window, at least 2.

    Raises:
        ValueError: the text has no token to score, or a window exceeds the model's maximum length.
    """
    tokenizer = llm.get_tokenizer()
    start = tokenizer("").input_ids[:1]
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    prompts = [[*start, *tokens[at : at + window]] for at in range(0, len(tokens), window)]
    prompts = [{"prompt_token_ids": prompt} for prompt in prompts if len(prompt) > 1]
    if not prompts:
        raise ValueError(f"the text has {len(tokens)} tokens, too few to score one; give a longer text")
    began = time.perf_counter()
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    found = [
        row[token].logprob
        for output in outputs
        for token, row in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    ]
    mean = -math.fsum(found) / len(found)
    return Perplexity(math.exp(mean), len(found), len(prompts), time.perf_counter() - began)
