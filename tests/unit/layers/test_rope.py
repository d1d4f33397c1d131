"""Rotary embeddings: hand-computed values for every type, and equality with transformers if torch is installed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.errors import ConfigError
from jaxinfer.layers import rope as ropes
from jaxinfer.layers.rope import apply_rope, rope_frequencies
from jaxinfer.layers.rope_config import ROPE_KINDS, RopeConfig

cos_sin = jax.jit(ropes.cos_sin, static_argnums=0)
"""Jitted, so that each configuration and length compiles one program instead of one per operation."""


def config(max_position=64, theta=10000.0, **parameters):
    """Make a config.json of transformers 5 with these rope parameters."""
    return {"max_position_embeddings": max_position, "rope_parameters": {"rope_theta": theta, **parameters}}


def tokens(*values):
    return jnp.asarray(values, jnp.int32)


# Wavelengths with theta 10000 are 1, 10, 100, 1000 for 8 dims and 1, 100 for 4.
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1000,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1000}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 2.0],
    "long_factor": [4.0, 8.0],
    "original_max_position_embeddings": 16,
}
BY_HAND = [
    ({}, 4, [1, 0.01], 1.0),
    ({"rope_type": "default", "partial_rotary_factor": 0.5}, 8, [1, 0.01], 1.0),
    ({"rope_type": "linear", "factor": 2.0}, 4, [0.5, 0.005], 1.0),
    ({"rope_type": "dynamic", "factor": 2.0}, 4, [1, 0.01], 1.0),
    # Wavelength 628 lies between 250 and 1000: smooth = (1000/628.32 - 1) / 3 = 0.197183.
    (LLAMA3, 8, [1, 0.1, 0.802817 * 0.01 / 8 + 0.197183 * 0.01, 0.001 / 8], 1.0),
    # The ramp runs from dim floor(0.70) = 0 to ceil(2.20) = 3: 0, 1/3, 2/3, 1 of a quarter of the frequency.
    ({**LLAMA3, "high_freq_factor": 1.0}, 8, [1, 0.1, 0.01, 0.001 / 8], 1.0),
    (YARN, 8, [1, 0.075, 0.005, 0.00025], 1.1386294),
    # Without truncation the ramp at dims 1 and 2 is 0.201528 and 0.865914.
    (
        {**YARN, "truncate": False},
        8,
        [1, 0.1 * (1 - 0.75 * 0.20152799), 0.01 * (1 - 0.75 * 0.86591361), 0.00025],
        1.1386294,
    ),
    # The ramp's ends, -2 and 1, or -2 and 0, are clamped to the existing dims.
    ({**YARN, "original_max_position_embeddings": 16}, 8, [1, 0.025, 0.0025, 0.00025], 1.1386294),
    ({**YARN, "original_max_position_embeddings": 6}, 8, [1, 0.025, 0.0025, 0.00025], 1.1386294),
    ({**YARN, "attention_factor": 0.5}, 8, [1, 0.075, 0.005, 0.00025], 0.5),
    ({**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}, 8, [1, 0.075, 0.005, 0.00025], 1.1386294 / 1.0693147),
    (LONGROPE, 4, [1, 0.005], 1.2247449),  # sqrt(1 + ln(64/16) / ln 16)
    ({**LONGROPE, "factor": 16.0}, 4, [1, 0.005], 1.4142136),
]


@pytest.mark.parametrize(("parameters", "head_dim", "inv_freq", "scaling"), BY_HAND)
def test_frequencies_are_those_worked_out_by_hand(parameters, head_dim, inv_freq, scaling):
    found = rope_frequencies(RopeConfig.from_hf(config(**parameters), head_dim))
    assert found.inv_freq.dtype == np.float32
    np.testing.assert_allclose(found.inv_freq, inv_freq, rtol=2e-6)
    assert found.attention_scaling == pytest.approx(scaling, rel=1e-6)


def test_cos_and_sin_carry_position_and_scaling():
    rope = RopeConfig.from_hf(config(rope_type="yarn", factor=4.0, original_max_position_embeddings=1000), 8)
    cos, sin = cos_sin(rope, tokens(0, 3), tokens(2, 2))
    angles = 3 * np.asarray([1, 0.075, 0.005, 0.00025])
    np.testing.assert_allclose(cos, 1.1386294 * np.stack([np.ones(4), np.cos(angles)]), rtol=1e-6)
    np.testing.assert_allclose(sin, 1.1386294 * np.stack([np.zeros(4), np.sin(angles)]), rtol=1e-6)


def test_dynamic_stretches_the_base_with_each_tokens_length():
    rope = RopeConfig.from_hf(config(max_position=8, theta=100.0, rope_type="dynamic", factor=2.0), 4)
    # At length 12: stretch 2*12/8 - 1 = 2, base 100 * 2**(4/2) = 400, second frequency 400**-0.5.
    cos, sin = jax.jit(cos_sin, static_argnums=0)(rope, tokens(1, 1, 1, 1), tokens(0, 8, 12, 9))
    second = np.asarray([0.1, 0.1, 0.05, (100 * 1.25**2) ** -0.5])
    np.testing.assert_allclose(sin, np.sin(np.stack([np.ones(4), second], -1)), rtol=1e-6)
    np.testing.assert_allclose(cos, np.cos(np.stack([np.ones(4), second], -1)), rtol=1e-6)


def test_longrope_changes_set_beyond_the_original_length():
    rope = RopeConfig.from_hf(config(**LONGROPE), 4)
    _, sin = cos_sin(rope, tokens(1, 1, 1), tokens(1, 16, 17))
    angles = np.asarray([[1, 0.005], [1, 0.005], [0.25, 0.00125]])
    np.testing.assert_allclose(sin, 1.2247449 * np.sin(angles), rtol=1e-6)


def test_only_dynamic_and_longrope_depend_on_length_and_salt_the_cache():
    dynamic = RopeConfig.from_hf(config(max_position=8, rope_type="dynamic", factor=2.0), 4)
    longrope = RopeConfig.from_hf(config(**LONGROPE), 4)
    yarn = RopeConfig.from_hf(config(**YARN), 8)
    assert [rope.depends_on_length for rope in (dynamic, longrope, yarn)] == [True, True, False]
    assert dynamic.length_key(8) == longrope.length_key(16) == yarn.length_key(10**6) == b""
    assert longrope.length_key(17) == longrope.length_key(40) == b"long"
    assert len({dynamic.length_key(length) for length in (8, 9, 10)}) == 3


@pytest.mark.parametrize("rotated", [6, None])
def test_scores_of_deinterleaved_heads_are_those_of_neighbouring_pairs(rotated: int | None):
    """Columns (2i, 2i + 1) of the first R are one complex number each, which rope multiplies by e^(i angle)."""
    q, k = np.random.default_rng(0).standard_normal((2, 5, 3, 8)).astype(np.float32)
    pairs = (rotated or 8) // 2
    angles = np.arange(5)[:, None] * 0.7 ** np.arange(pairs)

    def turned(x: np.ndarray) -> np.ndarray:
        numbers = (x[..., : 2 * pairs : 2] + 1j * x[..., 1 : 2 * pairs : 2]) * np.exp(1j * angles)[:, None]
        return np.concatenate([numbers.real, numbers.imag, x[..., 2 * pairs :]], axis=-1)

    found = [apply_rope(ropes.deinterleave(jnp.array(x), rotated), jnp.cos(angles), jnp.sin(angles)) for x in (q, k)]
    np.testing.assert_allclose((found[0] * found[1]).sum(-1), (turned(q) * turned(k)).sum(-1), atol=1e-5)
    np.testing.assert_allclose(found[0], turned(q), atol=1e-5)


def test_apply_rope_rotates_the_first_dims_of_any_shape():
    quarter_turn, eighth = np.pi / 2, np.pi / 4
    cos = jnp.cos(jnp.asarray([[0.0, 0.0], [quarter_turn, eighth]]))
    sin = jnp.sin(jnp.asarray([[0.0, 0.0], [quarter_turn, eighth]]))
    x = np.broadcast_to(np.asarray([1.0, 2.0, 3.0, 4.0, 5.0], np.float32), (2, 3, 2, 5))
    found = np.asarray(apply_rope(jnp.asarray(x), cos, sin))
    np.testing.assert_array_equal(found[0], x[0])
    root = 2**-0.5
    expected = [-3, (2 - 4) * root, 1, (4 + 2) * root, 5]
    np.testing.assert_allclose(found[1], np.broadcast_to(expected, (3, 2, 5)), rtol=1e-6, atol=1e-6)
    assert apply_rope(jnp.asarray(x, jnp.bfloat16), cos, sin).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 500.0}, {"rope_theta": 500.0}),
        ({"rope_theta": 500.0, "rope_scaling": None}, {"rope_theta": 500.0, "rope_type": "default"}),
        (
            {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.0},
        ),
        ({"partial_rotary_factor": 0.5}, {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
        ({"rope_scaling": {**LONGROPE, "rope_type": "su"}}, LONGROPE),
        ({"rope_scaling": {**LONGROPE, "rope_type": "yarn"}}, LONGROPE),
        ({"rope_scaling": {**YARN, "finetuned": True}}, YARN),
    ],
)
def test_both_styles_of_config_give_the_same_rope(old, new):
    head_dim = 4 if "short_factor" in new else 8
    expected = RopeConfig.from_hf({"max_position_embeddings": 64, "rope_parameters": new}, head_dim)
    assert RopeConfig.from_hf({"max_position_embeddings": 64, **old}, head_dim) == expected
    assert hash(expected) == hash(dataclasses.replace(expected))


def test_the_top_level_original_length_comes_first():
    found = RopeConfig.from_hf({**config(**LONGROPE), "original_max_position_embeddings": 32}, 4)
    assert found.original_max_position == 32
    without = {name: value for name, value in YARN.items() if name != "original_max_position_embeddings"}
    assert RopeConfig.from_hf(config(**without), 8).original_max_position == 64


def test_what_transformers_ignores_is_ignored_and_logged(caplog):
    rope = RopeConfig.from_hf(config(rope_type="linear", factor=2.0, beta_fast=32), 4)
    assert rope.beta_fast is None
    assert "beta_fast" in caplog.text


def test_sections_of_multimodal_rope_do_not_matter_for_text():
    """A token of text has the same position in time, height and width."""
    sections = {"mrope_section": [1, 1, 2], "mrope_interleaved": True}
    plain, stated = (RopeConfig.from_hf(config(rope_type="default", **more), 8) for more in ({}, sections))
    assert plain == stated


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"rope_type": "mrope", "mrope_section": [1, 1]}, ["'mrope'", *ROPE_KINDS]),
        ({"rope_type": ["yarn"]}, ["['yarn']", *ROPE_KINDS]),
        ({"rope_type": "default", "axial_section": [1, 1]}, ["axial_section=[1, 1]", "hf_overrides"]),
        ({"rope_type": "linear"}, ["factor", "linear"]),
        ({"rope_type": "linear", "factor": None}, ["factor", "null"]),
        ({"rope_type": "linear", "factor": 0}, ["factor", "0"]),
        ({"rope_type": "linear", "factor": True}, ["factor", "True"]),
        ({"rope_type": "linear", "factor": float("nan")}, ["factor", "nan"]),
        ({"rope_type": "linear", "factor": "2"}, ["factor", "'2'"]),
        ({"rope_theta": 1}, ["rope_theta", "1.0"]),
        ({"rope_theta": -5}, ["rope_theta", "-5"]),
        ({"partial_rotary_factor": 1.5}, ["partial_rotary_factor", "1.5"]),
        ({"partial_rotary_factor": 0.1}, ["head_dim=8", "even"]),
        ({"partial_rotary_factor": 0.4}, ["head_dim=8", "3 rotary dims"]),
        ({"rope_type": "dynamic", "factor": 2.0, "partial_rotary_factor": 0.25}, ["dynamic", "2"]),
        ({**LLAMA3, "low_freq_factor": 4.5}, ["high_freq_factor=4.0", "low_freq_factor=4.5"]),
        ({**LLAMA3, "low_freq_factor": None}, ["low_freq_factor", "null"]),
        ({**LONGROPE, "short_factor": [1.0]}, ["short_factor", "1", "4"]),
        ({**LONGROPE, "long_factor": 3.0}, ["long_factor", "3.0"]),
        ({**YARN, "truncate": "no"}, ["truncate", "'no'"]),
        ({**YARN, "original_max_position_embeddings": 1}, ["original_max_position_embeddings", "1"]),
    ],
)
def test_bad_rope_parameters_are_named(parameters, named):
    with pytest.raises(ConfigError) as error:
        RopeConfig.from_hf(config(**parameters), 8)
    for text in named:
        assert text in str(error.value)


@pytest.mark.parametrize(
    ("hf", "named"),
    [
        ({"max_position_embeddings": 64, "rope_scaling": "yarn"}, "rope_scaling"),
        ({"rope_theta": 10000.0}, "max_position_embeddings"),
        ({**config(), "rope_theta": 5e5}, "rope_theta=500000.0"),
    ],
)
def test_bad_rope_fields_are_named(hf, named):
    with pytest.raises(ConfigError, match=named):
        RopeConfig.from_hf(hf, 8)


# --- Equality with transformers ---------------------------------------------------------------------

THETA = 500000.0
SETS = {"short_factor": [1.0 + 0.1 * i for i in range(6)], "long_factor": [2.0 + 0.5 * i for i in range(6)]}
REFERENCE = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "linear-partial": {"rope_type": "linear", "factor": 3.0, "partial_rotary_factor": 0.5},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "dynamic-partial": {"rope_type": "dynamic", "factor": 3.0, "partial_rotary_factor": 0.5},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "llama3-partial": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
        "partial_rotary_factor": 0.5,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn-ratio": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16},
    "yarn-partial": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
        "truncate": False,
        "partial_rotary_factor": 0.5,
    },
    "proportional": {"rope_type": "proportional", "factor": 2.0},
    "proportional-partial": {"rope_type": "proportional", "partial_rotary_factor": 0.45},
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": 16, **SETS},
    "longrope-factor": {"rope_type": "longrope", "original_max_position_embeddings": 16, "factor": 2.0, **SETS},
}


def reference(parameters, head_dim):
    """Make transformers' rotary module and the config.json that its configuration is saved as."""
    pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    hf = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=64,
        rope_parameters={"rope_theta": THETA, **parameters},
    )
    return LlamaRotaryEmbedding(hf), hf.to_dict()


