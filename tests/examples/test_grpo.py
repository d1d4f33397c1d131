"""The example of GRPO: exact ratios, rewards and advantages of its samples, an engine that serves what is trained."""

import random
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxinfer import LLM, demo

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
grpo = pytest.importorskip("grpo", reason="examples/grpo.py needs optax, which comes with flax")

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("demo")]
SETTINGS = grpo.Settings(steps=2, questions=2, samples=4, updates=2)


@pytest.mark.parametrize(
    ("text", "right"),
    [(" 90 is larger than 36.", True), (" 36 is smaller than 90.", False), (" 9", False), ("", False), (" 90", True)],
)
def test_an_answer_is_right_if_its_first_number_is(text, right):
    assert grpo.is_right(text, "90") is right


def test_two_steps_of_training():
    asked = grpo.draw(2, random.Random(0))
    assert asked == grpo.draw(2, random.Random(0)) != grpo.draw(2, random.Random(1))
    with LLM(demo.path(), use_tqdm=False, **grpo.ENGINE) as llm:
        batch, reward = grpo.sample(llm, asked, SETTINGS, seed=3)
        advantages = np.asarray(batch.advantages).reshape(2, 4)
        assert 0 <= reward <= 1 and np.abs(advantages.sum(1)).max() < 1e-5
        assert np.isfinite(batch.old).all() and (np.asarray(batch.old)[~np.asarray(batch.answered)] == 0).all()
        before = [np.asarray(leaf) for leaf in jax.tree.leaves(llm.weights(names="jaxinfer"))]
        # Groups of which some are right and some wrong, so that there is something to learn in each step.
        reports = list(grpo.train(llm, grpo.Settings(**vars(SETTINGS) | {"samples": 16, "seed": 5})))
        assert [report.step for report in reports] == [0, 1] and any(0 < report.reward < 1 for report in reports)
        for report in reports:
            first, second = report.ratios
            assert first.size > 2 * 16 and (first == 1).all()
        assert any((report.ratios[1] != 1).any() for report in reports), "the second update begins with other weights"
        after = [np.asarray(leaf) for leaf in jax.tree.leaves(llm.weights(names="jaxinfer"))]
        assert llm.weight_version == 2
        pairs = [(old, new) for old, new in zip(before, after, strict=True) if old.ndim > 1]  # norms may round back
        assert pairs and not any(np.array_equal(old, new) for old, new in pairs)
        assert 0 <= grpo.accuracy(llm, asked) <= 1
