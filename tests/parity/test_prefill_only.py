"""`embed`, `hidden_states` and `score` give what transformers gives."""

from pathlib import Path

import numpy as np
import pytest
from faults.conftest import SETTINGS
from support import checkpoint

torch = pytest.importorskip("torch", reason="the reference of the parity tests; it comes with the extra `test`")
transformers = pytest.importorskip("transformers")

from jaxinfer import LLM

TEXTS = ["hello world", "the cat sat on the mat, hello hello", "cat", "mat " * 30]
"""The last takes several chunks."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return checkpoint.write(tmp_path_factory.mktemp("prefill"), scale=4.0)


@pytest.fixture(scope="module")
def llm(folder):
    with LLM(folder, **SETTINGS) as made:
        yield made


@pytest.fixture(scope="module")
def reference(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    outputs = []
    for text in TEXTS:
        ids = transformers.AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
        with torch.no_grad():
            body = model.model(ids, output_hidden_states=True)
            logits = model.lm_head(body.last_hidden_state)[0].log_softmax(-1)
        outputs.append((ids[0].tolist(), body.last_hidden_state[0], [h[0] for h in body.hidden_states], logits))
    return outputs


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings_are_pooled_hidden_states(llm, reference, pooling):
    for again in range(2):  # the second time, "last" finds its prefixes in the cache
        plain = llm.embed(TEXTS, pooling=pooling, normalize=False, use_tqdm=False)
        for own, (ids, last, _, _) in zip(plain, reference, strict=True):
            expected = last[-1] if pooling == "last" else last.mean(dim=0)
            assert own.prompt_token_ids == ids
            np.testing.assert_allclose(own.embedding, expected, rtol=0, atol=1e-4)
        assert (plain[-1].num_cached_tokens > 0) == (again > 0 and pooling == "last")
    for own, other in zip(llm.embed(TEXTS, pooling=pooling, use_tqdm=False), plain, strict=True):
        np.testing.assert_allclose(own.embedding, other.embedding / np.linalg.norm(other.embedding), atol=1e-6)


def test_hidden_states_are_those_of_named_modules(llm, reference):
    paths = ["embedding", "model.layers.0", "layers.1", "last_hidden_state", "norm", "layers.1.mlp"]
    found = llm.hidden_states(TEXTS, capture=paths, use_tqdm=False)
    for own, (ids, last, states, _) in zip(found, reference, strict=True):
        assert own.prompt_token_ids == ids and len(own.states) == len(paths)
        for path, expected in (("embedding", states[0]), ("layers.0", states[1]), ("norm", last)):
            np.testing.assert_allclose(own.states[path], expected, rtol=0, atol=1e-4, err_msg=path)
        np.testing.assert_array_equal(own.states["norm"], own.states["last_hidden_state"])
        assert own.states["layers.1.mlp"].shape == own.states["layers.1"].shape


def test_scores_are_log_probabilities(llm, reference):
    for ids, *_, normal in reference:
        for cut in {1, len(ids) // 2, len(ids) - 1} & set(range(1, len(ids))):
            [own] = llm.score([ids[:cut]], [ids[cut:]], use_tqdm=False)
            expected = [float(normal[at - 1, ids[at]]) for at in range(cut, len(ids))]
            np.testing.assert_allclose(own.logprobs, expected, atol=2e-4)
            assert own.token_ids == ids[cut:] and own.cumulative_logprob == pytest.approx(sum(expected), abs=2e-3)
