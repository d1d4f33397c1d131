"""Random calls, dropped streams, aborts and pauses on several threads while programs are compiled: answers are right.

`JAXINFER_SOAK_SECONDS` sets how long it lasts.
"""

import os
import random
import threading
import time

import pytest
from support.compiling import Gate

from jaxinfer import SamplingParams

pytestmark = [pytest.mark.xdist_group("faults"), pytest.mark.slow]

SECONDS = float(os.environ.get("JAXINFER_SOAK_SECONDS", 3))
MOST_SECONDS = SECONDS + 300
"""On a busy machine it lasts longer, until something was checked and compiled."""
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
OTHERS = (
    SamplingParams(temperature=0.7, seed=1, n=3, max_tokens=6),
    SamplingParams(temperature=0, max_tokens=9, min_tokens=3, presence_penalty=0.5),
)
PROMPTS = [[3 + (7 * i + 3 * j) % 40 for j in range(length)] for i, length in enumerate((2, 5, 7, 12, 20, 31, 40, 60))]
CALLERS = 4


class Soak:
    """The calls of several threads to one LLM."""

    def __init__(self, llm, gate, expected):
        self.llm, self.gate, self.expected = llm, gate, expected
        self.began = time.monotonic()
        self.checked = self.compiled = 0
        self.errors = []

    def going(self):
        """Return whether to go on."""
        return not self.errors and (time.monotonic() < self.began + SECONDS or not (self.checked and self.compiled))

    def call(self, seed):
        """Make calls and streams, some of them dropped or aborted half-way."""
        rng = random.Random(seed)
        while self.going():
            chosen = [rng.randrange(len(PROMPTS)) for _ in range(rng.choice((1, 1, 2, 4)))]
            params = [GREEDY if rng.random() < 0.7 else rng.choice(OTHERS) for _ in chosen]
            prompts = [PROMPTS[i] for i in chosen]
            if rng.random() < 0.5:
                for i, own, output in zip(
                    chosen, params, self.llm.generate(prompts, params, use_tqdm=False), strict=True
                ):
                    if own is GREEDY:
                        self.check(i, output.outputs[0])
                continue
            most = rng.choice((1000, 3, 10))
            for count, output in enumerate(self.llm.stream(prompts, params)):
                if rng.random() < 0.02:
                    self.llm.abort([output.request_id])
                if count == most:
                    break

    def check(self, i, output):
        """Compare a greedy answer; one that was aborted has no reason to."""
        assert output.finish_reason == "length" and output.token_ids == self.expected[i], PROMPTS[i]
        self.checked += 1

    def compile(self, seed):
        """End compilations after a while, and have programs vanish."""
        rng = random.Random(seed)
        while self.going():
            time.sleep(0.02 * rng.random())
            if rng.random() < 0.3 and self.gate.pending:
                self.gate.release(key=rng.choice(list(self.gate.pending)))
                self.compiled += 1
            if rng.random() < 0.1:
                self.gate.ready.clear()

    def pause(self, seed):
        """Pause and resume."""
        rng = random.Random(seed)
        while self.going():
            time.sleep(0.5 * rng.random())
            self.llm.pause("keep")
            self.llm.resume(recompute=rng.random() < 0.5)

    def run(self, seed):
        """Run all threads to their end."""
        jobs = [*[(self.call, seed + i) for i in range(CALLERS)], (self.compile, seed), (self.pause, seed)]
        threads = [threading.Thread(target=self._guard, args=job) for job in jobs]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            if not self.going():
                self.gate.release()
            time.sleep(0.01)
            assert time.monotonic() < self.began + MOST_SECONDS, f"it hangs: {self.checked=}, {self.compiled=}"

    def _guard(self, function, seed):
        try:
            function(seed)
        except BaseException as error:
            self.errors.append(error)


def test_random_operations_while_programs_are_compiled(make_llm, monkeypatch):
    with make_llm(decode_buckets=(2, 8), prefill_buckets=(8, 32), pool_blocks=80) as llm:
        expected = [llm.generate([ids], GREEDY, use_tqdm=False)[0].outputs[0].token_ids for ids in PROMPTS]
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        missing = random.Random(0)
        gate = Gate(llm._engine.runner.programs, lambda key: missing.random() < 0.02, substitutes=True)
        monkeypatch.setattr(llm._engine.runner, "programs", gate)
        soak = Soak(llm, gate, expected)
        soak.run(0)
        assert not soak.errors, soak.errors
        print(f"{soak.checked} answers checked, {soak.compiled} compilations")
        assert soak.checked and soak.compiled
        gate._chosen = lambda key: False
        llm._thread.run(llm._engine.settle)
        assert llm._thread.run(lambda: int(llm._engine.manager.pool.num_held)) == 0
