"""`scripts/bench.py sharing` on toys: it reaches its goals there, and what it counts is what it says."""

from collections.abc import Callable

import pytest
from benchmarks import sharing
from benchmarks.blocks import Counted
from support.tiny import BLOCK, CHUNK, hybrid_runner, make_engine, make_request, prompt, run

from jaxinfer.kv import groups as kv_groups
from jaxinfer.sampling_params import SamplingParams

pytestmark = pytest.mark.xdist_group("bench")

TOY = dict(num_hidden_layers=6, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kimi_linear", "gemma3"])
def test_samples_and_prefixes_are_shared_as_far_as_can_be(result: Callable[..., dict], monkeypatch, name: str):
    monkeypatch.setattr(sharing, "COMMON", sharing.COMMON | TOY)
    buckets = [f"--set={kind}_buckets={sizes}" for kind, sizes in (("decode", "[8]"), ("prefill", "[64]"))]
    found = result(
        "sharing",
        name,
        "--small",
        "--samples=5",
        "--requests=20",
        "--pool-requests=3",
        "--repeats=1",
        "--checkpoint-dtype=float32",
        "--set=max_num_seqs=8",
        "--set=max_num_batched_tokens=64",
        *buckets,
    )
    work, figures = (
        found["work"],
        {metric.removesuffix(f"@{name}"): value for metric, value in found["jaxinfer"].items()},
    )
    assert work["prefixes"] == [[200, 75], [187, 87]] and work["requests"] == 5
    recurrent = "linear_attn_config" in work[f"model@{name}"]
    assert recurrent or work[f"model@{name}"]["sliding_window"] in (512 // 8, 128 // 8)
    assert figures["peak_over_fewest"] == figures["peak_blocks"] / figures["fewest_blocks"] <= 1.05
    assert figures["unshared_over_shared"] == figures["peak_blocks_unshared"] / figures["peak_blocks"] > 1.5
    for label in (
        f"@{shared}+{own}_{order}" for shared, own in work["prefixes"] for order in ("one_by_one", "at_once")
    ):
        assert (
            figures[f"requests_with_whole_prefix{label}"] == figures[f"requests_that_could_hit{label}"] == 4 - recurrent
        )
        assert not recurrent or figures[f"snapshots{label}"] > 0 < figures[f"snapshot_mib{label}"]
        assert figures[f"least_hit_tokens{label}"] == int(label[1:4]) // 16 * 16
        waits = figures[f"first_token_seconds{label}"], figures[f"first_token_seconds_unshared{label}"]
        assert figures[f"unshared_over_shared{label}"] == pytest.approx(waits[1] / waits[0])
    assert figures["tokens_per_second@distinct"] > 0 and figures["shared_over_unshared@samples"] > 0


@pytest.mark.slow
def test_the_fewest_blocks_are_those_that_the_layers_of_a_step_see():
    """Three samples of a prompt of 17 tokens, six new ones, blocks of 4 and a window of 7 in five layers of six."""
    runner = hybrid_runner("five to one")
    params = SamplingParams(temperature=1, seed=3, n=3, max_tokens=6)

    def counted(**host: object) -> Counted:
        engine = make_engine(runner, **host)
        with Counted(engine) as found:
            run(engine, [make_request("all", prompt(17), params)])
        assert "run" not in vars(runner)
        return found

    shared, apart = counted(), counted(block_sharing=False, prefix_caching=False)
    # The last step writes position 21, in block 5: of the full layer four blocks of the prompt and three samples' two
    # each; of the sliding ones, which see positions from 15 on, the prompt's block 3 and the same.
    assert shared.fewest == (4 + 3 * 2) + 5 * (1 + 3 * 2) == shared.held
    one = kv_groups.blocks_needed(runner.program.layout.kinds, 22, BLOCK, CHUNK)
    assert shared.held < apart.held <= 3 * one


def test_a_quick_look_keeps_windows_shorter_than_prefixes():
    work = sharing.smaller(sharing.WORK)
    for name in ("gemma3", "gpt_oss"):
        assert sharing.config(name, small=True)["sliding_window"] < min(shared for shared, _ in work.prefixes)
        assert sharing.config(name)["sliding_window"] < min(shared for shared, _ in sharing.WORK.prefixes)
