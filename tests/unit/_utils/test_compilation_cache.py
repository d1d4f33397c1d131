"""Where compiled programs are kept, and that those which are read back give the same tokens."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache as jax_cache
from support.compiler import flags

from jaxinfer._utils import compilation_cache
from jaxinfer._utils.compilation_cache import enable

NAMES = ("jax_enable_compilation_cache", "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")

SCRIPT = """
import json, logging, sys
import jax
from jaxinfer import LLM, SamplingParams, demo

logging.basicConfig(level=logging.INFO, stream=sys.stdout)
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if name.endswith("cache_hits") else None)
settings = dict(max_num_seqs=4, max_num_batched_tokens=64, prefill_buckets=[64], kv_cache_memory_bytes=1 << 24)
with LLM(demo.path(), use_tqdm=False, **settings) as llm:
    done = llm.warmup(use_tqdm=False)
    drawn = SamplingParams(temperature=0.9, top_k=9, seed=1, max_tokens=8)
    params = [SamplingParams(temperature=0, max_tokens=8), drawn]
    made = llm.generate(["Question: What is 17 plus 25?\\nAnswer:"] * 2, params, use_tqdm=False)
print(json.dumps({"hits": len(hits), "programs": done.programs, "tokens": [o.outputs[0].token_ids for o in made]}))
"""


@pytest.fixture
def settings():
    """JAX's settings as a user's process has them; nothing is compiled meanwhile."""
    before = {name: getattr(jax.config, name) for name in NAMES}
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache._log_once.cache_clear()
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", compilation_cache.JAX_LEAST_SECONDS)
    yield jax.config
    for name, value in before.items():
        jax.config.update(name, value)
    jax_cache.reset_cache()


def test_by_default_it_is_the_users_cache_folder(settings, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with caplog.at_level(logging.INFO):
        enable("auto")
        enable("auto")
    assert Path(settings.jax_compilation_cache_dir) == tmp_path / "jaxinfer" / "xla"
    assert settings.jax_persistent_cache_min_compile_time_secs < 1
    assert caplog.text.count("compiled programs are cached in") == 1


@pytest.mark.parametrize("setting", ["auto", None])
def test_what_the_user_told_jax_stands(settings, tmp_path, setting):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    least = settings.jax_persistent_cache_min_compile_time_secs
    enable(setting)
    assert settings.jax_compilation_cache_dir == str(tmp_path)
    assert settings.jax_persistent_cache_min_compile_time_secs == least


@pytest.mark.parametrize("enabled", [False, True])
def test_it_can_be_off(settings, enabled):
    jax.config.update("jax_enable_compilation_cache", enabled)
    enable(None if enabled else "auto")
    assert settings.jax_compilation_cache_dir is None


def test_a_folder_of_ones_own(settings, tmp_path):
    enable(str(tmp_path / "mine"))
    assert settings.jax_compilation_cache_dir == str(tmp_path / "mine")


def test_a_folder_that_cannot_be_written_is_a_warning(settings, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    enable(str(tmp_path / "file" / "below"))
    assert settings.jax_compilation_cache_dir is None
    assert "compilation_cache_dir" in caplog.text and caplog.records[-1].levelno == logging.WARNING


@pytest.mark.slow
def test_a_second_process_reads_all_programs_and_gives_the_same_tokens(tmp_path):
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "JAX_ENABLE_COMPILATION_CACHE": "true"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    environment["XLA_FLAGS"] = flags(1)
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = (
        "0"  # fast machines compile small ones in less than ours
    )
    runs = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        runs.append((json.loads(done.stdout.splitlines()[-1]), done.stderr))
    (first, _), (second, said) = runs
    assert second["tokens"] == first["tokens"]
    assert first["hits"] == 0 and second["hits"] >= second["programs"]  # and those that loading compiles
    assert said == "", "XLA's loader finds nothing to complain about"
