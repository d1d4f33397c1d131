"""`return_routed_experts`: the experts that transformers' routers choose, for Qwen3-MoE and Mixtral."""

import numpy as np
import pytest
from faults.conftest import SETTINGS
from support.tiny import OWN, prompt

torch = pytest.importorskip("torch", reason="the reference of the parity tests; it comes with the extra `test`")

from support import reference as ref

from jaxinfer import LLM, SamplingParams
from jaxinfer.errors import ConfigError


@pytest.mark.parametrize("family", ["qwen3_moe", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_experts_are_those_of_transformers(family, tmp_path):
    model = ref.model(family)
    folder, ids = ref.save(model, tmp_path), [prompt(n, n) for n in (1, 20, 45)]
    with LLM(folder, return_routed_experts=True, skip_tokenizer_init=True, **SETTINGS) as llm:
        params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
        outputs = llm.generate(ids, params, use_tqdm=False)
    for own, output in zip(ids, outputs, strict=True):
        [sample] = output.outputs
        whole = [*own, *sample.token_ids]
        with torch.no_grad():
            scores = model(torch.tensor([whole]), output_router_logits=True).router_logits
        count = OWN[family]["num_experts_per_tok"]
        expected = np.stack([np.sort(one.topk(count).indices.numpy(), axis=-1) for one in scores], axis=1)[:-1]
        np.testing.assert_array_equal(np.sort(sample.routed_experts, axis=-1), expected)


def test_a_model_without_experts_is_refused(tmp_path):
    folder = ref.save(ref.model("llama"), tmp_path)
    with pytest.raises(ConfigError, match="this model has no experts"):
        LLM(folder, return_routed_experts=True, skip_tokenizer_init=True, **SETTINGS)
