"""Script of one of several processes that serve a model, written as a user would; its settings are a JSON argument.

Prints results as lines of JSON. `act` selects an additional action of this process, or a fault to inject.
"""

import json
import signal
import sys

from jaxinfer import LLM, SamplingParams, distributed
from jaxinfer.engine.sizing import memory

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


def lead(llm: LLM, act: str) -> None:
    """Run the requests in process 0."""
    if act == "warm":
        assert llm.warmup(sampling=["greedy"], use_tqdm=False).compiled
        llm.reset_prefix_cache()
        try:
            llm.update_weights(None)
        except RuntimeError as error:
            print(json.dumps({"refused": str(error)}), flush=True)
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
        if not told["process"]:
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
                llm.follow()
    print(json.dumps({"ended": told["process"]}), flush=True)


if __name__ == "__main__":
    main()
