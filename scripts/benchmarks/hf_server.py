"""Serve transformers as a benchmark peer: `python hf_server.py (hf|hf-static|hf-cb) FOLDER DTYPE`, JSON lines in and
out.

Needs torch and transformers and nothing of jaxinfer, so that any interpreter with them will do.
"""

import os
import time
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any

from peer_server import serve

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
PAGE = 256
"""Tokens per page of transformers' paged cache: its default."""


def _sampling(samples: int, temperature: float) -> dict[str, Any]:
    """Return `GenerationConfig` fields for sampling; transformers' defaults would restrict it to the top 50 tokens."""
    if temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0, "num_return_sequences": samples}


class Static:
    """`generate` over batches padded on the left (encoders: on the right); requests that arrive meanwhile wait for
    the next batch.
    """

    def __init__(self, model: Any, **cache: str):
        self.model, self.cache = model, cache

    def run(
        self, prompts: list[list[int]], lengths: list[int], concurrency: int | None, samples: int, temperature: float
    ) -> dict[str, Any]:
        """Run one pass; return its seconds, the arrival times of requests, and the tokens of each sample with their
        times.
        """
        size = concurrency or len(prompts)
        start = time.perf_counter()
        tokens, times, arrivals = [], [], [0.0] * min(size, len(prompts))
        for first in range(0, len(prompts), size):
            batch = slice(first, first + size)
            made, at = self._generate(prompts[batch], max(lengths[batch]), _sampling(samples, temperature))
            kept = [length for length in lengths[batch] for _ in range(samples)]
            tokens += [row[:length] for row, length in zip(made, kept, strict=True)]
            times += [[t - start for t in at[:length]] for length in kept]
            # Closed loop: a finished request is followed by a new one at once.
            arrivals += sorted(at[length - 1] - start for length in lengths[batch])
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": tokens, "arrivals": arrivals[: len(prompts)], "times": times}

    def _generate(
        self, prompts: Sequence[list[int]], new: int, sampling: dict[str, Any]
    ) -> tuple[list[list[int]], list[float]]:
        """Generate a batch; return the new tokens of each sample of each prompt, and the time each step ended."""
        import torch
        from transformers import StoppingCriteria, StoppingCriteriaList

        at = []

        class Clock(StoppingCriteria):
            def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
                at.append(time.perf_counter())
                return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        width, encoder = max(map(len, prompts)), self.model.config.is_encoder_decoder

        def batch(rows: Sequence[list[int]]) -> torch.Tensor:
            padding = [[0] * (width - len(row)) for row in rows]
            padded = [row + more if encoder else more + row for row, more in zip(rows, padding, strict=True)]
            return torch.tensor(padded, device=self.model.device)

        ids, mask = batch(prompts), batch([[1] * len(prompt) for prompt in prompts])
        with torch.inference_mode():
            made = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=new,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([Clock()]),
                **self.cache,
                **sampling,
            )
        # Cut off the prompts, or the decoder's start token.
        return made[:, 1 if encoder else width :].tolist(), at


class Continuous:
    """Continuous batching manager, kept between passes."""

    def __init__(self, model: Any):
        self.model, self.manager, self.pages = model, None, 0
        self.sampling: dict[str, Any] = {}

    def run(
        self, prompts: list[list[int]], lengths: list[int], concurrency: int | None, samples: int, temperature: float
    ) -> dict[str, Any]:
        """Run one pass; return its seconds, the arrival times of requests, and the tokens of each sample with their
        times.
        """
        size = min(concurrency or len(prompts), len(prompts))
        pages = [-(-(len(prompt) + new) // PAGE) for prompt, new in zip(prompts, lengths, strict=True)]
        self._prepare(samples * sum(sorted(pages)[-size:]), _sampling(samples, temperature))
        waiting, running, results = deque(range(len(prompts))), {}, {}
        arrivals = []
        start = time.perf_counter()
        while waiting or running:
            while waiting and len(running) < size:
                index = waiting.popleft()
                arrivals.append(time.perf_counter() - start)
                request = self.manager.add_request(
                    prompts[index],
                    request_id=f"{start}-{index}",
                    max_new_tokens=lengths[index],
                    record_timestamps=True,
                )
                running[request] = samples
            result = self.manager.get_result(timeout=1)
            if result is None and not self.manager.is_running():
                raise RuntimeError("the manager's thread ended")
            if result is not None and result.is_finished():
                if result.error is not None:
                    raise RuntimeError(result.error)
                request, _, child = result.request_id.partition("__child#")
                results[int(request.rsplit("-", 1)[1]), int(child or -1)] = result
                running[request] -= 1
                running = {name: left for name, left in running.items() if left}
        seconds = time.perf_counter() - start
        ordered = [results[key] for key in sorted(results)]
        return {
            "seconds": seconds,
            "tokens": [list(r.generated_tokens) for r in ordered],
            "arrivals": arrivals,
            "times": [[t - start for t in r.timestamps or ()] for r in ordered],
        }

    def _prepare(self, pages: int, sampling: dict[str, Any]) -> None:
        """Create a manager whose cache holds all requests in flight."""
        if self.manager is not None and self.pages >= pages and self.sampling == sampling:
            return
        from transformers import ContinuousBatchingConfig, GenerationConfig

        self.close()
        self.pages, self.sampling = pages + 1, sampling
        self.manager = self.model.init_continuous_batching(
            generation_config=GenerationConfig(eos_token_id=-1, pad_token_id=0, max_new_tokens=16, **sampling),
            continuous_batching_config=ContinuousBatchingConfig(allow_block_sharing=False, **self._sizes()),
        )
        self.manager.start()

    def _sizes(self) -> dict[str, int]:
        """Return cache sizes: transformers' defaults on a GPU; elsewhere they would take all of the machine's
        memory.
        """
        if self.model.device.type != "cpu":
            return {}
        return {"page_size": PAGE, "num_blocks": self.pages, "max_batch_tokens": 512}

    def close(self) -> None:
        """Stop the manager's thread."""
        if self.manager is not None:
            self.manager.stop(block=True, timeout=10)


def load(mode: str, folder: str, dtype: str) -> tuple[Static | Continuous, dict[str, str]]:
    """Load the model to run in this mode."""
    import torch
    import transformers

    encoder = transformers.AutoConfig.from_pretrained(folder).is_encoder_decoder
    auto = transformers.AutoModelForSeq2SeqLM if encoder else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=dtype).eval().to("cuda" if torch.cuda.is_available() else "cpu")
    model.generation_config.eos_token_id = None  # every request runs to its length
    model.generation_config.forced_eos_token_id = None  # otherwise BART forces an EOS token at the end
    # On a GPU, transformers compiles `generate` for a static cache.
    systems = {"hf": Static, "hf-static": partial(Static, cache_implementation="static"), "hf-cb": Continuous}
    system = systems[mode](model)
    return system, {"torch": torch.__version__, "transformers": transformers.__version__, "dtype": str(model.dtype)}


if __name__ == "__main__":
    serve(load)
