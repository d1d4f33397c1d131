"""BART and mBART against transformers: encoder output, decoder logits, greedy tokens of texts of mixed lengths.

Tiny checkpoints are created on the fly, written by `save_pretrained` and read by the real loader.
"""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np
import pytest
from support.cross import CONFIG, text
from support.loaded import assert_same_by_name, load
from support.tiny import BLOCK, LENGTH, VOCAB, prompt

torch = pytest.importorskip("torch", reason="the reference of the parity tests; it comes with the extra `test`")

import transformers

from jaxinfer import LLM, SamplingParams, functional
from jaxinfer.functional import DecodeBatch
from jaxinfer.functional.encoder_batch import EncodeJob, encode_batch
from jaxinfer.kv import groups

pytestmark = [pytest.mark.xdist_group("bart"), pytest.mark.slow]

TOLERANCE = 1e-4
"""Absolute tolerance of a float32 logit; ignoring an option must change the logits by 100 times as much."""
TEXTS = (1, BLOCK + 1, 33, LENGTH)
"""Lengths of the texts encoded in one step."""
STARTS, MADE = (1, 9, 2, 5), 6
"""Lengths of the decoder prompts, and number of tokens decoded after them."""

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bart": ("Bart", {}),
    "bart, not scaled, relu": ("Bart", dict(scale_embedding=False, activation_function="relu")),
    "bart, untied": ("Bart", dict(tie_word_embeddings=False)),
    "mbart": ("MBart", {}),
}


@cache
def reference(name: str) -> Any:
    """A model in which all activations are of order one."""
    kind, changes = CASES[name]
    values = {key: value for key, value in CONFIG.items() if key not in ("architectures", "dtype")}
    values |= dict(bos_token_id=0, pad_token_id=1, eos_token_id=2, forced_eos_token_id=None) | changes
    config = getattr(transformers, f"{kind}Config")(**values, attn_implementation="eager")
    made = getattr(transformers, f"{kind}ForConditionalGeneration")(config).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, value in made.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if "norm" in path and path.endswith("weight"):
                value.copy_(1 + 0.4 * noise)
            elif path.endswith("bias") or "shared" in path or "embed" in path or "lm_head" in path:
                value.copy_(0.4 * noise)
            else:
                value.copy_((3 if "encoder_attn" in path else 1.5) * value.shape[1] ** -0.5 * noise)
        made.final_logits_bias.copy_(torch.randn(made.final_logits_bias.shape, generator=generator))
    return made


@cache
def folder(name: str) -> Path:
    """Its checkpoint, cached for the process."""
    _folders.append(TemporaryDirectory(prefix="bart"))
    made = Path(_folders[-1].name)
    reference(name).save_pretrained(made)
    return made


@pytest.mark.parametrize("name", ["bart", "bart, untied"])
def test_the_state_dict_is_taken_and_given_back(name):
    assert_same_by_name(folder(name), {path: value.numpy() for path, value in reference(name).state_dict().items()})


_folders: list[TemporaryDirectory] = []
TOKENS = [text(length, 20 + i) for i, length in enumerate(TEXTS)]


@partial(jax.jit, static_argnums=0)
def _encode(program, params, batch):
    return program.module(params).encode(batch.inputs, functional.encode_step(program, batch))


@partial(jax.jit, static_argnums=0)
def _prefill(program, params, cache, batch):
    hidden, cache = functional.prefill_hidden(program, params, cache, batch)
    return program.module(params).logits(hidden), cache


_fill, _decode = (jax.jit(one, static_argnums=0) for one in (functional.encode_cross, functional.decode))


def batch_and_tables(program) -> tuple[Any, np.ndarray]:
    """All texts in one step, and block tables with interleaved blocks."""
    width, total = LENGTH // BLOCK, program.layout.groups
    tables = np.random.default_rng(0).permutation(total * len(TEXTS) * width).astype(np.int32)
    tables = tables.reshape(total, len(TEXTS), width)
    span = groups.encoded(program.layout.kinds).span
    jobs = [EncodeJob(one, tables[span, row], 0) for row, one in enumerate(TOKENS)]
    return encode_batch(program.cross, jobs, BLOCK, tables.size), tables


