"""Beam searches over tiny models, without a tokenizer."""

from collections.abc import Iterable, Sequence
from typing import Any

from jaxinfer.beam_params import BeamParams
from jaxinfer.engine.beam_search.beams import Beams
from jaxinfer.engine.engine import Engine
from jaxinfer.engine.request import Request
from jaxinfer.sampling_params import SamplingParams
from support.tiny import make_request

MOST_STEPS = 5000
"""Of all searches of a test together: beams may wait for each other, but not for ever."""
Found = list[tuple[list[int], float]]
"""Tokens and score of each result, best first."""


def beam_request(
    name: str,
    prompt: Sequence[int],
    new: int,
    eos: Iterable[int] = (),
    *,
    rope: dict[str, Any] | None = None,
    params: dict[str, Any] | None = None,
    **search: Any,
) -> Request:
    """A search of `new` tokens at most, which any of `eos` ends; `params` are of `SamplingParams`."""
    own = SamplingParams(temperature=0, max_tokens=new, stop_token_ids=list(eos), **params or {})
    request = make_request(name, prompt, own, **rope or {})
    request.beams = Beams(BeamParams(**search), request.limit - len(prompt), request.stop_ids)
    return request


def found(request: Request) -> Found:
    """What a search has come to."""
    return [(beam.tokens.tolist(), float(beam.score)) for beam in request.beams.best]


def search(engine: Engine, requests: Sequence[Request]) -> list[Found]:
    """Runs searches to their end; nothing may stay held."""
    for request in requests:
        engine.add(request)
    for _ in range(MOST_STEPS):
        if not engine.has_work:
            break
        engine.step()
    assert not engine.has_work, "nothing goes on"
    assert int(engine.manager.pool.num_held) == 0
    return [found(request) for request in requests]
