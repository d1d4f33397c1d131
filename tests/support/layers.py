"""Compare a decoder with its reference layer by layer, to name the first layer that differs. Needs torch."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

from jaxinfer import functional
from jaxinfer.functional import PrefillBatch, Program
from jaxinfer.kernels.attention.paged import Cache
from support import loaded
from support.reference import Model, fresh

FINAL_NORMS = "norm", "embedding_norm", "final_layernorm", "norm_f"
"""Attribute of a decoder of transformers with the norm before the head, by family."""


def assert_logits_close(
    folder: Path,
    reference: Model,
    ours: Sequence[np.ndarray],
    theirs: Sequence[np.ndarray],
    tokens: Sequence[tuple[Sequence[int], Sequence[int]]],
    tolerance: float,
) -> None:
    """Assert that the logits of a batch agree; a failure names the first layer that differs.

    The layers are compared in one prefill of the sequence whose logits differ most, up to the first position that
    differs: a window, for example, may change nothing in a shorter sequence.

    Args:
        folder: checkpoint that jaxinfer has loaded.
        reference: transformers model that the checkpoint was saved from.
        ours: logits `[T, V]` of jaxinfer, an array for each sequence.
        theirs: logits of the reference.
        tokens: prompt and decoded tokens of each sequence, `T` in all.
        tolerance: largest absolute difference of a logit.
    """
    worst = [np.abs(a - b).max(axis=1) for a, b in zip(ours, theirs, strict=True)]
    if all((each <= tolerance).all() for each in worst):
        return
    # NaN counts as the largest difference.
    number = int(np.argmax([np.where(np.isnan(each), np.inf, each).max() for each in worst]))
    (prompt, following), each = tokens[number], worst[number]
    first = int(np.argmax(~(each <= tolerance)))
    where = f"position {first} of the prompt" if first < len(prompt) else f"decode step {first - len(prompt)}"
    raise AssertionError(
        f"logits of prompt {number} ({len(prompt)} tokens) differ by up to {each.max():.3g} (tolerance {tolerance:g}), "
        f"first at {where}\n" + compare_layers(folder, reference, [*prompt, *following][: first + 1], tolerance)
    )


def compare_layers(folder: Path, reference: Model, tokens: Sequence[int], tolerance: float) -> str:
    """Return a table of the differences after each layer; the last line names the first layer that differs.

    A hidden state may differ by `tolerance` times the largest hidden state of the reference, or times 1.
    """
    ours, theirs = hidden_states(folder, tokens), reference_hidden_states(reference, tokens)
    names = ["embedding", *(f"layer {number}" for number in range(len(theirs) - 2)), "final norm"]
    lines, first = [], None
    for name, a, b in zip(names, ours, theirs, strict=True):
        difference, limit = float(np.abs(a - b).max()), tolerance * max(1.0, float(np.abs(b).max()))
        if not difference <= limit and first is None:
            first = name
        lines.append(f"  {name:<10}  {difference:.3g} (limit {limit:.3g})")
    verdict = "no layer differs in a prefill of these tokens: compare the head and the decode steps"
    return "\n".join(["hidden states differ by", *lines, verdict if first is None else f"first to differ: {first}"])


def hidden_states(folder: Path, prompt: Sequence[int]) -> list[np.ndarray]:
    """Return hidden states `[T, M]` of one prefill: before the first layer, after each layer, after the final norm."""
    program, params = loaded.load(folder)
    cache, batch = loaded.prefill_inputs(program, [prompt])
    return [np.asarray(value)[: len(prompt)] for value in _hidden_states(program, params, cache, batch)]


@partial(jax.jit, static_argnums=0)
def _hidden_states(program: Program, params: list[jax.Array], cache: Cache, batch: PrefillBatch) -> list[jax.Array]:
    found: list[jax.Array] = []

    def recording(call: Any) -> Any:
        def recorded(layer: Any, x: jax.Array, *others: Any, **named: Any) -> Any:
            if not found:
                found.append(x)
            y, kv_cache = call(layer, x, *others, **named)
            found.append(y)
            return y, kv_cache

        return recorded

    with pytest.MonkeyPatch.context() as patch:
        for kind in {type(layer) for layer in program.module(params).layers}:
            patch.setattr(kind, "__call__", recording(kind.__call__))
        last, _ = functional.prefill_hidden(program, params, cache, batch)
    return [*found, last]


@torch.no_grad()
def reference_hidden_states(reference: Model, prompt: Sequence[int]) -> list[np.ndarray]:
    """Return the hidden states of the transformers model, in the form of `hidden_states`."""
    decoder, found = fresh(reference).get_decoder(), []

    def keep(value: Any) -> None:
        value = value[0] if isinstance(value, tuple) else value
        found.append(value[0].float().numpy().copy())

    hooks = [layer.register_forward_hook(lambda _, __, out: keep(out)) for layer in decoder.layers]
    hooks.append(decoder.layers[0].register_forward_pre_hook(lambda _, inputs: keep(inputs)))
    final = next(getattr(decoder, name) for name in FINAL_NORMS if hasattr(decoder, name))
    hooks.append(final.register_forward_hook(lambda _, __, out: keep(out)))
    try:
        reference(torch.tensor([prompt]), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found
