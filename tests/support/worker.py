"""Script of one of several processes that serve a model, written as a user would; its settings are a JSON argument.

Prints results as lines of JSON. `act` selects an additional action of this process, or a fault to inject.
"""

import json
import signal
import sys
import time
from collections.abc import Callable

import jax
import numpy as np

from jaxinfer import LLM, SamplingParams, distributed
from jaxinfer.engine.sizing import memory
from jaxinfer.errors import CheckpointError, DistributedError
from jaxinfer.loading import checksum

PROMPTS = ([5, 6, 7, 8, 9, 10, 11], [40, 41], list(range(20, 60)))


def requests(**more: object) -> list[SamplingParams]:
    """Return parameters for greedy sampling, random sampling with every setting, and several samples of a prompt."""
    common = dict(max_tokens=12, ignore_eos=True) | more
    return [
        SamplingParams(temperature=0.0, **common),
        SamplingParams(temperature=0.9, seed=3, top_p=0.9, repetition_penalty=1.2, logit_bias={7: 1.5}, **common),
        SamplingParams(temperature=0.8, seed=5, n=3, **common),
    ]


def change_a_weight(llm: LLM) -> None:
    """Negate the last norm's weights, which are replicated, so that this process computes different tokens."""
    runner = llm._engine.runner
    at = max(i for i, p in enumerate(runner.params) if p.is_fully_replicated and p.ndim == 1)
    runner.params[at] = -runner.params[at]


def pause_and_sleep(llm: LLM) -> None:
    """Pause a stream for longer than the timeout of a process, go on with its cache computed anew, and sleep."""
    stream = llm.stream([{"prompt_token_ids": list(PROMPTS[0])}], requests(max_tokens=40)[0])
    next(stream)
    llm.pause()
    try:
        llm.sleep()
        raise AssertionError("it slept while a request was paused")
    except RuntimeError:
        pass
    time.sleep(llm.config.peer_timeout + 2)
    llm.resume(recompute=True)
    assert [output.finished for output in stream][-1]
    for _ in range(2):
        llm.sleep()
        freed = llm._engine.runner.cache == []
        time.sleep(1)
        llm.wake_up()
        print(json.dumps({"freed": freed}), flush=True)
    llm.reset_prefix_cache()


def say_when_freed(llm: LLM) -> None:
    """Print whether a cache is left when process 0 has this one free it."""
    runner = llm._engine.runner
    release = runner.release

    def freed() -> None:
        release()
        print(json.dumps({"freed": runner.cache == []}), flush=True)

    runner.release = freed


def refusal(call: Callable[[], object]) -> str:
    """Return the error of a call."""
    try:
        call()
    except (CheckpointError, DistributedError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def train(llm: LLM, process: int) -> None:
    """Generate, change the weights in all processes, and generate again, as a trainer does; print what was found."""
    tokens, refused, last = [], [], "model.norm.weight"

    def generate() -> None:
        """Generate in process 0, and follow it in the other one until it has."""
        if process:
            llm.follow()
            return
        prompts = [{"prompt_token_ids": list(prompt)} for prompt in PROMPTS]
        outputs = llm.generate(prompts, requests(), use_tqdm=False)
        tokens.append([[list(c.token_ids) for c in output.outputs] for output in outputs])
        refused.append(refusal(llm.weights))
        llm.release_followers()

    generate()
    weights = llm.weights()
    before = llm.weights_checksum()
    assert checksum.checksum(weights) == before and not weights["lm_head.weight"].is_fully_addressable
    host = np.asarray(weights[last])
    refused += [
        refusal(lambda: llm.update_weights({n: w for n, w in weights.items() if not process or n != last})),
        refusal(lambda: llm.update_weights({last: host + process}, partial=True)),
        refusal(lambda: llm.update_weights({last: host * np.float32("nan")}, partial=True)),
        refusal(lambda: llm.update_weights({last: host}, partial=bool(process))),
    ]
    assert llm.weights_checksum() == before
    changed = {name: changed_weight(array) for name, array in weights.items()}
    report = llm.update_weights(changed)
    assert report.checksum == llm.weights_checksum() != before and report.version == 1
    generate()
    if not process:
        llm.sleep(level=2)
        llm.release_followers()
    else:
        llm.follow()
    llm.update_weights(weights)
    if not process:
        llm.wake_up()
    generate()
    assert llm.weights_checksum() == before and llm.weight_version == 2
    print(json.dumps({"trained": tokens, "refused": refused}), flush=True)


def changed_weight(array: jax.Array) -> jax.Array:
    """Return a weight as a trainer changes it, where it lies."""
    return array * np.float32(1.5) if array.ndim == 1 else array


def lead(llm: LLM, act: str) -> None:
    """Run the requests in process 0."""
    if act == "warm":
        assert llm.warmup(sampling=["greedy"], use_tqdm=False).compiled
        llm.reset_prefix_cache()
        refused = [refusal(call) for call in (lambda: llm.update_weights(None), llm.weights, llm.module)]
        pause_and_sleep(llm)
        print(json.dumps({"refused": refused}), flush=True)
    outputs = llm.generate([{"prompt_token_ids": list(p)} for p in PROMPTS], requests(), use_tqdm=False)
    again = llm.generate([{"prompt_token_ids": list(p)} for p in PROMPTS], requests(), use_tqdm=False)
    found = [[list(c.token_ids) for c in output.outputs] for output in outputs]
    assert found == [[list(c.token_ids) for c in output.outputs] for output in again]
    print(json.dumps({"tokens": found, "cached": [o.num_cached_tokens for o in again]}), flush=True)
    if act == "long":
        print("RUNNING", flush=True)
        while True:
            llm.generate([{"prompt_token_ids": [5]}] * 4, requests(max_tokens=200)[0], use_tqdm=False)


def main() -> None:
    """Run this process as its JSON argument says."""
    told = json.loads(sys.argv[1])
    # Tests started in the background of a shell inherit an ignored SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    distributed.initialize(told["coordinator"], told["count"], told["process"])
    act = told["act"]
    # Only the settings of process 0 take effect.
    settings = told["settings"] if not told["process"] else dict(max_num_seqs=3, compilation_cache_dir=None)
    with LLM(told["model"], skip_tokenizer_init=True, use_tqdm=False, peer_timeout=told["timeout"], **settings) as llm:
        if act in ("warm", "generate"):
            memory.memory_stats = lambda device: {"bytes_limit": (5 + told["process"]) << 30}
            print(json.dumps({"free": memory.device_memory(llm._mesh, [], 1.0).left}), flush=True)
        if act == "train":
            train(llm, told["process"])
        elif not told["process"]:
            try:
                lead(llm, act)
            except KeyboardInterrupt:
                print(json.dumps({"interrupted": True}), flush=True)
                return
        else:
            if act == "generate":
                try:
                    llm.generate("no")
                except RuntimeError as error:
                    print(json.dumps({"refused": str(error)}), flush=True)
            if act == "change":
                change_a_weight(llm)
            if act != "leave":
                say_when_freed(llm)
                llm.follow()
    print(json.dumps({"ended": told["process"]}), flush=True)


if __name__ == "__main__":
    main()
