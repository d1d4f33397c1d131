"""jaxinfer under measurement: a whole call of `LLM.generate`, or the engine with requests that keep arriving."""

import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.trace import Trace
from benchmarks.work import Work
from jaxinfer import LLM, EngineConfig, SamplingParams
from jaxinfer.engine.metrics import PREFIX, Metric
from jaxinfer.engine.request import Request, Sequence
from jaxinfer.engine.setup import build_engine
from jaxinfer.models import loading
from jaxinfer.resolve import ModelLimits, resolve
from jaxinfer.sharding import make_mesh


def _params(new: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)


def _compiled(readings: list[Metric]) -> tuple[int, float]:
    values = {metric.name.removeprefix(PREFIX): metric.value for metric in readings}
    return int(values["compiled_steps"]), float(values["compile_seconds"])


class Offline:
    """All requests in one call of `LLM.generate`."""

    name = "jaxinfer"

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.settings = settings
        self._llm = LLM(folder, skip_tokenizer_init=True, use_tqdm=False, **settings)

    def run(self, work: Work) -> Trace:
        """One pass, with nothing in the prefix cache."""
        prompts = [{"prompt_token_ids": prompt} for prompt in work.prompts]
        params = [_params(new) for new in work.lengths]
        self._llm.reset_prefix_cache()
        start = time.perf_counter()
        results = self._llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        tokens = [list(result.outputs[0].token_ids) for result in results]
        return Trace(seconds, tokens, [0.0] * len(tokens), [])

    def compiled(self) -> tuple[int, float]:
        """Steps compiled so far, and the seconds that took."""
        return _compiled(self._llm.get_metrics())

    def close(self) -> None:
        """Gives the memory back."""
        self._llm.close()


class Clock:
    """Listens to a request: when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_token(self, sequence: Sequence, ending: bool) -> str | None:
        """Called by the engine."""
        self.times.append(time.perf_counter())
        return None


class Online:
    """The engine under a closed loop: a new request arrives whenever one has finished."""

    name = "jaxinfer"

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.settings = settings
        config = EngineConfig.of(settings)
        mesh = make_mesh(config.tensor_parallel_size)
        module = loading.load(folder, mesh, dtype=config.dtype, progress=False)
        self._engine = build_engine(module, config, mesh)
        self._limits = ModelLimits(module.config.vocab_size, self._engine.runner.shapes.max_length)

    def run(self, work: Work) -> Trace:
        """One pass, with nothing in the prefix cache."""
        engine = self._engine
        engine.reset_prefix_cache()
        requests = [self._request(work, index) for index in range(len(work.prompts))]
        waiting, running, arrivals = deque(requests), [], []
        start = time.perf_counter()
        while waiting or engine.has_work:
            while waiting and len(running) < work.at_once:
                running.append(waiting.popleft())
                arrivals.append(time.perf_counter() - start)
                engine.add(running[-1])
            engine.step()
            running = [request for request in running if not request.finished]
        seconds = time.perf_counter() - start
        return Trace(
            seconds, [_tokens(request) for request in requests], arrivals,
            [[at - start for at in request.listener.times] for request in requests],
        )  # fmt: skip

    def _request(self, work: Work, index: int) -> Request:
        prompt = work.prompts[index]
        params = resolve(_params(work.lengths[index]), self._limits, prompt_len=len(prompt))
        limit = len(prompt) + work.lengths[index]
        return Request(str(index), np.array(prompt, np.int32), params, limit, listener=Clock())

    def compiled(self) -> tuple[int, float]:
        """Steps compiled so far, and the seconds that took."""
        return _compiled(self._engine.readings())

    def close(self) -> None:
        """Ends the engine."""
        self._engine.close()


def _tokens(request: Request) -> list[int]:
    if request.error is not None:
        raise RuntimeError(f"jaxinfer: request {request.id} failed: {request.error}")
    return request.sequences[0].output_ids.tolist()
