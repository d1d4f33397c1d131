"""tunix' own GRPO loop samples with jaxinfer, on a tiny Qwen 3; what the rollout gives is what tunix' sampler gives.

`pip install ".[tunix]"` adds 51 packages and 0.5 GB, so that CI does not install it, and these tests are
skipped there.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

base_rollout = pytest.importorskip("tunix.rl.rollout.base_rollout", reason="google-tunix is not installed (.[tunix])")

import optax
from transformers import AutoTokenizer
from tunix.models.qwen3 import model as qwen3
from tunix.rl import rl_cluster
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rollout.vanilla_rollout import VanillaRollout

from jaxinfer import demo
from jaxinfer.errors import ConfigError
from jaxinfer.integrations.tunix import Rollout

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("tunix")]

PROMPTS = ["What is 3 + 4?", "Hello"]
CONFIG = base_rollout.RolloutConfig(
    max_tokens_to_generate=8, max_prompt_length=24, temperature=1.0, kv_cache_size=64, return_logprobs=True
)
GREEDY = dataclasses.replace(CONFIG, temperature=0.0, top_p=None)


def served(vocabulary: int) -> dict[str, Any]:
    """Return config.json of the model that is served."""
    return dict(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-6,
        rope_theta=1e6,  # what tunix' Qwen 3 rotates by, whatever its configuration says
        max_position_embeddings=256,
        dtype="float32",
    )


def make_cluster() -> rl_cluster.RLCluster:
    """Make tunix' cluster, with the same model as the actor."""
    tokenizer = AutoTokenizer.from_pretrained(demo.path())
    sizes = dict(num_layers=2, embed_dim=32, hidden_dim=64, num_heads=4, head_dim=16, num_kv_heads=2)
    config = qwen3.ModelConfig(vocab_size=len(tokenizer), rope_theta=1_000_000, norm_eps=1e-6, **sizes)
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    roles = rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT
    return rl_cluster.RLCluster(
        actor=qwen3.Qwen3(config, rngs=nnx.Rngs(0)),
        tokenizer=tokenizer,
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh),
            rollout_engine=functools.partial(Rollout, model=served(len(tokenizer))),
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.adam(1e-2),
                eval_every_n_steps=100,
                max_steps=3,
                mini_batch_size=2,
                train_micro_batch_size=2,
            ),
            rollout_config=CONFIG,
        ),
    )


@pytest.fixture(scope="module")
def cluster():
    made = make_cluster()
    yield made
    made.rollout.llm.close()


def vanilla(cluster: rl_cluster.RLCluster) -> VanillaRollout:
    """Return tunix' own rollout of the actor's weights as they are."""
    return VanillaRollout(cluster.actor_trainer.model, cluster.tokenizer, base_rollout.CacheConfig(64, 2, 2, 16))


def padded(cluster: rl_cluster.RLCluster, rows: list[np.ndarray]) -> np.ndarray:
    tokens = np.full((len(rows), 8), cluster.rollout.pad_id(), np.int32)
    for row, made in zip(tokens, rows, strict=True):
        row[: len(made)] = made
    return tokens


def assert_equal_to_vanilla(cluster: rl_cluster.RLCluster) -> None:
    """Prompts and log-probabilities are those of tunix' own sampler."""
    reference = vanilla(cluster)
    found, wanted = (one.generate(PROMPTS, GREEDY) for one in (cluster.rollout, reference))
    np.testing.assert_array_equal(found.left_padded_prompt_tokens, wanted.left_padded_prompt_tokens)
    sampled = cluster.rollout.generate(PROMPTS, CONFIG)
    prompts, completions = map(jnp.asarray, (sampled.left_padded_prompt_tokens, padded(cluster, sampled.tokens)))
    ours = np.asarray(cluster.rollout.get_per_token_logps(prompts, completions))
    theirs = np.asarray(reference.get_per_token_logps(prompts, completions))
    for row, (tokens, logprobs) in enumerate(zip(sampled.tokens, sampled.logprobs, strict=True)):
        assert 0 < len(tokens) == len(logprobs) <= 8
        np.testing.assert_allclose(ours[row, : len(tokens)], logprobs, atol=1e-4)
        np.testing.assert_allclose(ours[row, : len(tokens)], theirs[row, : len(tokens)], atol=1e-3)


def test_the_loop_of_tunix_trains_what_jaxinfer_serves(cluster):
    assert_equal_to_vanilla(cluster)
    before = cluster.rollout.llm.weights_checksum()
    seen = []

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        seen.append((len(prompts), len(completions)))
        return [float(text.count("e")) for text in completions]

    config = GRPOConfig(num_generations=4, num_iterations=1, beta=0.0)
    learner = GRPOLearner(rl_cluster=cluster, algo_config=config, reward_fns=reward)
    learner.train([{"prompts": np.array(PROMPTS)} for _ in range(3)])
    assert seen and set(seen) == {(8, 8)}
    llm = cluster.rollout.llm
    assert llm.weight_version >= 1 + 3 and llm.weights_checksum() != before
    assert_equal_to_vanilla(cluster)


def test_what_cannot_be_served_is_refused(cluster):
    rollout = cluster.rollout
    with pytest.raises(ValueError, match="prompt 0 has .* tokens, and max_prompt_length is 24; raise it"):
        rollout.generate(["word " * 40], CONFIG)
    with pytest.raises(ConfigError, match="LoRA"):
        rollout.update_params(nnx.State({}), (nnx.LoRAParam,))
    with pytest.raises(TypeError, match="images is not supported"):
        rollout.generate(PROMPTS, CONFIG, images=None)
    with pytest.raises(ConfigError, match="for which tunix does not say how checkpoints are read; pass to_hf="):
        Rollout(
            rollout_actor=nnx.Linear(2, 2, rngs=nnx.Rngs(0)),
            tokenizer=cluster.tokenizer,
            mesh=jax.make_mesh((1,), ("x",)),
            rollout_config=CONFIG,
            model=served(len(cluster.tokenizer.tokenizer)),
        )
