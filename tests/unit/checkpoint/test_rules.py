"""Test the weight table through the real loader: every device gets its rows, and every error names its tensor."""

import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import support.checkpoint
from safetensors.numpy import save_file
from support.compiler import flags
from support.tiny import ARCHITECTURES, CONFIG, config

from jaxinfer.checkpoint import rules, ties
from jaxinfer.checkpoint.safetensors import SafetensorsReader
from jaxinfer.checkpoint.weight_table import Rule, expand
from jaxinfer.errors import CheckpointError
from jaxinfer.loading import weights as loading
from jaxinfer.sharding import make_mesh

M, F, V, H, K, D = 32, 48, 97, 4, 2, 16
"""Sizes of `support.tiny.CONFIG`."""
LAYER = "model.layers.0"


def tensors(family: str = "llama", *, dtype: type = np.float32, tied: bool = False) -> dict[str, np.ndarray]:
    """Return a one-layer checkpoint written out by hand; all of its values differ."""
    shapes = {
        "model.embed_tokens.weight": (V, M),
        "model.norm.weight": (M,),
        "lm_head.weight": (V, M),
        f"{LAYER}.input_layernorm.weight": (M,),
        f"{LAYER}.post_attention_layernorm.weight": (M,),
        f"{LAYER}.self_attn.o_proj.weight": (M, H * D),
        f"{LAYER}.mlp.down_proj.weight": (M, F),
    }
    if tied:
        del shapes["lm_head.weight"]
    if family == "phi3":
        shapes[f"{LAYER}.self_attn.qkv_proj.weight"] = ((H + 2 * K) * D, M)
        shapes[f"{LAYER}.mlp.gate_up_proj.weight"] = (2 * F, M)
    else:
        shapes |= {f"{LAYER}.self_attn.{name}_proj.weight": (n * D, M) for name, n in (("q", H), ("k", K), ("v", K))}
        shapes |= {f"{LAYER}.mlp.{name}_proj.weight": (F, M) for name in ("gate", "up")}
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def checkpoint(folder: Path, content: dict[str, np.ndarray], family: str = "llama", **changes: object) -> Path:
    save_file(content, folder / "model.safetensors")
    hf = CONFIG | {"num_hidden_layers": 1, "architectures": [ARCHITECTURES[family]]} | changes
    (folder / "config.json").write_text(json.dumps(hf))
    return folder


def load(folder: Path, tp: int = 1, dtype: str = "auto") -> dict[str, object]:
    return rules.parameters(loading.load(folder, make_mesh(tp), dtype=dtype, progress=False))


def refused(folder: Path, *named: str) -> None:
    with pytest.raises(CheckpointError) as error:
        load(folder)
    for text in named:
        assert text in str(error.value)


def shards(parameter) -> list[np.ndarray]:
    """Return the shard of each device, in device order."""
    held = sorted(parameter.get_value().addressable_shards, key=lambda shard: shard.device.id)
    return [np.asarray(shard.data) for shard in held]


