"""Fuzz config.json and generation_config.json, from published models."""

import functools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from fuzzing.mutations import broken
from fuzzing.part import Part
from jaxinfer.checkpoint.hf import read_config, read_generation_config
from jaxinfer.inputs import generation_config as generation
from jaxinfer.loading import weights
from jaxinfer.sharding import make_mesh

PUBLISHED = Path(__file__).resolve().parents[2] / "tests/real/configs"
LAYERS = ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_global_layers")
LISTS = ("layer_types",)
SHALLOW = 0.1
"""Share of inputs made from a two-layer model, whose module is built too."""

GENERATION: tuple[dict[str, Any], ...] = (
    dict(
        bos_token_id=128000,
        do_sample=True,
        eos_token_id=[128001, 128008, 128009],
        temperature=0.6,
        top_p=0.9,
        transformers_version="4.42.3",
    ),
    dict(
        do_sample=True,
        eos_token_id=[151645, 151643],
        pad_token_id=151643,
        repetition_penalty=1.05,
        temperature=0.7,
        top_k=20,
        top_p=0.8,
    ),
    dict(
        decoder_start_token_id=2,
        early_stopping=True,
        eos_token_id=2,
        forced_bos_token_id=0,
        forced_eos_token_id=2,
        length_penalty=2.0,
        max_length=142,
        min_length=56,
        no_repeat_ngram_size=3,
        num_beams=4,
    ),
    dict(
        alignment_heads=[[2, 2], [3, 0]],
        begin_suppress_tokens=[220, 50257],
        decoder_start_token_id=50258,
        eos_token_id=50257,
        is_multilingual=True,
        lang_to_id={"<|en|>": 50259, "<|de|>": 50261},
        max_initial_timestamp_index=50,
        max_length=448,
        no_timestamps_token_id=50363,
        suppress_tokens=[1, 2, 7],
        task_to_id={"transcribe": 50359, "translate": 50358},
    ),
    dict(bad_words_ids=[[1, 2], [3]], max_new_tokens=7, stop_strings=["x"], suppress_tokens=[4], temperature=1.0),
)


@functools.cache
def published(name: str | None = None) -> list[dict[str, Any]]:
    """Return all published configurations, or the one of a file."""
    return [json.loads(path.read_text()) for path in sorted(PUBLISHED.glob(f"{name or '*'}.json"))]


def shallow(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with two layers of each kind of stack."""
    made = {name: shallow(value) if isinstance(value, dict) else value for name, value in config.items()}
    made |= {name: 2 for name in LAYERS if name in made}
    return made | {name: made[name][:2] for name in LISTS if isinstance(made.get(name), list)}


def make_config(rng: random.Random, folder: Path) -> Callable[[], object]:
    """Corrupt a published config.json; some inputs are two-layer models, whose module is built."""
    config = rng.choice(published())
    small = rng.random() < SHALLOW
    (folder / "config.json").write_text(json.dumps(broken(rng, shallow(config) if small else config)))

    def read() -> None:
        hf = read_config(folder)
        model_family, parsed = weights.parse(hf, folder)
        weights.resolve_dtype("auto", weights.config_dtype(hf) or model_family.stored_dtype, "gpu", model_family)
        for name in ("max_length", "query_group", "features", "cross", "recompute_after"):
            getattr(parsed, name)
        parsed.length_key(100)
        generation.eos_ids(hf, {})
        if small:
            weights.abstract(model_family, parsed, jnp.dtype("bfloat16"), make_mesh(1))

    return read


def make_generation(rng: random.Random, folder: Path) -> Callable[[], object]:
    """Corrupt a generation_config.json, and read it for a decoder, an encoder-decoder and Whisper."""
    made = broken(rng, rng.choice(GENERATION))
    (folder / "generation_config.json").write_text(json.dumps(made))
    whisper = published("whisper-tiny")[0]
    step = rng.randrange(5)

    def read() -> None:
        said = read_generation_config(folder)
        if step == 0:
            generation.default_params(said)
        elif step == 1:
            generation.default_params(said, encoder_decoder=True)
        elif step == 2:
            generation.from_generation_config(said)
        elif step == 3:
            weights.parse(whisper, folder)
        else:
            generation.eos_ids(whisper, said)
            for name in generation.FORCED:
                generation.forced_id(said, name)

    return read


PARTS = (Part("config", make_config), Part("generation_config", make_generation))