def reference_cos_sin(module, positions):
    import torch

    cos, sin = module(torch.zeros(1, dtype=torch.float32), torch.tensor([positions]))
    half = cos.shape[-1] // 2
    return cos[0, :, :half].numpy(), sin[0, :, :half].numpy()


@pytest.mark.parametrize("name", REFERENCE)
def test_frequencies_equal_transformers(name):
    head_dim = 24 if "partial" in name else 12
    module, hf = reference(REFERENCE[name], head_dim)
    found = rope_frequencies(RopeConfig.from_hf(hf, head_dim))
    # Two units in the last place: torch's vectorised pow is not correctly rounded.
    np.testing.assert_allclose(found.inv_freq, module.inv_freq.numpy(), rtol=2.4e-7, atol=0)
    assert found.attention_scaling == pytest.approx(module.attention_scaling, rel=1e-12)


@pytest.mark.parametrize("name", REFERENCE)
@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 200])
def test_a_prompt_of_any_length_equals_transformers(name, length):
    head_dim = 24 if "partial" in name else 12
    module, hf = reference(REFERENCE[name], head_dim)
    rope = RopeConfig.from_hf(hf, head_dim)
    expected = reference_cos_sin(module, list(range(length)))
    found = cos_sin(rope, np.arange(200), np.full(200, length))  # one program for all lengths
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours[:length], theirs, atol=2e-5)


