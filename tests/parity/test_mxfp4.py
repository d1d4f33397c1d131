"""A gpt-oss checkpoint with MXFP4 experts: logits equal transformers' on weights dequantised by its own code."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.tiny import prompt

pytest.importorskip("torch", reason="the reference of the parity tests; it comes with the extra `test`")

import torch
from support import loaded
from support import reference as ref
from support.layers import assert_logits_close
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("gpt_oss")]

PROMPTS = [prompt(length, seed) for seed, length in enumerate((7, 8, 9, 40))]
FOLLOWING = [prompt(4, 10 + seed) for seed in range(4)]


def test_logits_equal_transformers(tmp_path):
    reference, rng = ref.model("gpt_oss", intermediate_size=64), np.random.default_rng(0)
    folder = ref.save(reference, tmp_path)
    tensors, packed = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inner, out = tensors.pop(name).shape
        packed[f"{name}_blocks"] = rng.integers(0, 256, (experts, out, inner // 32, 16)).astype(np.uint8)
        packed[f"{name}_scales"] = rng.integers(122, 125, (experts, out, inner // 32)).astype(np.uint8)
        blocks, scales = (torch.tensor(packed[f"{name}_{part}"]) for part in ("blocks", "scales"))
        reference.get_parameter(name).data.copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
    save_file(tensors | packed, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    tokens = list(zip(PROMPTS, FOLLOWING, strict=True))
    expected = [ref.logits(reference, *each) for each in tokens]
    assert_logits_close(folder, reference, loaded.logits(folder, PROMPTS, FOLLOWING), expected, tokens, 1e-4)
