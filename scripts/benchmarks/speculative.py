"""Measure speculative decoding against decoding one token at a time (`bench.py speculative`), in turns, greedily.

`--set 'speculative_config={"method": "draft_model", "model": "DIR"}'` drafts with a model instead of prompt lookup.
Both engines compile all programs first, as nothing is drafted while a program is missing, and a first pass of each kind
of prompt is not measured. Three kinds of prompts: a text that has been repeated and goes on so (`repeated`), code that
resembles code before it (`code`), and prose, which holds nothing to look up (`prose`). Reported for each kind, as
medians over the passes:

- plain_tokens_per_second, drafted_tokens_per_second, and their ratio as `drafted_over_plain`.
- accepted: share of the drafted tokens that were right; `made_per_step`: tokens that a step with a draft made.
- equal: share of the outputs that are the same. In bfloat16 a step that verifies rounds otherwise than a decode step.
"""

import time
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from jaxinfer import LLM, SamplingParams

SENTENCE = "The quick brown fox jumps over the lazy dog, and the dog barks at the moon all night long. "
CODE = '''def {name}(a, b):
    """Return the {word} of two numbers."""
    result = a {sign} b
    print("the {word} is", result)
    return result


'''
OPERATIONS = (("add", "sum", "+"), ("subtract", "difference", "-"), ("multiply", "product", "*"))
KINDS = {
    "repeated": SENTENCE * 6,
    "code": "".join(CODE.format(name=n, word=w, sign=s) for n, w, s in OPERATIONS) + "def divide(a, b):\n",
    "prose": "Once upon a time, in a village far away between the mountains and the sea, there lived",
}


@dataclass(frozen=True)
class Work:
    """Sizes of a pass."""

    new: int
    """New tokens of each prompt, which run one after another."""
    repeats: int


def measure(model: str, work: Work, settings: dict[str, Any]) -> dict[str, float]:
    """Run the passes and return the figures by kind of prompt; drafts are made as `speculative_config` says."""
    own = dict(max_num_seqs=1, max_model_len=512 + work.new, use_tqdm=False, enable_prefix_caching=False)
    settings = dict(settings)
    drafted = {"speculative_config": settings.pop("speculative_config", {"method": "ngram"})}
    figures: dict[str, float] = {}
    with LLM(model, **own | settings) as plain, LLM(model, **own | drafted | settings) as drafting:
        for llm in (plain, drafting):
            llm.warmup(sampling=["greedy"], use_tqdm=False)
        for kind, prompt in KINDS.items():
            figures |= {f"{name}@{kind}": value for name, value in _compare(plain, drafting, prompt, work).items()}
    return figures


def _compare(plain: LLM, drafting: LLM, prompt: str, work: Work) -> dict[str, float]:
    """Return the figures of one kind of prompt."""
    params = SamplingParams(temperature=0, max_tokens=work.new, ignore_eos=True)
    engines = {"plain": plain, "drafted": drafting}
    for llm in engines.values():
        _decode(llm, prompt, params)
    rates: dict[str, list[float]] = {name: [] for name in engines}
    outputs: dict[str, list[tuple[int, ...]]] = {name: [] for name in engines}
    before = _counters(drafting)
    for _ in range(work.repeats):
        for name, llm in engines.items():
            seconds, tokens = _decode(llm, prompt, params)
            outputs[name].append(tokens)
            rates[name].append(len(tokens) / seconds)
    drafts, drafted, accepted = (now - then for now, then in zip(_counters(drafting), before, strict=True))
    return {
        "plain_tokens_per_second": median(rates["plain"]),
        "drafted_tokens_per_second": median(rates["drafted"]),
        "drafted_over_plain": median(a / b for a, b in zip(rates["drafted"], rates["plain"], strict=True)),
        "accepted": accepted / max(1, drafted),
        "made_per_step": 1 + accepted / max(1, drafts),
        "equal": fmean(a == b for a, b in zip(outputs["plain"], outputs["drafted"], strict=True)),
    }


def _decode(llm: LLM, prompt: str, params: SamplingParams) -> tuple[float, tuple[int, ...]]:
    """Return the seconds of a request, its prefill included, and its tokens."""
    began = time.perf_counter()
    [output] = llm.generate(prompt, params, use_tqdm=False)
    return time.perf_counter() - began, tuple(output.outputs[0].token_ids)


def _counters(llm: LLM) -> tuple[float, ...]:
    values = {metric.name.partition(":")[2]: metric.value for metric in llm.get_metrics()}
    return tuple(values[f"spec_decode_num_{name}"] for name in ("drafts", "draft_tokens", "accepted_tokens"))
