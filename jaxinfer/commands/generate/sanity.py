"""Run the sanity check of transformers' PR #42877: built-in questions with block sharing and prefix caching on and
off.
"""

import time
from collections.abc import Callable, Sequence

from jaxinfer import demo
from jaxinfer.llm import LLM
from jaxinfer.outputs import RequestOutput
from jaxinfer.sampling_params import SamplingParams

Runs = Sequence[tuple[list[RequestOutput], float]]
"""Answers of each mode, with the seconds they took."""


def compare(
    make_llm: Callable[[bool], LLM], modes: Sequence[bool], count: int, params: SamplingParams, *, prefix: bool
) -> None:
    """Answer `count` questions with sharing on and off as in `modes`; `prefix` prepends a common text to all of
    them.
    """
    questions = demo.sample_questions()[:count]
    system = [{"role": "system", "content": demo.shared_prefix()}] if prefix else []
    messages = [[*system, {"role": "user", "content": question}] for question, _ in questions]
    runs = []
    for on in modes:
        with make_llm(on) as llm:
            llm.chat(messages, params, use_tqdm=False)  # warm-up: compiles the steps
            llm.reset_prefix_cache()
            llm.chat(messages[0], params, use_tqdm=False)  # fills the prefix cache
            start = time.perf_counter()
            outputs = llm.chat(messages, params)
            runs.append((outputs, time.perf_counter() - start))
    print_comparison(questions, runs)


def print_comparison(questions: Sequence[tuple[str, str]], runs: Runs) -> None:
    """Print both outputs of every question side by side, with the differences and the prefix cache hits."""
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
    hits, asked = (sum(values) for values in zip(*[(o.num_cached_tokens, len(o.prompt_token_ids)) for o in runs[0][0]]))
    print(f"\n{correct} of {len(questions)} answers as expected; {hits} of {asked} prompt tokens from the cache")
    if len(runs) > 1:
        print(f"{different} of {len(questions)} differ between sharing on and off")
    for name, (outputs, seconds) in zip(("on", "off"), runs):
        made = sum(len(c.token_ids) for o in outputs for c in o.outputs)
        print(f"sharing {name}: {made / seconds:.1f} tok/s generated")
