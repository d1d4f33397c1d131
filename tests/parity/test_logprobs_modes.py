"""`logprobs_mode`: values equal those computed by hand from transformers' logits, for sampled tokens and prompts."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from faults.conftest import SETTINGS
from support import checkpoint

torch = pytest.importorskip("torch", reason="the reference of the parity tests; it comes with the extra `test`")
transformers = pytest.importorskip("transformers")

from jaxinfer import LLM, SamplingParams
from jaxinfer.config import LOGPROBS_MODES
from jaxinfer.outputs import Logprob

PROMPT = [9, 40, 77, 40, 12, 9, 101]
MADE, TOP = 6, 4
BANNED = 57
CASES = {
    "greedy": dict(temperature=0),
    "temperature": dict(temperature=0.6),
    "top-k": dict(temperature=1.3, top_k=3),
    "top-p": dict(temperature=0.8, top_p=0.7),
    "min-p": dict(temperature=0.9, min_p=0.2),
    "penalties": dict(temperature=0.7, presence_penalty=0.5, frequency_penalty=0.3, repetition_penalty=1.4),
    "greedy with penalties": dict(temperature=0, repetition_penalty=1.6, frequency_penalty=0.9),
    "masks": dict(temperature=1.1, allowed_token_ids=list(range(3, 90)), top_k=8),
    "biases": dict(temperature=0, logit_bias={BANNED: -100.0, 33: 2.5}),
    "bad words": dict(temperature=1.5, bad_words=["cat", "hello"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return checkpoint.write(tmp_path_factory.mktemp("modes"), scale=4.0)


@pytest.fixture(scope="module")
def model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def params(case: str) -> SamplingParams:
    return SamplingParams(seed=3, max_tokens=MADE, min_tokens=MADE, logprobs=TOP, prompt_logprobs=TOP, **CASES[case])


def processed(raw: np.ndarray, own: SamplingParams, before: Sequence[int], banned: Sequence[int]) -> np.ndarray:
    """Apply the parameters to the logits `[V]` of the token after `PROMPT` and `before`."""
    logits, made = raw.astype(np.float64), list(before)
    for token, bias in (own.logit_bias or {}).items():
        logits[token] += bias
    if own.allowed_token_ids is not None:
        logits[[v for v in range(len(logits)) if v not in own.allowed_token_ids]] = -np.inf
    logits[[*banned, 1, 2]] = -np.inf  # min_tokens forbids both EOS ids
    for v in {*PROMPT, *made}:
        logits[v] = logits[v] / own.repetition_penalty if logits[v] > 0 else logits[v] * own.repetition_penalty
    for v in set(made):
        logits[v] -= own.frequency_penalty * made.count(v) + own.presence_penalty
    if own.temperature == 0:
        return logits
    logits /= own.temperature
    share = np.exp(logits - logits.max())
    logits[share < own.min_p] = -np.inf
    if own.top_k:
        logits[logits < np.sort(logits)[-own.top_k]] = -np.inf
    order = np.argsort(-logits)
    share = np.exp(logits[order] - logits.max())
    before_each = np.cumsum(share / share.sum()) - share / share.sum()
    logits[order[before_each >= own.top_p]] = -np.inf
    return logits


def hold(found: Mapping[int, Logprob], token: int, values: np.ndarray) -> None:
    """Compare a position's entries with values `[V]` of all tokens."""
    best = np.sort(values)[::-1][:TOP]
    for v, entry in found.items():
        np.testing.assert_allclose(entry.logprob, values[v], rtol=1e-4, atol=2e-4)
    assert token in found and found[token].rank == (values > values[token] + 2e-4).sum() + 1
    np.testing.assert_allclose(sorted((e.logprob for e in found.values()), reverse=True)[:TOP], best, atol=2e-4)


def normal(values: np.ndarray) -> np.ndarray:
    top = values.max()
    return values - top - np.log(np.exp(values - top).sum())


@pytest.mark.parametrize("mode", [pytest.param(m, marks=[pytest.mark.slow] * ("raw" in m)) for m in LOGPROBS_MODES])
@pytest.mark.parametrize("deterministic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_values_are_those_of_transformers_logits(folder, model, mode, deterministic):
    settings = SETTINGS | ({} if not deterministic else dict(decode_buckets=None, prefill_buckets=None))
    with LLM(folder, logprobs_mode=mode, deterministic=deterministic, **settings) as llm:
        own = [params(case) for case in CASES]
        outputs = llm.generate([PROMPT] * len(own), own, use_tqdm=False)
        tokenizer, words = llm.get_tokenizer(), CASES["bad words"]["bad_words"]
        forms = [form for word in words for form in (word, f" {word}")]  # both, as in vLLM
        tokens = [tokenizer.encode(form, add_special_tokens=False) for form in forms]
        banned, used = [ids for ids in tokens if len(ids) == 1], len(tokenizer)
    assert len(banned) > len(words)
    removed = 0
    for case, asked, output in zip(CASES, own, outputs, strict=True):
        [sample] = output.outputs
        ids = [*PROMPT, *sample.token_ids]
        with torch.no_grad():
            raw = model(torch.tensor([ids])).logits[0].numpy().astype(np.float64)
        for at, table in enumerate(sample.logprobs):
            values = raw[len(PROMPT) + at - 1]
            if mode.startswith("processed"):
                masked = np.where(np.arange(len(values)) < used, values, -np.inf)
                words = [ids[0] for ids in banned] if case == "bad words" else []
                values = processed(masked, asked, sample.token_ids[:at], words)
                removed += np.isinf([entry.logprob for entry in table.values()]).sum()
            hold(table, sample.token_ids[at], values if mode.endswith("logits") else normal(values))
        for at, table in enumerate(output.prompt_logprobs[1:], start=1):
            values = raw[at - 1]
            hold(table, PROMPT[at], values if mode.endswith("logits") else normal(values))
        total = sum(table[token].logprob for token, table in zip(sample.token_ids, sample.logprobs, strict=True))
        assert sample.cumulative_logprob == pytest.approx(total, rel=1e-5)
    assert (removed > 0) == mode.startswith("processed")
