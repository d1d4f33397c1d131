"""Write tiny Hugging Face checkpoints with a tokenizer, without torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from jaxinfer.checkpoint import rules
from jaxinfer.loading import save
from jaxinfer.loading import weights as loading
from jaxinfer.sharding import make_mesh

PADDED_VOCAB = 320
"""Rows of the embedding, more than the tokenizer's ids."""
SPECIAL = ("<s>", "</s>", "<|end|>")
"""Special tokens with ids 0, 1 and 2; the last two are EOS tokens."""
CHAT = (
    "<s>{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
CONFIG = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    vocab_size=PADDED_VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    dtype="float32",
    bos_token_id=0,
    eos_token_id=1,
)
"""config.json; generation_config.json names a second EOS."""


def tensors(hf: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Return random weights of a model under their checkpoint names, from its weight table."""
    model_family, config = loading.parse(hf)
    found = save.tensors(
        loading.random(hf, make_mesh(1), dtype="float32", seed=seed), model_family.weight_rules(config)
    )
    return {name: np.ascontiguousarray(model_family.restore(name, value)) for name, value in found.items()}


def shaped(hf: Mapping[str, Any], dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Return random tensors in the shapes of a configuration's weight table, without compiling a program."""
    model_family, config = loading.parse(hf)
    wanted = rules.parameters(loading.abstract(model_family, config, np.dtype(np.float32), make_mesh()))
    rng, found = np.random.default_rng(0), {}
    for rule in model_family.weight_rules(config):
        if rule.target is None or rule.tied:
            continue
        param = wanted[rule.target]
        metadata = param.get_metadata()
        rows = {output.name: output.rows for output in metadata.get("outputs", ())}
        stack, shape = (param.shape[:1], param.shape[1:]) if metadata.get("stacked") else ((), param.shape)
        shape = (
            (sum(rows[part] for part in rule.parts), *shape[2:]) if rule.parts else metadata.get("unpadded") or shape
        )
        found[rule.source] = rng.standard_normal((*stack, *shape), np.float32).astype(dtype)
    return {name: np.ascontiguousarray(model_family.restore(name, value)) for name, value in found.items()}


def tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on two sentences, with a chat template; non-ASCII characters take several tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=list(SPECIAL), show_progress=False
    )
    backend.train_from_iterator(["hello world, the cat sat on the mat"] * 3, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    made.chat_template = CHAT
    return made


def write(
    folder: Path,
    changes: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    with_tokenizer: bool = True,
    scale: float = 1.0,
) -> Path:
    """Write a checkpoint to `folder`: weights, config.json, generation_config.json and, by default, the tokenizer.

    `scale` multiplies the LM head: a larger scale makes the next-token distribution sharper.
    """
    hf = CONFIG | dict(changes or {})
    folder.mkdir(parents=True, exist_ok=True)
    weights = tensors(hf, seed)
    if "lm_head.weight" in weights:
        weights["lm_head.weight"] = weights["lm_head.weight"] * np.float32(scale)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(hf))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2], "max_new_tokens": 16}))
    if with_tokenizer:
        tokenizer().save_pretrained(folder)
    return folder
