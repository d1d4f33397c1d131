"""Serve openvino-genai as a benchmark peer: `python openvino_server.py (openvino|openvino-int8) FOLDER DTYPE EXPORTED`.

Needs openvino-genai and optimum-intel (with transformers < 5.6 and without torchvision, which breaks the export), and
nothing of jaxinfer. The checkpoint is exported to the folder EXPORTED unless that exists.
"""

import os
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import openvino
import openvino_genai
from peer_server import serve

CACHE_GIB = 1
"""Cache size in GiB: jaxinfer's default on a CPU."""


class Pipeline:
    """Continuous batching pipeline: requests are added, and new tokens are read after each step."""

    def __init__(self, folder: str, precision: str):
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = CACHE_GIB
        scheduler.enable_prefix_caching = False  # every pass repeats the same prompts
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(
            folder, scheduler, "CPU", {"INFERENCE_PRECISION_HINT": precision}
        )
        self.next_id = 0

    def run(
        self, prompts: list[list[int]], lengths: list[int], concurrency: int | None, samples: int, temperature: float
    ) -> dict[str, Any]:
        """Run one pass; return its seconds, the arrival times of requests, and the tokens of each sample with their
        times.
        """
        size = concurrency or len(prompts)
        waiting, running, arrivals = deque(range(len(prompts))), {}, []
        made: list[dict[int, tuple[list[int], list[float]]]] = [{} for _ in prompts]
        start = time.perf_counter()
        while waiting or running:
            while waiting and len(running) < size:
                index = waiting.popleft()
                arrivals.append(time.perf_counter() - start)
                running[index] = self._add(prompts[index], lengths[index], samples, temperature)
            if not self.pipeline.has_non_finished_requests():
                raise RuntimeError(f"the pipeline ended with {len(running)} requests unfinished")
            self.pipeline.step()
            now = time.perf_counter() - start
            for index in list(running):
                _read(running[index], made[index], now)
                if sum(len(tokens) for tokens, _ in made[index].values()) >= lengths[index] * samples:
                    del running[index]
        seconds = time.perf_counter() - start
        while self.pipeline.has_non_finished_requests():  # the pipeline reports a finished request one step late
            self.pipeline.step()
        ordered = [own for request in made for _, own in sorted(request.items())]
        tokens, times = (list(column) for column in zip(*ordered, strict=True))
        return {"seconds": seconds, "tokens": tokens, "arrivals": arrivals, "times": times}

    def _add(self, prompt: list[int], new: int, samples: int, temperature: float) -> Any:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.apply_chat_template = new, True, False
        if samples > 1 or temperature > 0:
            config.do_sample, config.temperature, config.num_return_sequences = True, temperature, samples
        self.next_id += 1
        return self.pipeline.add_request(self.next_id, openvino.Tensor(np.array([prompt], np.int64)), config)


def _read(handle: Any, made: dict[int, tuple[list[int], list[float]]], now: float) -> None:
    """Append a request's new tokens and their times to `made`, by sample."""
    while handle.can_read():
        for sample, output in handle.read().items():
            tokens, times = made.setdefault(sample, ([], []))
            tokens += output.generated_ids
            times += [now] * len(output.generated_ids)


def export(folder: str, target: Path, weights: str) -> None:
    """Export the checkpoint to OpenVINO's format, unless that was done before."""
    if (target / "openvino_model.xml").exists():
        return
    subprocess.run(
        [
            sys.executable,
            "-m",
            "optimum.commands.optimum_cli",
            "export",
            "openvino",
            "--model",
            folder,
            "--task",
            "text-generation-with-past",
            "--weight-format",
            weights,
            str(target),
        ],
        check=True,
    )


def load(name: str, folder: str, dtype: str, exported: str) -> tuple[Pipeline, dict[str, str]]:
    """Load the pipeline of the exported checkpoint; 16-bit weights are computed in bfloat16."""
    weights = "int8" if name == "openvino-int8" else "fp32" if dtype == "float32" else "fp16"
    target = Path(exported) / weights
    export(folder, target, weights)
    precision = "f32" if dtype == "float32" else "bf16"
    versions = {"openvino-genai": openvino_genai.__version__, "weights": weights, "precision": precision}
    return Pipeline(str(target), precision), versions


if __name__ == "__main__":
    serve(load)
