"""A plan's collectives are those of the compiled step, on eight virtual devices."""

import json
from collections import Counter
from pathlib import Path

import pytest
from safetensors.numpy import save_file
from support.checkpoint import shaped
from support.families import families
from support.plans import CASES, EVERY, compiled, on_cpu, payloads, planned

from jaxinfer import functional
from jaxinfer.kv import cache as kv_cache
from jaxinfer.kv import groups
from jaxinfer.loading import weights
from jaxinfer.sharding import make_mesh, plan

pytestmark = [pytest.mark.xdist_group("plan"), pytest.mark.slow]


@pytest.mark.parametrize("case", CASES)
def test_a_decode_step_has_the_collectives_of_the_plan(case: str):
    assert compiled(case, "decode", make_mesh(8)).collectives == on_cpu(planned(case, 8), "decode")


# In addition to the layers' own: embedding lookup and sampler logits, if the ends of the model are sharded.
@pytest.mark.parametrize(
    ("case", "layers", "ends"),
    [
        ("all replicated", 0, 0),
        ("sharded", 4, 2),
        ("attention replicated", 2, 2),
        ("mlp replicated", 2, 2),
        ("first layer replicated", 2, 2),
        ("ends replicated", 4, 0),
    ],
)
def test_a_replicated_module_has_no_collective(case: str, layers: int, ends: int):
    found = compiled(case, "decode", make_mesh(8)).collectives
    assert found == +Counter({"all-reduce": layers + ends, "all-gather": ends})


@pytest.mark.parametrize("case", ["sharded", "mlp replicated", "tied"])
def test_a_prefill_step_has_the_collectives_of_the_plan(case: str):
    assert compiled(case, "prefill", make_mesh(8)).collectives == on_cpu(planned(case, 8), "prefill")


def test_collectives_on_fewer_devices_and_none_on_one():
    assert compiled("sharded", "decode", make_mesh(2)).collectives == on_cpu(planned("sharded", 2), "decode")
    assert planned("sharded", 1).exchanges == ()
    assert not compiled("sharded", "decode", make_mesh(1)).collectives


def test_all_reduce_widths_equal_the_plan():
    made = planned("attention replicated", 8)
    widths = [e.collective.width for e in made.exchanges if e.collective.kind == "all-reduce"]
    found = payloads(compiled("attention replicated", "decode", make_mesh(8)).executable.as_text())
    assert sorted(width for _, _, width in found) == sorted(widths)


def test_every_family_is_planned():
    assert set(EVERY) == {name for name, data in families().items() if not data.variant}


@pytest.mark.parametrize(
    ("name", "tied"),
    [*((name, False) for name in EVERY), *((name, True) for name in ("llama", "bart", "whisper", "internvl"))],
)
def test_plan_bytes_equal_loaded_weights_and_engine_cache(name: str, tied: bool, tmp_path: Path):
    hf = dict(EVERY[name]) | {"tie_word_embeddings": tied, "dtype": "bfloat16"}
    save_file(shaped(hf), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(hf))
    for tp in (1, 2):
        mesh, made = make_mesh(tp), plan(hf, tensor_parallel_size=tp, memory=1 << 24)
        module = weights.load(tmp_path, mesh, dtype="bfloat16", progress=False)
        program, params = functional.split(module, mesh)
        held = [{shard.device: shard.data.nbytes for shard in param.addressable_shards} for param in params]
        assert {sum(one[device] for one in held) for device in mesh.devices.flat} == {made.device_bytes}
        kinds = program.layout.kinds
        each = kv_cache.block_bytes(program.layout.array_specs, 16, program.dtype, mesh)
        encoded = groups.encoded(kinds)
        assert made.cache.block_device_bytes * tp == each * groups.count(groups.own(kinds))
        assert made.cache.encoded_block_device_bytes * tp == each * (encoded.count if encoded else 0)
        assert made.cache.state_device_bytes * tp == kv_cache.slot_bytes(program.layout.states, mesh)
        own = [layer.block_device_bytes for layer in made.cache.layers if not layer.encoded]
        assert sum(own) == made.cache.block_device_bytes and made.tokens > 0
        assert (made.cache.sequences is not None) is bool(program.layout.states)
