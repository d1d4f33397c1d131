"""Run jaxinfer under measurement: one call of `LLM.generate`, or its engine with continuous arrivals."""

import time
from collections import deque
from pathlib import Path
from typing import Any

from jaxinfer.commands.bench.trace import Trace
from jaxinfer.commands.bench.work import Work
from jaxinfer.engine.metrics import PREFIX
from jaxinfer.engine.request import Request
from jaxinfer.llm import LLM
from jaxinfer.sampling_params import SamplingParams


class Offline:
    """System that submits all requests in one call of `LLM.generate`."""

    name = "jaxinfer"

    def __init__(self, folder: Path | str, settings: dict[str, Any]):
        self.settings = settings
        self.llm = LLM(folder, skip_tokenizer_init=True, use_tqdm=False, **settings)

    def run(self, work: Work) -> Trace:
        """Run one pass with an empty prefix cache."""
        prompts, params = _inputs(work)
        self.llm.reset_prefix_cache()
        start = time.perf_counter()
        results = self.llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        tokens = [list(sample.token_ids) for result in results for sample in result.outputs]
        return Trace(seconds, tokens, [0.0] * len(results), [])

    def compiled(self) -> tuple[int, float]:
        """Return the number of compiled steps so far, and their compilation time in seconds."""
        values = {metric.name.removeprefix(PREFIX): metric.value for metric in self.llm.get_metrics()}
        return int(values["compiled_steps"]), float(values["compile_seconds"])

    def close(self) -> None:
        """Release the memory."""
        self.llm.close()


class Online(Offline):
    """System with a closed loop: a new request arrives whenever one has finished.

    Uses the LLM's engine and requests directly and steps it as `LLM.generate` does. Requests can then arrive between
    steps, and token times are recorded when the host receives them, without a listener in the engine.
    """

    def run(self, work: Work) -> Trace:
        """Run one pass with an empty prefix cache."""
        engine = self.llm._engine
        engine.compile_aside(None)  # a step that waits for its programs would do nothing here
        prompts, params = _inputs(work)
        self.llm.reset_prefix_cache()
        requests = [handle.request for handle in self.llm._prepare(prompts, params)]
        waiting, running, arrivals = deque(requests), [], []
        times: dict[str, list[list[float]]] = {request.id: [[] for _ in request.sequences] for request in requests}
        start = time.perf_counter()
        while waiting or engine.has_work:
            while waiting and len(running) < work.at_once:
                running.append(waiting.popleft())
                arrivals.append(time.perf_counter() - start)
                engine.add(running[-1])
            engine.step()
            now = time.perf_counter() - start
            for request in running:
                for sequence, seen in zip(request.sequences, times[request.id], strict=True):
                    seen += [now] * (sequence.made - len(seen))
            running = [request for request in running if not request.finished]
        seconds = time.perf_counter() - start
        tokens = [own for request in requests for own in _tokens(request)]
        return Trace(seconds, tokens, arrivals, [own for request in requests for own in times[request.id]])


def _inputs(work: Work) -> tuple[list[dict[str, Any]], list[SamplingParams]]:
    """Return prompts and parameters for `LLM.generate`."""
    params = [
        SamplingParams(temperature=work.temperature, n=work.samples, max_tokens=new, ignore_eos=True)
        for new in work.lengths
    ]
    return [{"prompt_token_ids": prompt} for prompt in work.prompts], params


def _tokens(request: Request) -> list[list[int]]:
    if request.error is not None:
        raise RuntimeError(f"jaxinfer: request {request.id} failed: {request.error}")
    return [sequence.output_ids.tolist() for sequence in request.sequences]
