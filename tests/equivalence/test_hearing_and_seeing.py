"""Whisper, with its token rule, and Llama 3.2 Vision: scheduling does not change tokens."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from support import mllama, whisper
from support.cases import GREEDY
from support.cross import alone, count, cross_request
from support.mllama import IMAGE, image, words
from support.tiny import BLOCK, CHUNK, make_engine, run, shapes

from jaxinfer.engine.engine import Engine
from jaxinfer.engine.request import Request
from jaxinfer.engine.runner.runner import Runner
from jaxinfer.functional import split
from jaxinfer.loading import weights
from jaxinfer.media import CrossInputs, EncoderInput
from jaxinfer.models.whisper.tokens import RuleFlags
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.sharding import make_mesh

pytestmark = [pytest.mark.xdist_group("media"), pytest.mark.slow]

WRITERS = {"whisper": (whisper.write, whisper.VOCAB, (1, 2)), "mllama": (mllama.write, mllama.VOCAB, (1,))}


@cache
def runner(name: str, tp: int = 1) -> Runner:
    write, vocab, units = WRITERS[name]
    with TemporaryDirectory() as folder:
        module = weights.load(write(Path(folder)), make_mesh(tp), progress=False)
    program, params = split(module, make_mesh(tp))
    own = (
        {"max_length": whisper.LENGTH} if name == "whisper" else {"width": 64}
    )  # four images take more blocks than a text
    made = shapes(groups=program.layout.groups, cross_buckets=units, sampled_vocab=vocab, **own)
    return Runner(program, params, made)


def settled(engine: Engine) -> None:
    assert int(engine.manager.pool.num_held) == 0
    engine.manager.check()


SEEDED = SamplingParams(temperature=0.3, seed=11, max_tokens=24)
TEXT, TIMESTAMPS, DETECT = RuleFlags.TEXT, RuleFlags.TIMESTAMPS, RuleFlags.DETECT
RULES = (TEXT, TEXT | TIMESTAMPS, TEXT | TIMESTAMPS | DETECT, TEXT | DETECT, 0)


def heard(seed: int) -> CrossInputs:
    return CrossInputs((EncoderInput("audio", whisper.features(1, seed), whisper.POSITIONS),))


def spoken() -> list[Request]:
    """Requests with different audio and rules, greedy and seeded."""
    greedy = SamplingParams(temperature=0, max_tokens=24)
    return [
        cross_request(str(i), heard(i), (greedy, SEEDED)[i % 2], [whisper.START], rule=int(rule))
        for i, rule in enumerate(RULES)
    ]


def test_batched_audio_equals_alone():
    engine = make_engine(runner("whisper"))
    expected = alone(spoken(), runner("whisper"))
    assert run(engine, spoken()) == expected
    settled(engine)
    made = [samples[0] for samples in expected]
    assert made[2][0] in (whisper.ENGLISH, whisper.GERMAN) and made[2][1] == whisper.TRANSCRIBE
    assert made[3][2] == whisper.NO_TIMESTAMPS and made[1][0] >= whisper.ZERO


def test_the_token_rule_holds_after_a_preemption():
    """The output before preemption counts: timestamp pairs continue where they were."""
    wanted = spoken()
    expected = alone(wanted, runner("whisper"))
    blocks = -(-whisper.POSITIONS // BLOCK)
    engine = make_engine(runner("whisper"), pool_blocks=len(wanted) * blocks + 12)
    assert run(engine, wanted) == expected
    assert engine.scheduler.preempted > 0
    settled(engine)


def test_samples_of_a_sound_share_what_was_made_of_it():
    params = SamplingParams(temperature=0.5, seed=3, max_tokens=12, n=4)
    request = cross_request("0", heard(0), params, [whisper.START], rule=int(RULES[1]))
    expected = alone([request], runner("whisper"))
    engine = make_engine(runner("whisper"))
    assert run(engine, [request]) == expected and len(set(map(tuple, expected[0]))) > 1
    assert count(engine, "encoder_inputs") == 1
    settled(engine)


ONE, TWO, THREE = image(1, 0), image(6, 1), image(3, 2)
PROMPTS: list[tuple[list[int], Sequence[EncoderInput]]] = [
    ([IMAGE, *words(9)], [ONE]),
    (words(CHUNK + 3, 2), []),
    ([IMAGE, IMAGE, *words(6, 4)], [TWO, THREE]),
    ([*words(CHUNK - 1, 6), IMAGE, *words(CHUNK, 1)], [THREE]),
    ([IMAGE, *words(3, 3), IMAGE, IMAGE, *words(4, 4), IMAGE], [ONE, TWO, THREE, ONE]),
    (words(1, 7), []),
]


def shown(params: SamplingParams = GREEDY) -> list[Request]:
    return [cross_request(str(i), mllama.cross(ids, images), params, ids) for i, (ids, images) in enumerate(PROMPTS)]


def test_images_and_texts_in_chunks_of_any_size():
    expected = alone(shown(), runner("mllama"))
    assert len(set(map(str, expected))) == len(PROMPTS)
    for budget in (3, CHUNK):
        engine = make_engine(runner("mllama"), budget=budget)
        assert run(engine, shown()) == expected
        assert run(engine, shown()) == expected, "encoder keys and values from the cache"
        settled(engine)


def test_images_after_a_preemption():
    expected = alone(shown(), runner("mllama"))
    kinds = runner("mllama").program.layout.kinds
    most = sum(kinds[-1].count * -(-sum(one.length for one in images) // BLOCK) for _, images in PROMPTS)
    engine = make_engine(runner("mllama"), pool_blocks=most + 40)
    assert run(engine, shown()) == expected
    settled(engine)


@pytest.mark.parametrize("name", ["whisper", "mllama"])
def test_two_devices_are_one(name: str):
    wanted = {"whisper": spoken, "mllama": shown}[name]()
    expected = alone(wanted, runner(name))
    assert run(make_engine(runner(name, 2)), {"whisper": spoken, "mllama": shown}[name]()) == expected


def test_a_prefix_with_another_image_is_not_a_hit():
    ids = [IMAGE, *words(3 * BLOCK)]
    wanted = [cross_request(str(i), mllama.cross(ids, [one]), GREEDY, ids) for i, one in enumerate((ONE, THREE, ONE))]
    assert wanted[0].cross.identity == wanted[2].cross.identity != wanted[1].cross.identity
    expected = alone(wanted, runner("mllama"))
    engine = make_engine(runner("mllama"))
    assert [run(engine, [request])[0] for request in wanted] == expected and expected[0] != expected[1]
    assert [request.cached_tokens for request in wanted] == [0, 0, 3 * BLOCK]
