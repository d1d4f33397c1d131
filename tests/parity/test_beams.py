"""Beam search against transformers' `generate(num_beams=...)`: the same tokens and scores."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import loaded
from support.beams import Found, beam_request, search
from support.tiny import CHUNK, CONFIG, HYBRIDS, VOCAB, make_engine, prompt

torch = pytest.importorskip("torch", reason="the reference of the parity tests; it comes with the extra `test`")

import transformers
from support import reference as ref

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("beams")]

MODELS = {
    "llama": ("llama", {}),
    "alternating": ("qwen2", {**CONFIG, **HYBRIDS["alternating"]}),
    "longrope": (
        "phi3",
        {
            "hidden_size": 64,
            "head_dim": None,
            "max_position_embeddings": 256,
            "original_max_position_embeddings": 20,
            "rope_parameters": {
                "rope_theta": 10000.0,
                "rope_type": "longrope",
                "original_max_position_embeddings": 20,
                "short_factor": [1.0 + 0.2 * i for i in range(8)],
                "long_factor": [2.0 + 0.5 * i for i in range(8)],
            },
        },
    ),
}
EOS = [7, 30, 61]
MANY_EOS = [*range(5, 95, 9)]
"""So many EOS ids that beams end at all lengths."""
SEARCHES: dict[str, dict[str, Any]] = {
    "plain": dict(width=4, new=12),
    "one beam": dict(width=1, new=12),
    "wide": dict(width=8, new=10),
    "one token": dict(width=3, new=1),
    "several results": dict(width=5, new=9, num_return_sequences=3),
    "ends": dict(width=4, new=24, eos=EOS),
    "ends early": dict(width=4, new=24, eos=MANY_EOS, early_stopping=True),
    "ends late": dict(width=4, new=24, eos=MANY_EOS, early_stopping="never", length_penalty=2.0),
    "favours short ones": dict(width=4, new=24, eos=MANY_EOS, length_penalty=-1.0),
    "favours long ones": dict(width=5, new=24, eos=MANY_EOS, length_penalty=3.0),
    "canonical": dict(width=4, new=24, eos=EOS, early_stopping="never", length_penalty=0.0),
    "not before": dict(width=4, new=16, eos=MANY_EOS, params=dict(min_tokens=5)),
    "repetition": dict(width=4, new=16, eos=EOS, params=dict(repetition_penalty=1.7)),
    "n-grams": dict(width=3, new=24, params=dict(no_repeat_ngram_size=2)),
}
LENGTHS = (3, CHUNK, 2 * CHUNK + 1)


def transformers_beams(
    model: ref.Model,
    ids: list[int],
    *,
    new: int,
    width: int,
    eos: list[int] | None = None,
    params: dict[str, Any] | None = None,
    num_return_sequences: int | None = None,
    **how: Any,
) -> Found:
    own = dict(params or {})
    if "min_tokens" in own:
        own["min_new_tokens"] = own.pop("min_tokens")
    settings = transformers.GenerationConfig(
        do_sample=False,
        num_beams=width,
        max_new_tokens=new,
        eos_token_id=eos,
        pad_token_id=0,
        use_cache=True,
        num_return_sequences=num_return_sequences or width,
        return_dict_in_generate=True,
        output_scores=True,
        **how,
        **own,
    )
    model.generation_config = settings
    tokens = torch.tensor([ids])
    made = ref.fresh(model).generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=settings)
    results = made.sequences[:, len(ids) :].tolist()
    scores = [float("nan")] * len(results) if width == 1 else made.sequences_scores.tolist()
    ends = [next((i + 1 for i, token in enumerate(result) if token in (eos or ())), len(result)) for result in results]
    return [(result[:end], score) for result, end, score in zip(results, ends, scores, strict=True)]


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Callable[[str], tuple[ref.Model, Path]]:
    """A transformers model and its checkpoint, each created once."""
    known: dict[str, tuple[ref.Model, Path]] = {}

    def get(name: str) -> tuple[ref.Model, Path]:
        if name not in known:
            family, changes = MODELS[name]
            model = ref.model(family, **{k: v for k, v in changes.items() if k != "architectures"})
            known[name] = model, ref.save(model, tmp_path_factory.mktemp(name.replace(" ", "_")))
        return known[name]

    return get


def check(found: Found, expected: Found) -> None:
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    for (_, score), (_, other) in zip(found, expected, strict=True):
        assert other != other or score == pytest.approx(other, abs=1e-4, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *(("llama", how) for how in SEARCHES),
        *(("alternating", how) for how in ("plain", "several results", "ends early", "ends late", "not before")),
        *(("longrope", how) for how in ("plain", "ends")),
    ],
)
def test_beams_are_those_of_transformers(name, how, made):
    """All prompts in one continuous batch."""
    model, folder = made(name)
    runner = loaded.checkpoint_runner(folder)
    config = runner.program.module(runner.params).config
    rope = {"length_key": config.length_key, "recompute_after": config.recompute_after}
    prompts = [prompt(length, i) for i, length in enumerate(LENGTHS)]
    if name == "longrope":
        prompts = [prompt(12)]  # a longer one would make transformers use the other factors from the start
    requests = [beam_request(str(i), ids, rope=rope, **SEARCHES[how]) for i, ids in enumerate(prompts)]
    for result, ids in zip(search(make_engine(runner), requests), prompts, strict=True):
        check(result, transformers_beams(model, ids, **SEARCHES[how]))
        assert all(0 <= token < VOCAB for tokens, _ in result for token in tokens)


def test_search_options_change_results(made):
    """Penalties and stopping rules change results, and beams end before the maximum length."""
    model, _ = made("llama")
    ids = prompt(CHUNK, 1)
    results = {
        how: transformers_beams(model, ids, **SEARCHES[how]) for how in SEARCHES if "ends" in how or "favours" in how
    }
    assert len({str([tokens for tokens, _ in result]) for result in results.values()}) >= 4
    assert any(len(tokens) < 24 for tokens, _ in results["ends early"])