def rows(weight: np.ndarray, units: int, shard: int, tp: int) -> np.ndarray:
    """Return the rows of a projection of `units` heads that a shard owns: its heads, or the one head that it shares."""
    heads = weight.reshape(units, -1, weight.shape[-1])
    own = heads[shard * units // tp :][: max(1, units // tp)]
    return own.reshape(-1, weight.shape[-1])


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_each_device_holds_its_rows_and_no_others(family, tp, tmp_path):
    content = tensors(family)
    loaded = load(checkpoint(tmp_path, content, family), tp)
    attention, mlp = f"{LAYER}.self_attn", f"{LAYER}.mlp"
    if family == "phi3":
        q, k, v = np.split(content[f"{attention}.qkv_proj.weight"], [H * D, (H + K) * D])
        gate, up = np.split(content[f"{mlp}.gate_up_proj.weight"], 2)
    else:
        q, k, v = (content[f"{attention}.{name}_proj.weight"] for name in "qkv")
        gate, up = (content[f"{mlp}.{name}_proj.weight"] for name in ("gate", "up"))
    out, down = content[f"{attention}.o_proj.weight"], content[f"{mlp}.down_proj.weight"]
    head = content["lm_head.weight"]
    padded = np.concatenate([head, np.zeros((-V % tp, M), np.float32)])
    for s in range(tp):
        qkv = np.concatenate([rows(q, H, s, tp), rows(k, K, s, tp), rows(v, K, s, tp)])
        expected = {
            "attention.qkv": qkv[None],
            "mlp.gate_up": np.concatenate([rows(gate, F, s, tp), rows(up, F, s, tp)])[None],
            "attention.out": np.split(out, tp, axis=1)[s],
            "mlp.down": np.split(down, tp, axis=1)[s],
        }
        for name, values in expected.items():
            np.testing.assert_array_equal(shards(loaded[f"layers.0.{name}.weight"])[s], values, name)
        np.testing.assert_array_equal(shards(loaded["head.weight"])[s], np.split(padded, tp)[s])
        np.testing.assert_array_equal(shards(loaded["norm.scale"])[s], content["model.norm.weight"])


# A third group beside two kv heads with two query heads each (first case); two more query heads per group (second).
@pytest.mark.parametrize(
    ("tp", "queries", "keys"),
    [(3, [0, 1, 2, 3, None, None], [0, 1, None]), (8, [0, 1, None, None, 2, 3, None, None], [0, 0, 0, 0, 1, 1, 1, 1])],
)
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_heads_of_zeroes_are_zero_in_every_tensor(quantization, tp, queries, keys, tmp_path):
    folder = checkpoint(tmp_path, tensors())

    def read(mesh) -> dict:
        module = loading.load(folder, mesh, quantization=quantization, pad_heads=True, progress=False)
        return rules.parameters(module)

    def heads(part: np.ndarray, wanted: list[int | None]) -> np.ndarray:
        """Return `[heads, D, ...]`, with zeros for heads that are None."""
        own = part.reshape(-1, D, *part.shape[1:])
        return np.stack([np.zeros_like(own[0]) if head is None else own[head] for head in wanted])

    whole, padded, attention = read(make_mesh()), read(make_mesh(tp)), "layers.0.attention"
    kinds = ("weight", "weight_scale") if quantization else ("weight",)
    for kind in kinds:
        q, k, v = np.split(np.asarray(whole[f"{attention}.qkv.{kind}"][...])[0], [H * D, (H + K) * D])
        cut = [np.split(heads(part, wanted), tp) for part, wanted in ((q, queries), (k, keys), (v, keys))]
        for found, *parts in zip(shards(padded[f"{attention}.qkv.{kind}"]), *cut, strict=True):
            np.testing.assert_array_equal(found[0], np.concatenate(parts).reshape(found[0].shape))
    columns = heads(np.asarray(whole[f"{attention}.out.weight"][...]).T, queries).reshape(len(queries) * D, M).T
    np.testing.assert_array_equal(padded[f"{attention}.out.weight"][...], columns)
    if quantization:
        np.testing.assert_array_equal(*(read[f"{attention}.out.weight_scale"][...] for read in (whole, padded)))


def test_bfloat16_becomes_float32_exactly_and_the_other_way_rounded(tmp_path):
    content = tensors(dtype=ml_dtypes.bfloat16)
    folder = checkpoint(tmp_path, content, dtype="bfloat16")
    wide, own = load(folder, dtype="float32")["head.weight"], load(folder, dtype="bfloat16")["head.weight"]
    assert (wide.dtype, own.dtype) == (np.float32, ml_dtypes.bfloat16)
    expected = content["lm_head.weight"].astype(np.float32)
    for found in (wide, own):
        np.testing.assert_array_equal(np.asarray(found.get_value(), np.float32), expected)
    exact = tensors()["lm_head.weight"]
    save_file(tensors(), folder / "model.safetensors")
    rounded = load(folder, dtype="bfloat16")["head.weight"].get_value()
    np.testing.assert_array_equal(np.asarray(rounded), exact.astype(ml_dtypes.bfloat16))


def test_the_weights_outlive_the_file(tmp_path):
    content = tensors()
    loaded = load(checkpoint(tmp_path, content))
    with open(tmp_path / "model.safetensors", "r+b") as opened:
        opened.write(b"\0" * os.path.getsize(tmp_path / "model.safetensors"))
    np.testing.assert_array_equal(loaded["embedding.weight"].get_value(), content["model.embed_tokens.weight"])


def test_an_unknown_tensor_is_named(tmp_path):
    content = tensors() | {f"{LAYER}.self_attn.q_proj.bias": np.zeros(H * D, np.float32)}
    refused(checkpoint(tmp_path, content), f"'{LAYER}.self_attn.q_proj.bias'", "1 tensor", "does not know")


def test_more_unknown_tensors_than_fit_a_message_are_counted(tmp_path):
    extra = {f"other.{i}": np.zeros(1, np.float32) for i in range(11)}
    refused(checkpoint(tmp_path, tensors() | extra), "11 tensor", "'other.0'", "and 3 more")


@pytest.mark.parametrize("name", tensors())
def test_a_missing_tensor_is_named(name, tmp_path):
    content = tensors()
    del content[name]
    refused(checkpoint(tmp_path, content), f"{tmp_path} lacks 1 tensor", f"'{name}'", "the weights are incomplete")


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_misshaped_tensor_is_named_with_expected_and_found(family, tmp_path):
    for name, value in tensors(family).items():
        content = tensors(family)
        content[name] = np.concatenate([value, value[:1]])
        found = content[name].shape
        refused(checkpoint(tmp_path, content, family), f"'{name}'", str(list(value.shape)), str(list(found)))


def test_a_transposed_tensor_is_refused(tmp_path):
    content = tensors()
    name = f"{LAYER}.mlp.down_proj.weight"
    content[name] = np.ascontiguousarray(content[name].T)
    refused(checkpoint(tmp_path, content), f"'{name}'", "[32, 48]", "[48, 32]")


def test_layers_beyond_the_config_are_unknown_and_those_short_of_it_missing(tmp_path):
    content = tensors()
    refused(checkpoint(tmp_path, content, num_hidden_layers=2), "lacks 9 tensor", "'model.layers.1.")
    content |= {name.replace("layers.0", "layers.1"): value for name, value in content.items() if "layers.0" in name}
    refused(checkpoint(tmp_path, content, num_hidden_layers=1), "9 tensor", "does not know", "'model.layers.1.")


EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("present", [(EMBED,), (HEAD,), (EMBED, HEAD)])
def test_a_tied_head_is_the_embedding_whatever_names_the_file_has_for_it(present, tmp_path, caplog):
    content = tensors(tied=True)
    table = content.pop(EMBED)
    loaded = load(checkpoint(tmp_path, content | dict.fromkeys(present, table), tie_word_embeddings=True), 2)
    assert "head.weight" not in loaded and "differ" not in caplog.text
    np.testing.assert_array_equal(loaded["embedding.weight"].get_value()[:V], table)


@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("row", [0, V - 1])
def test_a_head_that_differs_is_used_with_a_warning_whatever_config_says(row, stored, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(ties, "COPY_ELEMENTS", 7 * M)
    content = tensors(dtype=np.float32, tied=True)
    head = content[EMBED].copy()
    head[row, 3] += 1
    loaded = load(checkpoint(tmp_path, content | {HEAD: head.astype(stored)}, tie_word_embeddings=True))
    np.testing.assert_array_equal(loaded["head.weight"].get_value(), head.astype(stored))
    np.testing.assert_array_equal(loaded["embedding.weight"].get_value(), content[EMBED])
    assert f"{HEAD} is tied to {EMBED}" in caplog.text and "tie_word_embeddings" in caplog.text


def test_what_lacks_both_tied_tensors_or_an_untied_head_is_refused(tmp_path):
    content = tensors(tied=True)
    refused(checkpoint(tmp_path, content), f"'{HEAD}'", "lacks", "hf_overrides={'tie_word_embeddings': True}")
    del content[EMBED]
    refused(checkpoint(tmp_path, content, tie_word_embeddings=True), f"'{EMBED}'", "lacks 1 tensor")


def test_kimi_linear_has_a_head_of_its_own_whatever_config_says():
    _, parsed = loading.parse(config("kimi_linear") | {"tie_word_embeddings": True})
    assert not parsed.tied


UNREAD = (
    f"{LAYER}.self_attn.rotary_emb.inv_freq",
    f"{LAYER}.self_attn.rotary_emb.cos_cached",
    "model.rotary_emb.inv_freq",
    f"{LAYER}.self_attn.bias",
    f"{LAYER}.self_attn.masked_bias",
    "mtp.layers.0.self_attn.q_proj.weight",
    "score.weight",
    "v_head.summary.weight",
    "encoder.version",
    "model.layers.1.eh_proj.weight",
    "model.layers.1.mlp.up_proj.weight",
    "model.embeddings.position_ids",
    f"{LAYER}.self_attn.k_proj.k_scale",
    f"{LAYER}.self_attn.v_scale",
)


def test_tensors_that_no_forward_pass_reads_are_left_out_with_one_line(tmp_path, caplog):
    caplog.set_level("INFO", "jaxinfer")
    content = tensors()
    loaded = load(checkpoint(tmp_path, content | {name: np.zeros(8, np.float32) for name in UNREAD}))
    assert loaded.keys() == load(checkpoint(tmp_path, content)).keys()
    lines = [record.message for record in caplog.records if "left out" in record.message]
    assert len(lines) == 1 and f"{len(UNREAD)} tensor" in lines[0] and "and 6 more" in lines[0]


def test_an_adapter_beside_a_model_is_not_applied_which_a_warning_says(tmp_path, caplog):
    folder = checkpoint(tmp_path, tensors())
    (folder / "adapter_config.json").write_text("{}")
    load(folder)
    assert "a PEFT adapter (adapter_config.json) beside the model's weights: it is not applied" in caplog.text


def test_layers_that_predict_further_tokens_are_those_that_config_counts(tmp_path):
    hf = config("deepseek_v3")
    content = support.checkpoint.tensors(hf)
    content |= {name.replace("layers.1", "layers.2"): value for name, value in content.items() if "layers.1" in name}
    folder = checkpoint(tmp_path, content, "deepseek_v3", **hf, num_nextn_predict_layers=1)
    assert "layers.1.mlp.router.weight" in load(folder)
    refused(checkpoint(tmp_path, content, "deepseek_v3", **hf), "does not know", "'model.layers.2.")


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module.module.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: f"pretrained_model.{name}",
        lambda name: f"base_model.model.{name}",
        lambda name: f"module.base_model.model._orig_mod.{name}",
        lambda name: f"model.{name}",
        lambda name: name.replace(".0.", ".0._orig_mod."),
        lambda name: f"model._fsdp_wrapped_module.{name.removeprefix('model.')}" if name.startswith("model.") else name,
        lambda name: name.removeprefix("model."),
        lambda name: f"language_model.{name}",
        lambda name: name.replace("model.", "model.language_model."),
        lambda name: name.replace("model.", "language_model."),
    ],
)
def test_a_model_saved_within_another_or_without_its_prefix_is_found(rename, tmp_path):
    content = tensors()
    loaded = load(checkpoint(tmp_path, {rename(name): value for name, value in content.items()}))
    np.testing.assert_array_equal(loaded["head.weight"].get_value(), content[HEAD])
    np.testing.assert_array_equal(loaded["norm.scale"].get_value(), content["model.norm.weight"])


