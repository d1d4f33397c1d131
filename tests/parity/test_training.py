"""Gradients through `training.logprobs` equal those of transformers, with the engine's numbers in the forward pass."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.tiny import BLOCK, CHUNK, LENGTH, ROWS, prompt

torch = pytest.importorskip("torch", reason="the reference of the parity tests; it comes with the extra `test`")

from support import reference as ref

from jaxinfer.functional import training
from jaxinfer.functional.deterministic import StepShape
from jaxinfer.loading import save
from jaxinfer.loading import weights as loading
from jaxinfer.sharding import make_mesh

TOKENS = np.array([prompt(2 * CHUNK + 3, seed) for seed in (1, 2)])
SHAPE = StepShape("auto", "auto", CHUNK, ROWS, 2 * ROWS, 3 * ROWS, 2 * ROWS, ROWS, LENGTH // BLOCK, BLOCK)
PRECISION = 2e-4
"""Of a gradient, relative to the largest of its tensor."""


def torch_gradients(model: ref.Model) -> tuple[float, dict[str, np.ndarray]]:
    """Return the mean log-probability and its gradient by parameter."""
    logits = model(torch.tensor(TOKENS), use_cache=False).logits[:, :-1].log_softmax(-1)
    value = logits.gather(-1, torch.tensor(TOKENS)[:, 1:, None]).mean()
    value.backward()
    return float(value), {name: param.grad.numpy() for name, param in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_moe", "qwen3_next", "llama4"])
def test_gradients_are_those_of_transformers(family: str, tmp_path: Path):
    model = ref.model(family)
    module = loading.load(ref.save(model, tmp_path / "model"), make_mesh(1), progress=False)
    model_family, config = loading.parse(model.config.to_dict() | {"architectures": [type(model).__name__]})
    training.prepare(module)
    graph, weights = nnx.split(module, nnx.Param)

    def mean(weights: nnx.State) -> jax.Array:
        own = nnx.merge(graph, weights)
        return training.logprobs(own, jnp.asarray(TOKENS), serving=SHAPE, remat=True).mean()

    value, gradients = jax.jit(jax.value_and_grad(mean))(weights)
    expected, slopes = torch_gradients(model)
    assert value == pytest.approx(expected, abs=1e-4)
    found = save.tensors(nnx.merge(graph, gradients), model_family.weight_rules(config))
    assert found.keys() == slopes.keys()
    for name, slope in slopes.items():
        largest = np.abs(slope).max()
        assert largest > 0, f"{name} has no gradient"
        assert np.abs(model_family.restore(name, found[name]) - slope).max() < PRECISION * largest, name
