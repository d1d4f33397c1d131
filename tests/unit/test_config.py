"""Engine settings: each wrong one is named with its value and limit."""

import re
import subprocess
import sys
from dataclasses import fields

import jax.numpy as jnp
import pytest
from flax import nnx

from jaxinfer import LLM
from jaxinfer.config import REPLACED, EngineConfig
from jaxinfer.errors import ConfigError
from jaxinfer.sharding.policy import Placement

CASES = [
    ({"max_model_len": 1}, r"max_model_len must be in \[2, "),
    ({"max_num_seqs": True}, "max_num_seqs must be an integer, got True"),
    ({"block_size": 1.5}, "block_size must be an integer, got 1.5"),
    ({"max_logprobs": 21}, r"max_logprobs must be in \[0, 20\], got 21"),
    ({"gpu_memory_utilization": "x"}, r"gpu_memory_utilization must be a number in \(0, 1\], got 'x'"),
    ({"gpu_memory_utilization": 0}, r"gpu_memory_utilization must be a number in \(0, 1\], got 0"),
    ({"log_interval": "x"}, "log_interval must be a number"),
    ({"enable_prefix_caching": "no"}, "enable_prefix_caching must be True or False, got 'no'"),
    ({"fuse_projections": "auto"}, "fuse_projections must be True or False, got 'auto'"),
    ({"decode_buckets": 5}, "decode_buckets must be a list of positive integers, got 5"),
    ({"decode_steps": "many"}, r"decode_steps must be 'auto' or an integer in \[1, 64\], got 'many'"),
    ({"decode_steps": 0}, r"decode_steps must be 'auto' or an integer in \[1, 64\], got 0"),
    ({"decode_steps": True}, "decode_steps must be 'auto' or an integer in .* got True"),
    ({"joint_steps": 1}, "joint_steps must be None, True or False, got 1"),
    ({"prefill_buckets": (0,)}, "prefill_buckets must be a list of positive integers"),
    ({"dtype": "int8"}, "dtype must be auto, float32, bfloat16 or float16, got 'int8'"),
    (
        {"quantization": "int4"},
        "quantization must be None or int8, fp8, dequantize, .*, got 'int4'",
    ),
    (
        {"quantization": ["int8"]},
        r"quantization must be None or int8, fp8, dequantize, .*, got \['int8'\]",
    ),
    ({"dtype": 5.5}, "dtype must be a name or a NumPy dtype, got 5.5"),
    ({"compilation_cache_dir": 5}, "compilation_cache_dir must be 'auto', a folder or None, got 5"),
    ({"compilation_cache_dir": ""}, "compilation_cache_dir must be 'auto', a folder or None, got ''"),
    ({"placement": ["*.mlp"]}, r"placement must map patterns of module paths to tactics, got \['\*.mlp'\]"),
    (
        {"placement": {"*.mlp": "sharded"}},
        r"placement: the tactic of '\*.mlp' is 'sharded'; supported: shard, replicate",
    ),
    ({"placement": {"*.mlp": None}}, r"placement: the tactic of '\*.mlp' is None"),
    ({"placement": {3: "shard"}}, "placement: a pattern must be a string such as 'layers.*.mlp', got 3"),
    ({"kv_cache_dtype": "fp8_e5m2"}, "kv_cache_dtype must be one of auto, fp8, fp8_e4m3, int8, got 'fp8_e5m2'"),
    ({"kv_cache_dtype": None}, "kv_cache_dtype must be one of auto, fp8, fp8_e4m3, int8, got None"),
    ({"cache": "ring"}, "cache must be 'paged' or 'contiguous', got 'ring'"),
    ({"cache": "contiguous", "pool_blocks": 9}, "pool_blocks is 9, but cache='contiguous' has no block pool"),
    ({"cache": "contiguous", "enable_prefix_caching": True}, "enable_prefix_caching is True, but cache='contiguous'"),
    ({"pad_heads": 1}, "pad_heads must be True or False, got 1"),
    ({"compiler_options": ["xla_gpu_autotune_level"]}, "compiler_options must map names to .* got "),
    ({"compiler_options": {"xla_gpu_autotune_level": [4]}}, "compiler_options must map names to"),
]

SCRIPT = """
import ast, sys
from jaxinfer.config import EngineConfig
from jaxinfer.errors import ConfigError
for settings in ast.literal_eval(sys.argv[1]):
    try:
        EngineConfig.of(settings)
        print("accepted")
    except ConfigError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def messages() -> list[str]:
    """What a user is told of each case. In a process of its own: here annotations are checked before the values."""
    command = [sys.executable, "-c", SCRIPT, repr([settings for settings, _ in CASES])]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.parametrize("number", range(len(CASES)))
def test_a_wrong_value_is_named(number, messages):
    assert re.search(CASES[number][1], messages[number])


def test_an_unknown_setting_is_named_with_the_closest():
    with pytest.raises(TypeError, match="unknown setting 'max_num_seq'; did you mean 'max_num_seqs'?"):
        EngineConfig.of({"max_num_seq": 4})


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("enable_lora", "adapters="),
        ("max_loras", "use max_adapters"),
        ("enforce_eager", "leave it out"),
        ("x", "known"),
    ],
)
def test_settings_of_other_libraries_are_translated(name, hint):
    with pytest.raises(TypeError, match=rf"unknown setting '{name}'.*{hint}"):
        EngineConfig.of({name: 1})


def test_hints_are_for_settings_that_do_not_exist_and_name_such_that_do():
    known = {field.name for field in fields(EngineConfig)}
    assert not known & set(REPLACED)
    used = {match for hint in REPLACED.values() for match in re.findall(r"use (\w+)", hint)}
    assert used and used <= known


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.dtype("bfloat16"), "bfloat16"])
def test_a_dtype_may_be_one(dtype):
    assert EngineConfig.of({"dtype": dtype}).dtype == "bfloat16"


@pytest.mark.parametrize("setting", [{"quantization": "int8"}, {"placement": {"*": "replicate"}}, {"pad_heads": True}])
def test_a_module_that_has_its_weights_is_neither_quantised_nor_placed(setting):
    [(name, value)] = setting.items()
    expected = re.escape(f"{name} is {value!r}, but the weights of a module are already loaded")
    with pytest.raises(ConfigError, match=rf"{expected}.*load\(directory, mesh, {name}="):
        LLM(nnx.Module(), **setting)


@pytest.mark.parametrize("given", [{"*.mlp": "replicate"}, Placement({"*.mlp": "replicate"}), None, {}])
def test_a_placement_is_a_mapping_or_made_of_one(given):
    assert EngineConfig.of({"placement": given}).placement == given