@pytest.mark.parametrize(
    ("names", "dtype", "reason"),
    [
        (("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"), np.float32, "adapter"),
        (("base_model.model.{}.weight",), np.float32, "merge_and_unload"),  # beside tensors of the model itself
        (("{}.lora_A.default.weight",), np.float32, "adapter"),
        (("{}.base_layer.weight",), np.float32, "adapter"),
        (("{}.modules_to_save.default.weight", "{}.original_module.weight"), np.float32, "adapter"),
        (("{}.token_adapter.trainable_tokens_delta",), np.float32, "adapter"),
        (("{}.qweight", "{}.qzeros", "{}.scales", "{}.g_idx"), np.int32, "quantised in a format that is not read"),
        (("{}.weight_scale_inv",), np.float32, "quantised"),
        (("{}.weight",), ml_dtypes.float8_e4m3fn, "F8_E4M3"),
        (("{}.weight",), np.uint8, "U8"),
        (("{}.weight", "{}.weight.absmax", "{}.weight.quant_map"), np.uint8, "quantised"),
        (("{}.W_q", "{}.scale", "{}.zero"), np.float32, "quantised"),
        (("{}.q_weight", "{}.q_scale", "{}.q_invperm"), np.float32, "quantised"),
        (("{}.weight._data", "{}.weight._scale"), np.float32, "quantised"),
        (("{}.codes", "{}.codebooks"), np.float32, "quantised"),
    ],
)
def test_an_adapter_and_quantised_tensors_are_refused_by_that_before_any_shape(names, dtype, reason, tmp_path):
    content, module = tensors(), f"{LAYER}.mlp.up_proj"
    del content[f"{module}.weight"]
    refused(checkpoint(tmp_path, content | {name.format(module): np.zeros((2, 3), dtype) for name in names}), reason)


