"""`scripts/bench.py speculative` without a model: what is compiled and run before the passes that are measured."""

from types import SimpleNamespace

import pytest
from benchmarks import speculative

COUNTERS = ("drafts", "draft_tokens", "accepted_tokens")


class FakeLLM:
    """Engine of which each call counts a draft; with drafts, the first call of a prompt accepts no token."""

    def __init__(self, model, speculative_config=None, **settings):
        self.drafts, self.calls, self.counts = speculative_config, [], dict.fromkeys(COUNTERS, 0)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def warmup(self, *, sampling, use_tqdm):
        assert not self.calls, "compiled before the first request"
        self.calls.append(("warmup", *sampling))

    def generate(self, prompt, params, use_tqdm):
        assert self.calls[:1] == [("warmup", "greedy")]
        wrong = self.drafts is not None and prompt not in self.calls
        self.calls.append(prompt)
        for name, more in zip(COUNTERS, (1, 4, 0 if wrong else 3), strict=True):
            self.counts[name] += more
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[7 if wrong else 5] * params.max_tokens)])]

    def get_metrics(self):
        return [SimpleNamespace(name=f"jaxinfer:spec_decode_num_{k}", value=v) for k, v in self.counts.items()]


def test_compilation_and_the_first_pass_are_not_measured(monkeypatch):
    monkeypatch.setattr(speculative, "LLM", FakeLLM)
    figures = speculative.measure("DIR", speculative.Work(new=8, repeats=3), {})
    for kind in speculative.KINDS:
        assert figures[f"accepted@{kind}"] == pytest.approx(3 / 4)
        assert figures[f"made_per_step@{kind}"] == 4
        assert figures[f"equal@{kind}"] == 1
        assert figures[f"drafted_over_plain@{kind}"] > 0
