"""Base class of `LLM` for LoRA adapters."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from jaxinfer.adapter import Adapter, find
from jaxinfer.llm_base.lifecycle import EngineOwner
from jaxinfer.loading.adapters import AdapterTable


class AdapterCalls(EngineOwner):
    """Methods of `LLM` that add and remove adapters while it serves; `AsyncLLM` has the same as coroutines."""

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """The adapters there are, by name."""
        return dict(self._adapters.by_name)

    @property
    def _adapters(self) -> AdapterTable:
        return self._replicas[0].adapters  # with several replicas there are no adapters

    def add_adapter(self, name: str, adapter: Any, *, config: Mapping[str, Any] | None = None) -> Adapter:
        """Add a LoRA adapter, which prompts name from then on; nothing is compiled, and requests run meanwhile.

        Everything is checked before anything is changed.

        Args:
            name: name of the adapter in prompts.
            adapter: a folder that PEFT saved, a Hub id, or a dict of the tensors in such a folder.
            config: with a dict, the contents of its adapter_config.json.

        Raises:
            CheckpointError: a file or tensor is missing, not finite, not supported, or of another base model.
            ConfigError: the rank exceeds `max_adapter_rank`, or there are `max_adapters` already.
            TypeError, ValueError: an argument is invalid, or the name is in use.
        """
        self._check_open()
        prepared = self._adapters.prepare(name, adapter, config)
        return self._thread.run(partial(self._install, prepared))

    def _install(self, prepared: Any) -> Adapter:
        self._engine.check_alive()
        return self._adapters.install(prepared, self._engine.runner.params)

    def remove_adapter(self, name: str) -> None:
        """Remove an adapter.

        Raises:
            ValueError: there is none of this name.
            RuntimeError: requests with it are running or waiting.
        """
        self._check_open()
        self._thread.run(partial(self._remove, name))

    def _remove(self, name: str) -> None:
        self._engine.check_alive()
        adapter = find(self._adapters.by_name, name, "remove_adapter")
        using = [request.id for request in self._engine.requests.values() if request.adapter is adapter]
        if using:
            raise RuntimeError(
                f"remove_adapter({name!r}) while {len(using)} request(s) use it, such as {using[0]!r}; first wait "
                "for them, or abort them"
            )
        self._adapters.drop(name, self._engine.runner.params)
