"""What is said where JAX has no GPU although its package for GPUs is installed."""

import jax
import pytest

from jaxinfer import LLM
from jaxinfer.errors import ConfigError
from jaxinfer.sharding import devices as found
from jaxinfer.sharding import make_mesh


@pytest.fixture
def unset(monkeypatch):
    """No JAX_PLATFORMS, a CUDA plugin, no driver."""
    monkeypatch.setattr(found, "PLUGINS", ("jax_plugins.none", "json"))
    monkeypatch.setattr(found, "DRIVER", "libnone.so.1")
    jax.devices()  # begun with the platform of the tests
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", None)
    found._say_no_gpu.cache_clear()
    yield
    jax.config.update("jax_platforms", before)
    found._say_no_gpu.cache_clear()


def test_a_cpu_in_place_of_a_gpu_is_said_once(unset, caplog, monkeypatch):
    make_mesh()
    make_mesh()
    [message] = caplog.messages
    assert "no NVIDIA GPU (libnone.so.1 of NVIDIA's driver cannot be loaded)" in message and "--gpus all" in message
    caplog.clear()
    found._say_no_gpu.cache_clear()
    monkeypatch.setattr(found, "PLUGINS", ("jax_plugins.none",))
    make_mesh()
    assert not caplog.messages, "without the package nobody expects a GPU"


def test_a_cpu_that_was_asked_for_is_not_mentioned(unset, caplog):
    jax.config.update("jax_platforms", "cpu")
    make_mesh()
    assert not caplog.messages


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("Unable to initialize backend 'cuda'\nmore")])
def test_no_device_is_an_error_of_one_line(unset, monkeypatch, error):
    def devices():
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    for make in (make_mesh, lambda: LLM("smollm2")):
        with pytest.raises(ConfigError, match="no device of JAX_PLATFORMS=None .*libnone.so.1") as refused:
            make()
        assert "\n" not in str(refused.value)