def test_a_table_that_is_wrong_itself_is_refused(tmp_path):
    """Cover mistakes of the author of a new family, not of a checkpoint."""
    folder = checkpoint(tmp_path, tensors())
    config = json.loads((folder / "config.json").read_text())
    model_family, parsed = loading.parse(config)
    table = list(model_family.weight_rules(parsed))

    def load_with(table: list[Rule]) -> None:
        mesh = make_mesh()
        module = loading.abstract(model_family, parsed, np.dtype("float32"), mesh)
        with SafetensorsReader(folder) as reader:
            rules.load(module, table, reader, mesh, progress=False)

    load_with(table)
    with pytest.raises(CheckpointError, match="'model.norm.weight' twice"):
        load_with([*table, Rule("model.norm.weight", "norm.scale")])
    with pytest.raises(CheckpointError, match="'norm.other', which the model does not have"):
        load_with([Rule(r.source, "norm.other" if r.target == "norm.scale" else r.target, r.parts) for r in table])
    with pytest.raises(CheckpointError, match="'norm.scale' from nothing, not wholly"):
        load_with([Rule(r.source, None if r.target == "norm.scale" else r.target, r.parts) for r in table])
    with pytest.raises(CheckpointError, match="'layers.0.attention.qkv.weight'"):
        load_with([Rule(r.source, None if r.source.endswith("k_proj.weight") else r.target, r.parts) for r in table])