@pytest.mark.parametrize("name", CASES)
def test_the_encoders_output(name: str):
    program, params = load(folder(name))
    found = np.asarray(_encode(program, params, batch_and_tables(program)[0]))
    for one, rows in zip(TOKENS, np.split(found, np.cumsum(TEXTS)[:-1]), strict=True):
        with torch.no_grad():
            expected = reference(name).model.encoder(torch.tensor(one.values[None]).long()).last_hidden_state[0].numpy()
        np.testing.assert_allclose(rows, expected, atol=TOLERANCE)


def logits(model: Any) -> list[np.ndarray]:
    """Logits of the reference, each text by itself: `[T, V]` at all decoder positions."""
    found = []
    for one, ids in zip(TOKENS, DECODED, strict=True):
        with torch.no_grad():
            out = model(input_ids=torch.tensor(one.values[None]).long(), decoder_input_ids=torch.tensor([ids]))
        found.append(out.logits[0].numpy())
    return found


DECODED = [[2, *prompt(start + MADE - 1, 60 + i)] for i, start in enumerate(STARTS)]


@pytest.mark.parametrize("name", CASES)
def test_logits_of_the_decoder(name: str):
    """Prompts of mixed lengths in one prefill, then decoded one token at a time together."""
    program, params = load(folder(name))
    batch, tables = batch_and_tables(program)
    cache = _fill(program, params, functional.init_cache(program, tables.size, BLOCK), batch)
    seen = np.array([(0, length) for length in TEXTS], np.int32)
    chunks = [(np.array(ids[:start], np.int32), 0, start) for ids, start in zip(DECODED, STARTS, strict=True)]
    step = functional.prefill_batch(chunks, tables, tokens=24, seen=np.repeat(seen, STARTS, axis=0))
    flat, cache = _prefill(program, params, cache, step)
    ends = np.cumsum(STARTS)
    found = [[part] for part in np.split(np.asarray(flat)[: ends[-1]], ends[:-1])]
    for made in range(MADE):
        at = np.array(STARTS) + made
        last = np.array([ids[place] for ids, place in zip(DECODED, at, strict=True)], np.int32)
        rows, cache = _decode(program, params, cache, DecodeBatch(last, at.astype(np.int32), tables, seen=seen))
        for parts, row in zip(found, np.asarray(rows), strict=True):
            parts.append(row[None])
    for parts, expected in zip(found, logits(reference(name)), strict=True):
        np.testing.assert_allclose(np.concatenate(parts)[:, :VOCAB], expected, atol=TOLERANCE)


