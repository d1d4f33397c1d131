"""Placement plan: hand-computed sums, its outputs, and that it allocates nothing."""

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from safetensors.numpy import save_file
from support import checkpoint

import jaxinfer
from jaxinfer import sharding
from jaxinfer.errors import CheckpointError, ConfigError
from jaxinfer.loading import weights
from jaxinfer.loading.convert import convert
from jaxinfer.sharding import Plan, make_mesh, placement
from jaxinfer.sharding.collectives import ALL_REDUCE, Collective
from jaxinfer.sharding.placement_html import axes_text, page
from jaxinfer.sharding.placement_rows import REPLICATION_NOTE
from jaxinfer.sharding.placement_tree import Node, tree
from jaxinfer.sharding.policy import Placement

LLAMA_70B = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    hidden_act="silu",
    torch_dtype="bfloat16",
    rope_scaling=dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    ),
)
"""Fields of the public config.json of Llama-3.1-70B that shape the model."""
SMALL = LLAMA_70B | dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
    vocab_size=97,
)
BF16 = 2
M, F, V, D, LAYERS, TP = 8192, 28672, 128256, 128, 80, 8


@pytest.fixture(scope="module")
def large() -> Plan:
    return sharding.plan(LLAMA_70B, tensor_parallel_size=TP, memory=80 << 30)