PEAK = """
import sys
from pathlib import Path
from jaxinfer.loading import weights
from jaxinfer.sharding import make_mesh

def status(name):
    return int(next(l for l in open("/proc/self/status") if l.startswith(name)).split()[1]) * 1024

mesh = make_mesh(int(sys.argv[1]))
kept = weights.load(Path(sys.argv[2]), mesh, dtype="float32", quantization=sys.argv[4] or None, progress=False)
before = status("VmRSS")
module = weights.load(Path(sys.argv[3]), mesh, dtype="float32", quantization=sys.argv[4] or None, progress=False)
print(status("VmHWM") - before)
"""
"""Program that loads a tiny checkpoint first, to import all modules, then measures the peak resident memory with a
large one."""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(
    ("stored", "quantization"), [(np.float32, ""), (ml_dtypes.bfloat16, ""), (ml_dtypes.bfloat16, "int8")]
)
def test_loading_takes_little_more_memory_than_the_weights(tp, stored, quantization, tmp_path):
    """Allow at most 1.3 x the largest tensor group beside the weights, for any dtype of the checkpoint."""
    width, ffn, layers, vocab = 1024, 4096, 3, 4096
    rng = np.random.default_rng(0)
    content = {}
    for name, value in tensors().items():
        sizes = {M: width, F: ffn, V: vocab, H * D: 2 * width}  # K x D equals M in both sizes
        for i in range(layers) if "layers" in name else (0,):
            shape = tuple(sizes[n] for n in value.shape)
            content[name.replace("layers.0", f"layers.{i}")] = rng.random(shape, np.float32).astype(stored)
    changes = dict(
        hidden_size=width,
        intermediate_size=ffn,
        vocab_size=vocab,
        head_dim=64,
        num_attention_heads=32,
        num_key_value_heads=16,
        num_hidden_layers=layers,
    )
    for name in ("tiny", "large"):
        (tmp_path / name).mkdir()
    tiny, large = checkpoint(tmp_path / "tiny", tensors()), checkpoint(tmp_path / "large", content, **changes)
    weights = 4 * sum(value.size for value in content.values())
    if quantization:  # all matrices except the embedding
        weights = sum(value.size for value in content.values()) + 3 * vocab * width
    largest = 4 * 2 * ffn * width
    del content
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags(tp)}
    command = [sys.executable, "-c", PEAK, str(tp), str(tiny), str(large), quantization]
    taken = int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    assert weights * 0.9 < taken < weights + 1.3 * largest, (taken, weights, largest)


NAMES = [
    Rule("norm.weight", "norm.scale", also=("model.norm.weight",)),
    Rule("layer.{i}.x", "layers.{i}.x", also=("h.{i}.x",)),
]


def test_a_tensor_is_found_by_any_of_its_names_and_may_have_only_one(tmp_path):
    expanded = expand(NAMES, 2)
    assert [(rule.source, rule.also) for rule in expanded[1:]] == [("layer.0.x", ("h.0.x",)), ("layer.1.x", ("h.1.x",))]
    content = tensors()
    folder = checkpoint(tmp_path, content)
    model_family, config = loading.parse(json.loads((folder / "config.json").read_text()))
    module = loading.abstract(model_family, config, np.dtype("float32"), make_mesh(1))
    table = [rule for rule in model_family.weight_rules(config) if rule.source != "model.norm.weight"]

    def fill() -> None:
        with SafetensorsReader(folder) as reader:
            rules.load(module, [*table, NAMES[0]], reader, make_mesh(1), progress=False)

    fill()
    np.testing.assert_array_equal(rules.parameters(module)["norm.scale"][...], content["model.norm.weight"])
    save_file(content | {"norm.weight": content["model.norm.weight"]}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"does not know: 'model.norm.weight'"):
        fill()