def weights(ending: str, change: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Return a function that changes weights whose names have this ending, in place."""

    def apply(model: Any) -> None:
        named = [v for n, v in [*model.named_parameters(), *model.named_buffers()] if n.endswith(ending)]
        assert named, ending
        with torch.no_grad():
            for value in named:
                value.copy_(change(value))

    return apply


def unscaled(model: Any) -> None:
    for part in (model.model.encoder, model.model.decoder):
        part.embed_tokens.embed_scale = 1.0


OVERLOOKED = {
    "scale_embedding": unscaled,
    "final_logits_bias": weights("final_logits_bias", torch.zeros_like),
    "the offset of positions": weights("embed_positions.weight", lambda value: torch.roll(value, 2, dims=0)),
    "layernorm_embedding": weights("layernorm_embedding.weight", torch.ones_like),
    "the bias of v in cross-attention": weights("encoder_attn.v_proj.bias", torch.zeros_like),
    "what is read": weights("encoder_attn.out_proj.weight", torch.zeros_like),
}


@pytest.mark.parametrize("option", OVERLOOKED)
def test_every_option_changes_logits(option: str):
    import copy

    changed = copy.deepcopy(reference("bart"))
    OVERLOOKED[option](changed)
    moved = [np.abs(a - b).max() for a, b in zip(logits(reference("bart")), logits(changed), strict=True)]
    assert min(moved) > 100 * TOLERANCE, option


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("bart", {}),
        ("bart", dict(no_repeat_ngram_size=3, forced_bos_token_id=0, forced_eos_token_id=2)),
        ("mbart", dict(no_repeat_ngram_size=1, forced_bos_token_id=7)),
        ("mbart", dict(repetition_penalty=1.3, forced_eos_token_id=2, no_repeat_ngram_size=2)),
    ],
)
def test_greedy_tokens(name: str, how: dict[str, Any]):
    """Texts of mixed lengths, twice as many as run at a time, with options of generation_config.json."""
    texts = [text(length, 80 + length) for length in (1, 3, BLOCK, 17, 31, 33, 64, LENGTH - 1, LENGTH)]
    made = 24
    with engine(name) as llm:
        params = SamplingParams(temperature=0, max_tokens=made, **how)
        found = [
            o.outputs[0].token_ids for o in llm.generate([t.values.tolist() for t in texts], params, use_tqdm=False)
        ]
    for one, tokens in zip(texts, found, strict=True):
        ids = torch.tensor(one.values[None]).long()
        expected = reference(name).generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=1, max_new_tokens=made, **how
        )
        assert [2, *tokens] == expected[0].tolist()
    assert len({tuple(tokens) for tokens in found}) > len(texts) // 2


@pytest.mark.parametrize(
    "how",
    [
        dict(),
        dict(length_penalty=2.0, early_stopping=True, no_repeat_ngram_size=3, min_tokens=6),
        dict(forced_bos_token_id=0, forced_eos_token_id=2, early_stopping="never"),
    ],
    ids=["plain", "as for summaries", "forced"],
)
@pytest.mark.parametrize("name", ["bart", "mbart"])
def test_beams_of_texts(name, how):
    """The same tokens and scores as transformers' beams, with all texts in one batch."""
    texts, made, width = [text(length, 60 + length) for length in (1, BLOCK, 31, LENGTH)], 16, 4
    search = {key: how[key] for key in ("length_penalty", "early_stopping") if key in how}
    own = {key: value for key, value in how.items() if key not in search}
    with engine(name) as llm:
        found = llm.beam_search(
            [t.values.tolist() for t in texts], width, made, **search, sampling_params=SamplingParams(**own)
        )
    theirs = {"min_new_tokens" if key == "min_tokens" else key: value for key, value in own.items()}
    for one, result in zip(texts, found, strict=True):
        ids = torch.tensor(one.values[None]).long()
        expected = reference(name).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_beams=width,
            num_return_sequences=width,
            max_new_tokens=made,
            return_dict_in_generate=True,
            output_scores=True,
            **theirs,
            **search,
        )
        tokens = [
            row[1 : 1 + len(beam.token_ids)]
            for row, beam in zip(expected.sequences.tolist(), result.outputs, strict=True)
        ]
        assert [list(beam.token_ids) for beam in result.outputs] == tokens
        scores = [beam.score for beam in result.outputs]
        np.testing.assert_allclose(scores, expected.sequences_scores.numpy(), rtol=1e-5, atol=1e-4)


def engine(name: str) -> LLM:
    """An engine for a checkpoint, with few compiled steps."""
    return LLM(
        folder(name),
        skip_tokenizer_init=True,
        dtype="float32",
        block_size=BLOCK,
        max_num_seqs=4,
        check_invariants=True,
        decode_buckets=[4],
        prefill_buckets=[32],
        max_num_batched_tokens=32,
        kv_cache_memory_bytes=1 << 22,
        use_tqdm=False,
    )
