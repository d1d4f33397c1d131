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
"""Maximum engine steps for all searches of a test, to detect beams that wait for each other forever."""
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
    """Make a beam-search request of at most `new` tokens with EOS ids `eos`; `params`: `SamplingParams` fields."""
    own = SamplingParams(temperature=0, max_tokens=new, stop_token_ids=list(eos), **params or {})
    request = make_request(name, prompt, own, **rope or {})
    request.beams = Beams(BeamParams(**search), request.limit - len(prompt), request.stop_ids)
    return request


def found(request: Request) -> Found:
    """Return the results of a finished search."""
    return [(beam.tokens.tolist(), float(beam.score)) for beam in request.beams.best]


def search(engine: Engine, requests: Sequence[Request]) -> list[Found]:
    """Run searches to their end and check that no block or row stays allocated."""
    for request in requests:
        engine.add(request)
    for _ in range(MOST_STEPS):
        if not engine.has_work:
            break
        engine.step()
    assert not engine.has_work, "nothing goes on"
    assert int(engine.manager.pool.num_held) == 0
    return [found(request) for request in requests]
