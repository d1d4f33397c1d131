"""Every family and every option against transformers: logits at all positions, 64 greedy tokens.

Each option is shown to matter by removing it from the reference. Tiny checkpoints are created on the fly, written by
`save_pretrained` and read by the real loader.
"""

from collections.abc import Callable, Collection
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from support import loaded
from support.families import TOLERANCE, families
from support.tiny import prompt

pytest.importorskip("torch", reason="the reference of the parity tests; it comes with the extra `test`")

from support import reference as ref
from support.layers import assert_logits_close, compare_layers
from support.reference_changes import with_config, with_weights

GREEDY = 64

CASES = {name: case for data in families().values() for name, case in data.cases.items()}
"""Cases of all families by name."""
FAMILIES = {name: family for family, data in families().items() for name in data.cases}
"""Family of each case."""

ENGINE = {next(iter(data.cases)) for data in families().values() if data.cases} | {
    "llama dynamic",
    "llama longrope",
    "phi3 longrope across",
    "mistral window",
    "mistral window of a chunk",
    "mistral window of one",
    "qwen2 windows from layer 1",
    "qwen3 alternating",
}
"""Cases that also run through the engine: each family, and options that its steps depend on. For other options
logits suffice.
"""


def cases(
    names: Collection[str] = tuple(CASES), quick: tuple[str, ...] = ("llama", "llama llama3")
) -> pytest.MarkDecorator:
    """Parametrise over cases: those of a family on one worker, all but a few outside of the quick tier."""
    return pytest.mark.parametrize(
        "name",
        [
            pytest.param(
                name, marks=[pytest.mark.xdist_group(FAMILIES[name]), *[pytest.mark.slow] * (name not in quick)]
            )
            for name in CASES
            if name in names
        ],
    )


@cache
def model(name: str) -> ref.Model:
    case = CASES[name]
    return ref.model(FAMILIES[name], head=case.head, **case.changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of a case, written once per worker."""
    return cache(lambda name: ref.save(model(name), tmp_path_factory.mktemp("checkpoint")))


def prompts(name: str) -> list[list[int]]:
    return [prompt(length, seed) for seed, length in enumerate(CASES[name].lengths)]


BEYOND = ("gemma4", "falcon_h1")
"""Families whose layers do more than a mixer and an MLP."""
FOLLOWING = [prompt(4, 10), prompt(2, 11), prompt(4, 12), prompt(1, 13)]
"""Tokens fed to decode steps after each prompt: rows leave the batch at different times."""


@cases()
def test_logits_at_every_position_equal_transformers(name, folder):
    asked = prompts(name)
    following = FOLLOWING[: len(asked)]
    found = loaded.logits(folder(name), asked, following)
    tokens = list(zip(asked, following, strict=True))
    expected = [ref.logits(model(name), *each, cached=CASES[name].cached) for each in tokens]
    assert_logits_close(folder(name), model(name), found, expected, tokens, CASES[name].tolerance)


@pytest.mark.xdist_group("llama")
@pytest.mark.parametrize("broken", [0, 1])
def test_a_failure_names_the_first_layer_that_differs(broken, folder):
    other = with_weights(f"layers.{broken}.mlp.down_proj.weight", 0.0)(model("llama"))
    ids = prompts("llama")[1]
    ours, theirs = ([ref.logits(reference, ids)] for reference in (model("llama"), other))
    assert_logits_close(folder("llama"), model("llama"), ours, ours, [(ids, ())], TOLERANCE)
    with pytest.raises(AssertionError, match=f"first to differ: layer {broken}$"):
        assert_logits_close(folder("llama"), other, ours, theirs, [(ids, ())], TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(one, marks=pytest.mark.xdist_group(one)) for one in BEYOND])
def test_a_layer_returns_what_that_of_transformers_returns(name, folder):
    """It is what `capture` reads and what steering changes."""
    found = compare_layers(folder(name), model(name), prompts(name)[0], CASES[name].tolerance)
    assert "first to differ" not in found, found


@pytest.mark.slow
@pytest.mark.xdist_group("mistral")
def test_a_failure_in_a_decode_step_names_the_layer(folder):
    """A window that is one position too small changes nothing before the decode steps of this prompt."""
    name = "mistral window"
    other = with_config(sliding_window=model(name).config.sliding_window - 1)(model(name))
    tokens = [(prompt(3), ()), (prompt(other.config.sliding_window, 1), prompt(4, 10))]
    ours, theirs = ([ref.logits(reference, *each) for each in tokens] for reference in (model(name), other))
    found = r"prompt 1 \(.*first at decode step 0(.|\n)*first to differ: layer 0$"
    with pytest.raises(AssertionError, match=found):
        assert_logits_close(folder(name), other, ours, theirs, tokens, TOLERANCE)


@cases(ENGINE, quick=("llama",))
def test_greedy_tokens_equal_transformers(name, folder):
    asked = prompts(name)
    found = loaded.greedy(folder(name), asked, GREEDY)
    expected = [ref.greedy(model(name), ids, GREEDY, cached=CASES[name].cached) for ids in asked]
    assert found == expected
    assert len(set(sum(expected, []))) > CASES[name].distinct


@cases()
def test_ignoring_an_option_changes_the_logits(name):
    asked = prompts(name)
    whole = [ref.logits(model(name), ids) for ids in asked]
    for option, change in CASES[name].without.items():
        other = change(model(name))
        moved = max(np.abs(ref.logits(other, ids) - a).max() for ids, a in zip(asked, whole, strict=True))
        assert moved > 100 * CASES[name].tolerance, option


def test_every_family_and_option_has_a_case():
    from jaxinfer.layers.mlp import ACTIVATIONS
    from jaxinfer.layers.rope_config import ROPE_KINDS

    configs = [model(name).config for name in CASES]
    assert all(data.cases for data in families().values() if data.architecture)
    named = {getattr(config, name, "silu") for config in configs for name in ("hidden_act", "mlp_hidden_act")}
    assert named | {"swish"} == set(ACTIVATIONS)
    stated = [getattr(config, "rope_parameters", {}) for config in configs]
    ropes = [rope for own in stated for rope in (own, *own.values()) if isinstance(rope, dict)]  # by kind of layer
    assert {rope.get("rope_type", "default") for rope in ropes} == set(ROPE_KINDS)
