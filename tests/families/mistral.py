"""Tests' data of `models/mistral.py`."""

from support import reference_changes as ref
from support.families import NULL, Case, FamilyData, Published
from support.parity_options import GROUPS, HEAD_DIM, NORMS, PLAIN, yarn

DATA = FamilyData(
    architecture="MistralForCausalLM",
    published={
        "Mistral-7B-v0.1": Published(
            "mistralai/Mistral-7B-v0.1", "from memory of the published values; not compared with the file"
        ),
        "Mistral-7B-v0.3": Published(
            "mistralai/Mistral-7B-v0.3", "from memory of the published values; not compared with the file"
        ),
    },
    cases={
        "mistral": Case({}, {**GROUPS, **HEAD_DIM, **NORMS}),
        "mistral yarn": Case({"sliding_window": NULL, **yarn()}, {"yarn": PLAIN}),
        # Prompts shorter and longer than the window, by one and by many; chunks (16) are mostly longer than it.
        "mistral window": Case(
            {"sliding_window": 12},
            {"window": ref.with_config(sliding_window=None), "its last position": ref.with_config(sliding_window=11)},
            lengths=(11, 12, 13, 28),
        ),
        "mistral window of a chunk": Case({"sliding_window": 16}, lengths=(15, 16, 17, 1)),
        "mistral window of a block": Case({"sliding_window": 4}, lengths=(3, 4, 5, 40)),
        # transformers' cache keeps the last `window - 1` positions with [-0:], which is all of them.
        "mistral window of one": Case({"sliding_window": 1}, lengths=(1, 2, 17, 40), cached=False, distinct=3),
        "mistral window above all": Case({"sliding_window": 4096}),
    },
)
