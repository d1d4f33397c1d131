"""A gpt-oss checkpoint with MXFP4 experts: logits equal transformers' on weights dequantised by its own code."""

import pytest
from safetensors.numpy import load_file
from support import experts
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
    reference = ref.model("gpt_oss", intermediate_size=64)
    folder = ref.save(reference, tmp_path)
    packed = experts.in_mxfp4(load_file(folder / "model.safetensors"))
    for name in [name.removesuffix("_blocks") for name in packed if name.endswith("_blocks")]:
        blocks, scales = (torch.tensor(packed[f"{name}_{part}"]) for part in ("blocks", "scales"))
        reference.get_parameter(name).data.copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
    folder = experts.mxfp4(folder, tmp_path / "packed")
    tokens = list(zip(PROMPTS, FOLLOWING, strict=True))
    expected = [ref.logits(reference, *each) for each in tokens]
    for quantization in (None, "dequantize"):
        found = loaded.logits(folder, PROMPTS, FOLLOWING, quantization=quantization)
        assert_logits_close(folder, reference, found, expected, tokens, 1e-4)