@pytest.mark.parametrize("name", ["dynamic", "dynamic-partial", "longrope"])
def test_generated_tokens_use_the_length_they_were_made_at(name):
    head_dim = 24 if "partial" in name else 12
    module, hf = reference(REFERENCE[name], head_dim)
    rope = RopeConfig.from_hf(hf, head_dim)
    prompt, positions = 14, list(range(14, 70))
    reference_cos_sin(module, list(range(prompt)))
    expected = [reference_cos_sin(module, [position]) for position in positions]
    cos, sin = cos_sin(rope, jnp.asarray(positions), jnp.asarray(positions) + 1)
    np.testing.assert_allclose(cos, np.concatenate([c for c, _ in expected]), atol=1e-5)
    np.testing.assert_allclose(sin, np.concatenate([s for _, s in expected]), atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rotation_equals_transformers_phi3(dtype):
    torch = pytest.importorskip("torch")
    from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb

    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 2, 3, 16)).astype(np.float32)
    angles = rng.normal(size=(5, 4)).astype(np.float32)
    cos, sin = np.cos(angles), np.sin(angles)
    wide = [torch.tensor(np.concatenate([v, v], -1)).to(getattr(torch, dtype))[None] for v in (cos, sin)]
    heads_first = torch.tensor(x).reshape(1, 5, 6, 16).transpose(1, 2).to(getattr(torch, dtype))
    expected, _ = apply_rotary_pos_emb(heads_first, heads_first, *wide)
    expected = expected.transpose(1, 2).reshape(5, 2, 3, 16).float().numpy()
    found = apply_rope(jnp.asarray(x, dtype), jnp.asarray(cos), jnp.asarray(sin)).astype(jnp.float32)
    np.testing.assert_allclose(found, expected, atol=1e-6 if dtype == "float32" else 2e-2)
