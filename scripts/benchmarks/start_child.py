"""Measure start-up in a new process: `python start_child.py FOLDER SETTINGS` prints the wall-clock time of each
phase.
"""

import time

at = {"started": time.time()}

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from jaxinfer import LLM, SamplingParams

at["imported"] = time.time()

TOKENS = 32
"""New tokens; the first ones include compilation of the decode steps."""

folder, settings = sys.argv[1:]
with LLM(folder, use_tqdm=False, **json.loads(settings)) as llm:
    at["loaded"] = time.time()
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    for _ in llm.stream("Question: What is 17 plus 25?\nAnswer:", params):
        at.setdefault("first_token", time.time())
    at["answer"] = time.time()
print(json.dumps(at))
