"""Measure what structured output costs (`bench.py structured`): a schema of its own for each of the rows.

The same prompts are continued by as many tokens with a JSON schema each and freely, in turns. The schemas require more
items than the tokens suffice for, so that no row ends early. Reported, as medians over the passes:

- free_tokens_per_second, structured_tokens_per_second, and their ratio as `structured_over_free`.
- bubble: share of the pass that the device has logits and no masks to sample with. A thread notes when the logits of
  each step are there.
- mask_ms: the host's time for the masks of a step, most of which passes while the device computes the logits.
- compile_ms: time to compile one schema.
"""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from jaxinfer import LLM, SamplingParams

PROMPT = "Write a list of people with their names, ages and hobbies as JSON.\n"


@dataclass(frozen=True)
class Work:
    """Sizes of a pass."""

    rows: int
    new: int
    """New tokens of each row."""
    repeats: int


def schema(row: int) -> dict[str, Any]:
    """Return the schema of a row; no two are equal."""
    person = {
        "type": "object",
        "properties": {
            f"name{row}": {"type": "string", "maxLength": 30},
            "age": {"type": "integer", "minimum": 0, "maximum": 100 + row},
            "hobby": {"enum": ["chess", "sailing", "music"]},
            "born": {"type": "string", "format": "date"},
            "parent": {"anyOf": [{"$ref": "#/$defs/person"}, {"type": "null"}]},
        },
        "required": [f"name{row}", "age", "hobby"],
        "additionalProperties": False,
    }
    return {"type": "array", "items": {"$ref": "#/$defs/person"}, "minItems": 500, "$defs": {"person": person}}


class Waits:
    """Seconds that the device had the logits of a step and waited for its masks."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def watch(self, runner: Any) -> Iterator[None]:
        """Measure every pending decode step while the context lasts."""
        plain = runner.sample_pending

        def sample(flight: Any) -> None:
            if flight.pending is None:
                plain(flight)
                return
            ready: list[float] = []
            logits = runner.logits.values
            thread = threading.Thread(target=lambda: ready.append(_when_ready(logits)))
            thread.start()
            plain(flight)
            dispatched = time.perf_counter()
            thread.join()
            self.seconds += max(0.0, dispatched - ready[0])

        runner.sample_pending = sample
        try:
            yield
        finally:
            del runner.sample_pending


def _when_ready(array: Any) -> float:
    array.block_until_ready()
    return time.perf_counter()


def measure(model: str, work: Work, settings: dict[str, Any]) -> dict[str, float]:
    """Run the passes and return the figures."""
    own = dict(max_num_seqs=work.rows, max_model_len=256 + work.new, use_tqdm=False) | settings
    with LLM(model, **own) as llm:
        runner = llm._engine.runner
        common = dict(temperature=0.7, max_tokens=work.new, ignore_eos=True)
        each = [f"{row}. {PROMPT}" for row in range(work.rows)]
        free = [SamplingParams(**common, seed=row) for row in range(work.rows)]
        texts = [json.dumps(schema(row)) for row in range(work.rows)]
        started = time.perf_counter()
        bound = [
            SamplingParams(**common, seed=row, structured_outputs={"json": text}) for row, text in enumerate(texts)
        ]
        llm._input_processor.requests(llm._input_processor.parse(each), bound)
        compiled = time.perf_counter() - started
        found: dict[str, list[float]] = {"free": [], "structured": [], "bubble": [], "mask_ms": [], "late": []}
        for turn in range(work.repeats + 1):  # the first compiles
            for name, params in (("free", free), ("structured", bound)):
                waits, steps, seconds = Waits(), runner.masked_steps, runner.mask_seconds
                late, began = runner.late_masks, time.perf_counter()
                with waits.watch(runner):
                    outputs = llm.generate(each, params, use_tqdm=False)
                elapsed = time.perf_counter() - began
                if not turn:
                    continue
                made = sum(len(o.outputs[0].token_ids) for o in outputs)
                found[name].append(made / elapsed)
                if name == "structured":
                    assert all(o.outputs[0].finish_reason == "length" for o in outputs)
                    count = runner.masked_steps - steps
                    found["bubble"].append(waits.seconds / elapsed)
                    found["mask_ms"].append((runner.mask_seconds - seconds) / count * 1e3)
                    found["late"].append((runner.late_masks - late) / count)
        ratios = np.divide(found["structured"], found["free"]).tolist()
        return {
            "free_tokens_per_second": median(found["free"]),
            "structured_tokens_per_second": median(found["structured"]),
            "structured_over_free": median(ratios),
            "bubble": median(found["bubble"]),
            "mask_ms": median(found["mask_ms"]),
            "late_steps": median(found["late"]),
            "compile_ms": compiled / work.rows * 1e3,
        }
