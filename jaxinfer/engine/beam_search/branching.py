"""The beams of a search as sequences: which goes on in whose place after a step.

A beam is a sequence of its request, and has a row like any other. After a step the host chooses the beams that go on
(`engine.beams`). The first one that comes from a beam stays where that is; others take the places of beams that come to
nothing, and share all blocks of the one they come from. What they share is copied when one of them first writes to it.

    rows a b c d, chosen: a1 a2 c1 c2   ->   a1 stays in a, c1 in c; a2 takes b, c2 takes d

A beam may sample one token until all beams of its search have theirs, so those that were preempted are computed again
one by one, while the others wait with what they have found (`Sequence.candidates`).
"""

from collections.abc import Sequence as Items

from jaxinfer.engine.request import Request, Sequence, Status
from jaxinfer.engine.scheduler import Scheduler


def running(request: Request) -> list[Sequence]:
    """The beams of a search, best first."""
    return [sequence for sequence in request.sequences if sequence.status is not Status.FINISHED]


def complete(request: Request) -> bool:
    """Whether all beams have found their continuations."""
    return all(sequence.candidates is not None for sequence in running(request))


def regroup(scheduler: Scheduler, request: Request, chosen: Items[tuple[int, int]]) -> list[Sequence]:
    """Gives each beam that goes on a sequence, which gets its new token; best first.

    `chosen`: the number of the beam it comes from, and the token (`Beams.advance`).
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
    """After a failed step or an interrupt: a sequence for each beam as the search has it, all to be computed again."""
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
    if beam.status is Status.RUNNING and scheduler.manager.tables.lengths[beam.row] % scheduler.manager.block_size == 0:
        scheduler.publish(beam)
    beam.tokens[beam.length] = token
    beam.length += 1
    beam.bias_version = -1  # what the device has noted of its history is not what was chosen
    if beam.length == beam.stage_limit:
        scheduler.recompute(beam)
    elif beam.status is Status.RUNNING:
        scheduler.remaining[beam.row] = 1
