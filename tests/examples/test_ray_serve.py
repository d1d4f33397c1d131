"""`examples/ray_serve.py`: what the router remembers; with Ray, two replicas, shared prefixes and a killed replica."""

import importlib
import json
import os
import signal
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest
from support import ray_processes
from support.processes import free_port

pytest.importorskip("ray.serve", reason="ray[serve] is not installed")
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))
ray_serve = importlib.import_module("ray_serve")  # by this name the actors import it
pytestmark = pytest.mark.xdist_group("demo")

PIECE, MODEL = ray_serve.PIECE, "demo"
GROUPS = ("You answer questions about numbers. ", "Sie beantworten Fragen zu Staaten. ")
QUESTIONS = ("What is 17 plus 25?", "What is the capital of France?", "What is 2 plus 2?", "What is 5 plus 8?")


def test_the_longest_beginning_decides():
    prefixes = ray_serve.Prefixes()
    a, b = "a" * 3 * PIECE, "a" * 2 * PIECE + "b" * PIECE
    prefixes.add(a, 1)
    prefixes.add(b, 2)
    assert prefixes.find(a, [1, 2]) == 1 and prefixes.find(b + "c", [1, 2]) == 2
    assert prefixes.find(a[: 2 * PIECE], [1, 2]) == 2, "both have it, and the second got it last"
    assert prefixes.find(a, [2]) == 2 and prefixes.find(b, [1]) is None, "a dead replica is passed over"
    assert prefixes.find("b" * PIECE, [1, 2]) is None and prefixes.find(a[: PIECE - 1], [1, 2]) is None
    assert dict(prefixes.counts()) == {1: 1, 2: 3}


def test_what_was_not_seen_for_longest_is_forgotten():
    prefixes = ray_serve.Prefixes(most=2)
    for text in ("a", "b", "a", "c"):
        prefixes.add(text * PIECE, text)
    assert [prefixes.find(text * PIECE, "abc") for text in "abc"] == ["a", None, "c"] and len(prefixes) == 2


def test_the_prefix_is_in_the_order_of_the_prompt():
    chat = {"messages": [{"role": "user", "content": "hi"}], "system": "be brief", "cache_salt": "s", "max_tokens": 3}
    assert ray_serve.prefix_of(json.dumps(chat).encode()) == 'sbe brief[{"role": "user", "content": "hi"}]'
    assert ray_serve.prefix_of(b'{"prompt": "once"}') == "once"
    for body in (b"", b"{", b"[1]", b'{"prompt": null}', b"\xff"):
        assert ray_serve.prefix_of(body) == ""


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """Address of two replicas of the packaged checkpoint."""
    import ray
    from ray import serve

    from jaxinfer import demo

    os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT / 'examples'}"
    ray_processes.start()
    settings = {"max_model_len": 256, "max_num_seqs": 4, "dtype": "float32", "block_size": 16}
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    app = ray_serve.build(str(demo.path()), MODEL, settings, replicas=2, cpus=1, imbalance=16)
    try:
        serve.run(app)
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def ask(client, group: str, question: str):
    """Return the replica, the text and the number of cached prompt tokens of an answer."""
    prompt = group * 6 + question
    found = client.completions.with_raw_response.create(model=MODEL, prompt=prompt, max_tokens=8, temperature=0)
    made = found.parse()
    return found.headers["x-jaxinfer-replica"], made.choices[0].text, made.usage.prompt_tokens_details.cached_tokens


def engine_processes() -> list[int]:
    """Return the process ids of the replicas."""
    return ray_processes.named("ServeReplica:default:Replica")


@pytest.mark.slow
def test_prefixes_decide_the_replica_and_a_killed_one_is_survived(url):
    import openai

    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300) as client:
        seen, deadline = set(), time.monotonic() + 120
        while len(seen) < 2:  # Ray Serve is ready before the router knows all replicas
            assert time.monotonic() < deadline, "a replica gets no requests"
            seen.add(ask(client, f"{time.monotonic_ns()} is another beginning. ", QUESTIONS[0])[0])
        answers = {(g, q): ask(client, g, q) for q in QUESTIONS for g in GROUPS}
        replicas, cached = defaultdict(set), defaultdict(list)
        for (group, _), (replica, _, tokens) in answers.items():
            replicas[group].add(replica)
            cached[group].append(tokens)
        assert [len(replicas[group]) for group in GROUPS] == [1, 1], "each prefix has one replica"
        assert replicas[GROUPS[0]] != replicas[GROUPS[1]], "and the second prefix got the other one"
        for first, *later in cached.values():
            assert first == 0 and all(tokens >= 32 for tokens in later), cached
        texts = {key: text for key, (_, text, _) in answers.items()}

        streamed = client.completions.create(
            model=MODEL, prompt=GROUPS[0] * 6 + QUESTIONS[0], max_tokens=8, temperature=0, stream=True
        )
        events = [event.choices[0].text for event in streamed]
        assert "".join(events) == texts[GROUPS[0], QUESTIONS[0]] and len(events) > 1
        with pytest.raises(openai.BadRequestError, match="max_tokens"):
            client.completions.create(model=MODEL, prompt="a", max_tokens=-1)

        killed = engine_processes()
        assert len(killed) == 2
        os.kill(killed[0], signal.SIGKILL)
        again = {key: ask(client, *key) for key in texts}
        assert {key: text for key, (_, text, _) in again.items()} == texts, "all are answered, and alike"
        deadline = time.monotonic() + 120
        while killed[0] in (alive := engine_processes()) or len(alive) < 2:
            assert time.monotonic() < deadline, "no new replica was started"
            time.sleep(0.5)
        assert {key: ask(client, *key)[1] for key in texts} == texts