@pytest.mark.slow
def test_the_weights_of_llama_70b_sum_to_the_bytes_that_one_computes_by_hand(large: Plan):
    vocabulary = V // TP * M * BF16  # 16032 rows of 8192: 262,668,288, once for the embedding and once for the head
    qkv = (64 + 8 + 8) // TP * D * M * BF16  # ten heads of 128 columns: 20,971,520
    out = M * (64 // TP * D) * BF16  # 16,777,216
    gate_up = 2 * F // TP * M * BF16  # 7168 columns: 117,440,512
    down = M * F // TP * BF16  # 58,720,256
    norms = 2 * M * BF16  # replicated: 32,768
    layer = qkv + out + gate_up + down + norms
    assert (vocabulary, layer) == (262_668_288, 213_942_272)
    last_norm = M * BF16
    assert large.device_bytes == 2 * vocabulary + LAYERS * layer + last_norm == 17_640_734_720
    assert large.copied_bytes == LAYERS * norms + last_norm == 2_637_824
    # 70,553,706,496 parameters, each once.
    assert large.checkpoint_bytes == 2 * 70_553_706_496 == 8 * large.device_bytes - 7 * large.copied_bytes
    assert large.modules[""] == large.device_bytes
    assert large.modules["layers.17"] == layer and large.modules["layers.17.mlp"] == gate_up + down
    assert large.modules["layers"] == LAYERS * layer


def test_the_cache_of_llama_70b_sums_to_the_bytes_that_one_computes_by_hand(large: Plan):
    token = 2 * LAYERS * (8 // TP) * D * BF16  # keys and values of one head per layer on each device: 40,960
    assert large.cache.block_device_bytes == 16 * token == 655_360
    left = int((80 << 30) * 0.9) - 17_640_734_720
    assert large.tokens == left // 655_360 * 16 == 1_456_752
    assert large.cache.replicated_layers == ()


def test_llama_70b_in_bfloat16_loads_on_two_devices_of_80_gb():
    """Beside 850 MB for steps: more than the programs for two H100s need (docs/decisions.md)."""
    made = sharding.plan(LLAMA_70B, tensor_parallel_size=2, memory=84_929_347_584, step_bytes=850_000_000)
    assert made.device_bytes == 70_555_025_408
    assert made.cache_bytes == 76_436_412_825 - 70_555_025_408 - 850_000_000
    assert made.tokens == made.cache_bytes // (16 * 163_840) * 16 > 30_000


QWEN3_NEXT = dict(
    architectures=["Qwen3NextForCausalLM"],
    torch_dtype="bfloat16",
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=5120,
    num_hidden_layers=48,
    num_attention_heads=16,
    num_key_value_heads=2,
    head_dim=256,
    full_attention_interval=4,
    linear_num_key_heads=16,
    linear_num_value_heads=32,
    linear_key_head_dim=128,
    linear_value_head_dim=128,
    linear_conv_kernel_dim=4,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=512,
    shared_expert_intermediate_size=512,
    max_position_embeddings=262144,
    rms_norm_eps=1e-6,
)
"""Fields of the public config.json of Qwen3-Next-80B-A3B that shape the cache; 8 of its 512 experts."""


def test_recurrent_states_are_counted_per_sequence_not_per_block():
    made = sharding.plan(QWEN3_NEXT, tensor_parallel_size=8, memory=16 << 30)
    cache = made.cache
    assert cache.block_device_bytes == 16 * 12 * 2 * 256 * BF16  # 12 attention layers, with one head on each device
    state = 36 * (
        4 * 128 * 128 * 4 + 3 * (2 * 128 + 2 * 128 + 4 * 128) * BF16
    )  # 36 recurrent layers: state and convolution
    assert cache.state_device_bytes == state == 9_658_368
    snapshots = int(made.cache_bytes * 0.1) // state
    assert cache.sequences == 256 and cache.state_slots == 2 * 256 + snapshots
    assert made.tokens == (made.cache_bytes - cache.state_slots * state) // cache.block_device_bytes * 16
    few = sharding.plan(
        QWEN3_NEXT, tensor_parallel_size=8, memory=16 << 30, max_num_seqs=4, enable_prefix_caching=False
    )
    assert few.cache.state_slots == 8 and few.tokens > made.tokens
    assert "of state per sequence on each device" in page(made)


def test_the_collectives_of_llama_70b_are_two_a_layer_those_of_the_embedding_and_of_the_sampler(large: Plan):
    assert large.collectives("decode") == large.collectives("prefill") == {"all-reduce": 161, "all-gather": 1}
    by_module = {exchange.module: exchange for exchange in large.exchanges}
    assert by_module["layers.79.mlp.down"].row_bytes == by_module["embedding"].row_bytes == M * BF16
    assert by_module["sampler"].row_bytes == TP * (4 + 4)  # a float32 and an int32 of each shard
    assert "layers.3.attention.out" in by_module and "head" not in by_module


def test_fewer_kv_heads_than_devices_are_repeated():
    few = LLAMA_70B | {"num_hidden_layers": 2}
    once, twice = (sharding.plan(few, tensor_parallel_size=tp) for tp in (8, 16))
    assert twice.cache == once.cache  # one head per device in both
    assert twice.modules["layers.0.attention.qkv"] == (64 // 16 + 1 + 1) * D * M * BF16
    assert twice.checkpoint_bytes == once.checkpoint_bytes


@pytest.fixture(scope="module")
def mixed() -> Plan:
    """Plan with the first layer replicated, and the attention of all others."""
    return sharding.plan(
        SMALL, tensor_parallel_size=4, placement={"layers.0": "replicate", "*.attention": "replicate"}, memory=1 << 20
    )


def test_a_row_has_the_placement_of_a_parameter(mixed: Plan):
    rows = {row.path: row for row in mixed.rows}
    names = ("attention.out.weight", "mlp.down.weight", "mlp_norm.scale")
    out, down, norm = (rows[f"layers.1.{name}"] for name in names)
    assert (out.tactic, out.copies, out.spec, out.device_bytes) == ("replicate", 4, PartitionSpec(), 64 * 64 * BF16)
    assert out.module == "layers.1.attention"
    assert (down.tactic, down.copies, down.spec) == ("shard", 1, PartitionSpec(None, "model"))
    assert (down.shape, down.logical_axes, down.dtype) == ((64, 96), ("embed", "ffn"), "bfloat16")
    assert down.device_bytes == 64 * 96 * BF16 // 4
    assert axes_text(down, mixed) == "[64 embed, 96 ffn /4]"
    # A norm's scale has no sharded axis: its tactic is not "replicate", but every device has it.
    assert (norm.tactic, norm.copies) == ("shard", 4)
    # The vocabulary of 97 is padded to 100.
    embedding = rows["embedding.weight"]
    assert embedding.shape == (100, 64) and embedding.checkpoint_bytes == 97 * 64 * BF16
    assert mixed.cache.replicated_layers == (0, 1, 2)
    assert mixed.collectives("decode") == {"all-reduce": 1 + 2, "all-gather": 1}


def test_a_plan_of_int8_weights_has_their_scales():
    rows = {row.path: row for row in sharding.plan(SMALL, tensor_parallel_size=2, quantization="int8").rows}
    assert rows["layers.0.mlp.down.weight"].device_bytes == 64 * 96 // 2
    scale = rows["layers.0.mlp.down.weight_scale"]
    assert (scale.shape, scale.dtype, scale.copies) == ((64,), "float32", 2)
    assert rows["embedding.weight"].dtype == "bfloat16"


def test_one_device_has_one_copy_of_everything_and_no_collectives():
    alone = sharding.plan(SMALL, memory=1 << 20)
    assert {row.copies for row in alone.rows} == {1}
    assert alone.copied_bytes == 0 and alone.device_bytes == alone.checkpoint_bytes
    assert alone.collectives("decode") == {} and alone.cache.block_device_bytes > 0


@pytest.mark.slow
def test_equal_layers_are_one_node_of_the_tree(large: Plan, mixed: Plan):
    def nodes(node: Node) -> list[Node]:
        return [node, *(inner for child in node.children for inner in nodes(child))]

    (folded,) = [node for node in nodes(tree(large)) if node.count > 1]
    assert (folded.name, folded.count, folded.placed) == ("layers.0 ... layers.79", 80, "sharded")
    assert folded.device_bytes == large.modules["layers"] and folded.collectives("decode") == {"all-reduce": 160}
    root = tree(mixed)
    layers = next(child for child in root.children if child.path == "layers")
    assert [(child.name, child.placed) for child in layers.children] == [
        ("layers.0", "replicated"),
        ("layers.1 ... layers.2", "both"),
    ]
    assert root.device_bytes == mixed.device_bytes and root.copied_bytes == mixed.copied_bytes
    assert dict(root.collectives("decode")) == mixed.collectives("decode")


def test_as_dict_is_complete(mixed: Plan):
    found = json.loads(json.dumps(mixed.as_dict()))
    assert set(found) == {
        "model",
        "mesh",
        "devices",
        "placement",
        "device_bytes",
        "all_devices_bytes",
        "copied_bytes",
        "checkpoint_bytes",
        "draft_bytes",
        "modules",
        "parameters",
        "collectives",
        "exchanges",
        "cache",
        "memory",
    }
    assert found["mesh"] == {"model": 4} and found["devices"] == 4
    assert found["placement"] == {"layers.0": "replicate", "*.attention": "replicate"}
    assert len(found["parameters"]) == len(mixed.rows)
    down = next(row for row in found["parameters"] if row["path"] == "layers.1.mlp.down.weight")
    assert down == {
        "path": "layers.1.mlp.down.weight",
        "module": "layers.1.mlp",
        "tactic": "shard",
        "shape": [64, 96],
        "dtype": "bfloat16",
        "logical_axes": ["embed", "ffn"],
        "spec": [None, "model"],
        "device_bytes": 3072,
        "copies": 1,
        "checkpoint_bytes": 12288,
        "steps": ["decode", "prefill"],
    }
    whole = next(row for row in found["parameters"] if row["path"] == "layers.0.mlp.down.weight")
    assert whole["spec"] == [None, None] and whole["copies"] == 4
    assert sum(row["device_bytes"] for row in found["parameters"]) == found["device_bytes"]
    assert found["collectives"]["decode"] == {"all-reduce": 3, "all-gather": 1}
    assert found["exchanges"][-1] == {
        "module": "sampler",
        "kind": "all-gather",
        "what": "largest logits and their tokens",
        "steps": ["decode", "prefill"],
        "row_bytes": 32,
        "rows": "sampled sequence",
    }
    assert found["cache"]["replicated_layers"] == [0, 1, 2]
    assert found["memory"] == {
        "device_bytes": 1 << 20,
        "step_bytes": 0,
        "cache_bytes": mixed.cache_bytes,
        "tokens": mixed.tokens,
    }


class Reader(HTMLParser):
    """HTML parser that fails on unclosed or mismatched elements."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.texts, self.attributes = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("br", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.texts.append(data)


def test_the_html_is_well_formed_and_complete(mixed: Plan, large: Plan):
    shown = Reader(mixed._repr_html_())
    text = " ".join(shown.texts)
    assert REPLICATION_NOTE in text and "none lies on the first device only" in REPLICATION_NOTE
    for said in (
        "layers.1 ... layers.2",
        "(2 equal)",
        "sharded",
        "replicated",
        "both",
        "all-reduce",
        "4 copies",
        "mesh: model 4",
    ):
        assert said in text, said
    assert {"details", "summary", "style"} <= set(shown.tags)
    assert not {"script", "link", "img"} & set(shown.tags)  # self-contained
    classes = [value for name, value in shown.attributes if name == "class"]
    assert {"tag sharded", "tag replicated", "tag both", "s", "c", "k"} <= set(classes)
    assert "layers.0 ... layers.79" in " ".join(Reader(large._repr_html_()).texts)
    assert {"html", "head", "body"} <= set(Reader(page(mixed)).tags)


def test_the_html_escapes_names():
    name = "<script>alert('x')</script>"
    made = sharding.plan(SMALL, tensor_parallel_size=2, placement={"[!<>\"']*.attention": "replicate"})
    made = Plan(**{**vars(made), "model": name})
    shown = Reader(made._repr_html_())
    assert "script" not in shown.tags and name in "".join(shown.texts)
    assert "[!<>\"']*.attention=replicate" in "".join(shown.texts)


def test_a_mesh_is_given_by_sizes_abstract_or_of_devices():
    by_size = sharding.plan(SMALL, mesh={"model": 2})
    abstract = AbstractMesh((2,), ("model",), axis_types=(AxisType.Auto,))
    assert by_size == sharding.plan(SMALL, tensor_parallel_size=2) == sharding.plan(SMALL, mesh=abstract)
    assert by_size == sharding.plan(SMALL, mesh=make_mesh(2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensor_parallel_size": 3}, "layers.0.attention.*64.*size 3|axis 'heads'"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size must be in"),
        ({"placement": {"nothing": "replicate"}}, "'nothing' matches no module"),
        ({"placement": {"*": "split"}}, "supported: shard, replicate"),
        ({"mesh": {"model": 2, "data": 2}}, "axis 'data'.*vision tower"),
        ({"mesh": {"tensor": 2}}, "axis 'tensor'"),
        ({"mesh": {"model": 0}}, "the size of axis 'model' must be"),
        ({"mesh": {"model": 2}, "tensor_parallel_size": 4}, "tensor_parallel_size is 4"),
        ({"memory": 0}, "memory must be"),
        ({"memory": True}, "memory must be"),
        ({"dtype": "int3"}, "dtype must be"),
        ({"quantization": "fp4"}, "quantization must be"),
    ],
)
def test_bad_settings_are_refused_by_name(changes: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        sharding.plan(SMALL, **changes)


def test_bad_models_are_refused_by_name(tmp_path: Path):
    with pytest.raises(ConfigError, match="BogusModel.*supported: .*LlamaForCausalLM"):
        sharding.plan(SMALL | {"architectures": ["BogusModel"]})
    with pytest.raises(ConfigError, match="hidden_size"):
        sharding.plan(SMALL | {"hidden_size": -1})
    with pytest.raises(ConfigError, match="torch_dtype. is 'float8_e4m3fn'; supported: float32, bfloat16, float16"):
        sharding.plan(SMALL | {"torch_dtype": "float8_e4m3fn"})
    with pytest.raises(ConfigError, match="torch_dtype is 7; it must be a name"):
        sharding.plan(SMALL | {"torch_dtype": 7})
    with pytest.raises(ConfigError, match="BogusModel"):  # reported before other missing fields
        sharding.plan({"architectures": ["BogusModel"], "text_config": {"dtype": "bfloat16"}})
    with pytest.raises(CheckpointError, match="no config.json"):
        sharding.plan(tmp_path)
    with pytest.raises(TypeError, match="mesh must be"):
        sharding.plan(SMALL, mesh=4)
    with pytest.raises(TypeError, match="unknown setting 'placements'; did you mean 'placement'"):
        sharding.plan(SMALL, placements={})


def test_a_config_without_a_dtype_is_planned_as_wide_as_its_weights_may_be(tmp_path: Path, caplog):
    """The dtype of a folder with weights is that of the weights."""
    silent = {name: value for name, value in SMALL.items() if name != "torch_dtype"}
    assert sharding.plan(silent).rows == sharding.plan(SMALL, dtype="float32").rows
    assert "config.json states no dtype; the plan assumes float32" in caplog.text
    assert sharding.plan(silent | {"torch_dtype": "auto"}).rows == sharding.plan(silent).rows
    (tmp_path / "config.json").write_text(json.dumps(silent))
    save_file({"x": np.zeros(2, np.float16)}, tmp_path / "model.safetensors")
    assert sharding.plan(tmp_path).rows == sharding.plan(SMALL, dtype="float16").rows


def test_a_folder_with_nothing_but_a_config_is_enough(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    of_folder = sharding.plan(str(tmp_path), tensor_parallel_size=2)
    assert of_folder.rows == sharding.plan(SMALL, tensor_parallel_size=2).rows
    assert of_folder.model == f"{tmp_path} (LlamaForCausalLM)"
    assert sharding.plan(tmp_path, hf_overrides={"num_hidden_layers": 1}).modules.keys() < of_folder.modules.keys()


@pytest.mark.slow
def test_a_converted_folder_is_planned_as_it_was_converted(tmp_path: Path):
    folder = checkpoint.write(tmp_path / "model", SMALL | {"dtype": "float32"}, with_tokenizer=False)
    convert(folder, tmp_path / "converted", make_mesh(2), placement=Placement({"*.mlp": "replicate"}), progress=False)
    own = sharding.plan(tmp_path / "converted", tensor_parallel_size=2)
    assert own.patterns == {"*.mlp": "replicate"}
    assert own.rows == sharding.plan(folder, tensor_parallel_size=2, placement={"*.mlp": "replicate"}).rows
    assert sharding.plan(tmp_path / "converted", placement={"head": "replicate"}).patterns == {"head": "replicate"}


ALONE = """
import json, sys
from jaxinfer import sharding
made = sharding.plan(json.loads(sys.argv[1]), tensor_parallel_size=64)
import jax
print(json.dumps([len(jax.devices()), made.devices, made.device_bytes, len(jax.live_arrays())]))
"""


@pytest.mark.slow
def test_planning_needs_no_devices_and_allocates_nothing():
    environment = {"JAX_PLATFORMS": "cpu", "PATH": "", "PYTHONPATH": str(Path(jaxinfer.__file__).parents[1])}
    sizes = {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 8, "intermediate_size": 128}
    command = [sys.executable, "-c", ALONE, json.dumps(SMALL | sizes)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    here, planned, size, live = json.loads(done.stdout)
    assert (here, planned, live) == (1, 64, 0) and size > 0


def test_a_module_can_be_planned_without_a_config(mixed: Plan):
    """`sharding.placement.plan` only needs parameters: no family, no engine."""
    model_family, config = weights.parse(SMALL)
    mesh = AbstractMesh((4,), ("model",), axis_types=(AxisType.Auto,))
    module = weights.abstract(model_family, config, jnp.dtype("bfloat16"), mesh, placement=Placement(mixed.patterns))
    own = placement.plan(module, mesh, itemsize=BF16)
    assert own.rows == mixed.rows
    assert own.exchanges == tuple(e for e in mixed.exchanges if e.module != "sampler")
    assert own.cache is None and own.tokens is None


def test_a_collective_of_no_known_kind_is_refused():
    with pytest.raises(ValueError, match="kind must be one of all-reduce, all-gather"):
        Collective("all-to-all", "rows", 4)
    assert Collective(ALL_REDUCE, "sums", 4).arrays == 1
