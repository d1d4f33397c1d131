"""transformers as a peer: `python hf_server.py (hf|hf-cb) FOLDER DTYPE`, lines of JSON in and out.

Needs torch and transformers and nothing of jaxinfer, so that any interpreter that has them will do.
"""

import json
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
PAGE = 256
"""Tokens in a page of transformers' paged cache: its default."""


class Static:
    """`generate` over batches padded on the left; what arrives meanwhile waits for the next batch."""

    def __init__(self, model: Any):
        self.model = model

    def run(self, prompts: list[list[int]], lengths: list[int], concurrency: int | None) -> dict[str, Any]:
        """One pass: seconds, and of each request its tokens, arrival and token times."""
        size = concurrency or len(prompts)
        start = time.perf_counter()
        tokens, times, arrivals = [], [], [0.0] * min(size, len(prompts))
        for first in range(0, len(prompts), size):
            batch = slice(first, first + size)
            made, at = self._generate(prompts[batch], max(lengths[batch]), timed=concurrency is not None)
            for row, length in zip(made, lengths[batch], strict=True):
                tokens.append(row[:length])
                times.append([t - start for t in at[:length]])
            # Whoever is served asks again at once.
            arrivals += sorted(own[-1] for own in times[batch]) if at else []
        seconds = time.perf_counter() - start
        arrivals = (arrivals + [0.0] * len(prompts))[: len(prompts)]
        return {"seconds": seconds, "tokens": tokens, "arrivals": arrivals, "times": times}

    def _generate(self, prompts: Sequence[list[int]], new: int, timed: bool) -> tuple[list[list[int]], list[float]]:
        """The new tokens of each prompt, and when each step was done."""
        import torch
        from transformers import StoppingCriteria, StoppingCriteriaList

        at = []

        class Clock(StoppingCriteria):
            def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
                at.append(time.perf_counter())
                return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=self.model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.model.device)
        with torch.inference_mode():
            made = self.model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([Clock()] if timed else []),
            )  # fmt: skip
        return made[:, width:].tolist(), at


class Continuous:
    """The continuous batching manager, kept from pass to pass."""

    def __init__(self, model: Any):
        self.model, self.manager, self.pages = model, None, 0

    def run(self, prompts: list[list[int]], lengths: list[int], concurrency: int | None) -> dict[str, Any]:
        """One pass: seconds, and of each request its tokens, arrival and token times."""
        size = min(concurrency or len(prompts), len(prompts))
        pages = [-(-(len(prompt) + new) // PAGE) for prompt, new in zip(prompts, lengths, strict=True)]
        self._prepare(sum(sorted(pages)[-size:]))
        waiting, running, results = deque(range(len(prompts))), set(), {}
        arrivals = []
        start = time.perf_counter()
        while waiting or running:
            while waiting and len(running) < size:
                index = waiting.popleft()
                arrivals.append(time.perf_counter() - start)
                running.add(self.manager.add_request(
                    prompts[index], request_id=f"{start}-{index}", max_new_tokens=lengths[index],
                    record_timestamps=concurrency is not None,
                ))  # fmt: skip
            result = self.manager.get_result(timeout=1)
            if result is None and not self.manager.is_running():
                raise RuntimeError("the manager's thread ended")
            if result is not None and result.is_finished():
                if result.error is not None:
                    raise RuntimeError(result.error)
                running.remove(result.request_id)
                results[int(result.request_id.rsplit("-", 1)[1])] = result
        seconds = time.perf_counter() - start
        ordered = [results[index] for index in range(len(prompts))]
        return {
            "seconds": seconds, "tokens": [list(r.generated_tokens) for r in ordered], "arrivals": arrivals,
            "times": [[t - start for t in r.timestamps or ()] for r in ordered],
        }  # fmt: skip

    def _prepare(self, pages: int) -> None:
        """A manager whose cache holds all that is in flight."""
        if self.manager is not None and self.pages >= pages:
            return
        from transformers import ContinuousBatchingConfig, GenerationConfig

        self.close()
        self.pages = pages + 1
        self.manager = self.model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=16),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE, num_blocks=self.pages, max_batch_tokens=512, allow_block_sharing=False
            ),
        )  # fmt: skip
        self.manager.start()

    def close(self) -> None:
        """Ends the manager's thread."""
        if self.manager is not None:
            self.manager.stop(block=True, timeout=10)


def main() -> None:
    """Serves until stdin ends. What libraries print goes to stderr; stdout carries the answers alone."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    mode, folder, dtype = sys.argv[1:]

    def say(reply: dict[str, Any]) -> None:
        out.write(json.dumps(reply) + "\n")
        out.flush()

    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    model.generation_config.eos_token_id = None  # every request runs to its length
    system = {"hf": Static, "hf-cb": Continuous}[mode](model)
    say({"ready": {"torch": torch.__version__, "transformers": transformers.__version__, "dtype": str(model.dtype)}})
    for line in sys.stdin:
        try:
            say(system.run(**json.loads(line)))
        except Exception as error:
            say({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
