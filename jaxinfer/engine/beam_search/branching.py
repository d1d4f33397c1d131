"""Mapping of beams to sequences: which sequence and row each continuing beam takes after a step.

A beam is a sequence of its request with a row like any other. After a step the host chooses the continuing beams
(`beam_search.beams`). The first continuation of a beam stays in its row; others take the rows of beams that were
dropped, and share all blocks of their source. A shared block is copied when one of its holders first writes to it.

    rows a b c d, chosen: a1 a2 c1 c2   ->   a1 stays in a, c1 in c; a2 takes b, c2 takes d

A beam may sample one token until all beams of its search have theirs, so preempted beams are recomputed one by one
while the others wait with their candidates (`Sequence.candidates`).
"""

from collections.abc import Sequence as Items

from jaxinfer.engine.request import Request, Sequence
from jaxinfer.engine.scheduler import Scheduler
from jaxinfer.engine.sequence_state import Status


def running(request: Request) -> list[Sequence]:
    """Return the running beams of a search, best first."""
    return [sequence for sequence in request.sequences if sequence.status is not Status.FINISHED]


def complete(request: Request) -> bool:
    """Return whether all running beams have their candidates."""
    return all(sequence.candidates is not None for sequence in running(request))


def regroup(scheduler: Scheduler, request: Request, chosen: Items[tuple[int, int]]) -> list[Sequence]:
    """Assign a sequence to each continuing beam and append its token; return them, best first.

    Args:
        scheduler: holds the sequences' rows and blocks.
        request: the beam search.
        chosen: (index of the source beam, new token) of each continuing beam (`Beams.advance`).
    """
    beams = running(request)
    for beam in beams:
        beam.candidates = None
    spare = [beam for number, beam in enumerate(beams) if number not in {source for source, _ in chosen}]
    going, kept = [], set()
    for source, _ in chosen:
        if source not in kept:
            kept.add(source)
            going.append(beams[source])
            continue
        if not spare:
            spare.append(_newcomer(scheduler, request))
        going.append(spare.pop())
        scheduler.branch(beams[source], going[-1])
    for beam in spare:
        scheduler.finish(beam, "length")
    request.sequences = [*going, *spare]
    for beam, (_, token) in zip(going, chosen, strict=True):
        _add(scheduler, beam, token)
    return going


def restore(request: Request) -> None:
    """Rebuild the sequences of a search's running beams after a failed step or an interrupt; all will be recomputed."""
    beams = running(request)
    made, start = request.beams.state.running, len(request.prompt)
    while len(beams) < len(made):
        beams.append(Sequence(request, len(beams)))
        beams[-1].adopt(beams[0])
    for beam, tokens in zip(beams, made, strict=False):
        beam.reserve()
        beam.length = start + len(tokens)
        beam.tokens[start : beam.length], beam.digests, beam.candidates = tokens, [], None
    request.sequences = beams[: len(made)] or beams


def _newcomer(scheduler: Scheduler, request: Request) -> Sequence:
    newcomer = Sequence(request, len(request.sequences))
    request.sequences.append(newcomer)
    scheduler.waiting.push(newcomer)
    return newcomer


def _add(scheduler: Scheduler, beam: Sequence, token: int) -> None:
    manager = scheduler.manager
    if beam.status is Status.RUNNING and manager.length(beam.row) % manager.block_size == 0:
        scheduler.publisher.publish(beam)
    beam.tokens[beam.length] = token
    beam.length += 1
    beam.bias_version = -1  # the history on the device is not the chosen one
    if beam.length == beam.stage_limit:
        scheduler.recompute(beam)
    elif beam.status is Status.RUNNING:
        scheduler.rows.remaining[beam.row] = 1
