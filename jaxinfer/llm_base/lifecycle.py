"""Base class of `LLM` that loads a model, starts its engine thread and closes both."""

import dataclasses
import threading
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from jaxinfer import distributed
from jaxinfer._utils import compilation_cache, heap
from jaxinfer.checkpoint import peft
from jaxinfer.config import CONTIGUOUS, EngineConfig
from jaxinfer.engine.engine import Engine
from jaxinfer.engine.engine_thread import CLOSED, EngineThread
from jaxinfer.engine.multihost import handshake
from jaxinfer.engine.multihost.replay import Leader, follow
from jaxinfer.engine.sizing.setup import build_engine
from jaxinfer.errors import ConfigError, DistributedError, EngineClosedError, JaxInferError
from jaxinfer.inputs.defaults import ModelLimits, length_remedy
from jaxinfer.inputs.input_processor import InputProcessor
from jaxinfer.inputs.loaded_model import LoadedModel
from jaxinfer.llm_base.replicas import Replica, name_of, named
from jaxinfer.loading.adapters import AdapterTable, extended, with_adapters
from jaxinfer.loading.load import ModelArguments, open_model, place
from jaxinfer.loading.replicas import on_mesh
from jaxinfer.loading.update import WeightTable
from jaxinfer.sharding import mesh as meshes
from jaxinfer.sharding.devices import visible_devices
from jaxinfer.sharding.serving_mesh import Axes


class EngineOwner:
    """A loaded model and the thread that steps its engine. The arguments are those of `LLM`."""

    def __init__(
        self,
        model: str | Path | nnx.Module,
        *,
        tokenizer: Any = None,
        skip_tokenizer_init: bool = False,
        revision: str | None = None,
        chat_template: str | None = None,
        hf_overrides: Mapping[str, Any] | None = None,
        mesh: Mesh | None = None,
        axes: Axes | None = None,
        use_tqdm: bool = True,
        adapters: Mapping[str, Any] | None = None,
        **settings: Any,
    ):
        self._closed = self._following = False
        self._name = _name_of(model)
        if mesh is not None and not isinstance(mesh, Mesh):
            raise TypeError(f"mesh must be a jax.sharding.Mesh, got {type(mesh).__name__}")
        visible_devices()  # joining asks JAX for devices too, and would raise what JAX raises
        self._group = distributed.join(mesh, settings.get("peer_timeout"))
        with distributed.guard(self._group):
            config = EngineConfig.of(settings)
            compilation_cache.enable(config.compilation_cache_dir)
            heap.thaw(collect=True)  # free the weights of an earlier LLM that was deleted without `close`
            if self._group is not None:
                config, hf_overrides = handshake.share_config(self._group, config, hf_overrides)
            self._mesh, self.config = place(mesh, axes, config, "tensor_parallel_size" in settings, self._group)
            self._meshes = meshes.of_replicas(self._mesh)
            self._check_replicas()
            self.config = with_adapters(self.config, adapters, self._group, len(self._meshes))
            arguments = ModelArguments(model, tokenizer, skip_tokenizer_init, revision, hf_overrides)
            self._start(arguments, chat_template, use_tqdm, adapters or {})

    def _start(
        self, arguments: ModelArguments, chat_template: str | None, use_tqdm: bool, adapters: Mapping[str, Any]
    ) -> None:
        """Load the model and its adapters, build its engines and start their threads."""
        group, config = self._group, self.config
        for name, given in adapters.items():
            if not isinstance(given, Mapping):
                peft.locate(given, f"adapter {name!r}")  # before the weights are loaded
        opened = open_model(arguments, config, self._mesh, group, progress=use_tqdm)
        known = opened.tokenizer_len
        self._tokenizer = opened.tokenizer
        if group is not None:
            known = group.all_gather(known)[0]
        engines = [self._build(index, opened, known) for index in range(len(self._meshes))]
        longest, length = min(engine.runner.shapes.max_length for engine in engines), opened.module.config.max_length
        limits = ModelLimits(
            opened.module.config.vocab_size,
            longest,
            opened.eos_token_ids,
            tokenizer_len=known,
            length_hint=length_remedy(longest, config.max_model_len, length, contiguous=config.cache == CONTIGUOUS),
            **opened.forced,
        )
        tables = [WeightTable(engine.runner.program, engine.runner.params) for engine in engines]
        # Without its weights, which would stay in memory after others have replaced them.
        opened = dataclasses.replace(opened, module=tables[0].module, draft=None)
        self._updating = threading.Lock()
        table = AdapterTable(engines[0].runner.program, opened.module, config)
        for name, given in adapters.items():
            table.install(table.prepare(name, given, None), engines[0].runner.params)
        self._loaded: tuple[LoadedModel, InputProcessor] | None = (
            opened,
            InputProcessor(opened, config, limits, chat_template, table.by_name if config.max_adapters else None),
        )
        self._replicas = [Replica(engine, own, table) for engine, own in zip(engines, tables, strict=True)]
        del engines
        # Stops the threads if the LLM is garbage-collected without `close`, and when the interpreter exits.
        self._finalizer = weakref.finalize(self, _drop, self._threads)
        if config.freeze_gc:
            heap.freeze()
        heap.trim()

    def _check_replicas(self) -> None:
        """Refuse replicas over the devices of several processes."""
        if len(self._meshes) > 1 and self._group is not None:
            raise ConfigError(
                f"axes: 'data' runs {len(self._meshes)} batches, which is not supported for a mesh over several "
                "processes; leave it out of axes, or make an LLM in each process with a mesh over jax.local_devices()"
            )

    def _build(self, index: int, opened: LoadedModel, sampled_vocab: int | None) -> Engine:
        """Build the engine of a replica."""
        mesh, name = self._meshes[index], name_of(index, self._meshes)
        module, draft = opened.module, opened.draft
        if len(self._meshes) > 1:
            module, draft = (None if one is None else on_mesh(one, mesh) for one in (module, draft))
        try:
            module = extended(module, self.config, mesh)
            engine = build_engine(module, self.config, mesh, sampled_vocab=sampled_vocab, draft=draft)
        except JaxInferError as error:
            raise named(error, name) from error
        engine.name = name
        if self._group is not None:
            handshake.check_programs(self._group, engine.runner)
            engine.runner.leader = None if self._follows else Leader(self._group)
        return engine

    @property
    def _threads(self) -> list[EngineThread]:
        return [replica.thread for replica in self._replicas]

    @property
    def _thread(self) -> EngineThread:
        """The engine thread, or that of the first replica."""
        return self._replicas[0].thread

    @property
    def _engine(self) -> Engine:
        """The engine, or that of the first replica. Code on other threads than its own must only read from it."""
        return self._replicas[0].engine

    def _together(self, function: Callable[[list[Engine]], Any]) -> Any:
        """Call a function with all engines while none of them steps, and return its result.

        Each engine's thread waits in a command of the one before it, in the order of the replicas.

        Raises:
            EngineDeadError: one of several engines is dead.
        """

        def enter(left: list[Replica]) -> Any:
            return left[0].thread.run(enter, left[1:]) if left else call()

        def call() -> Any:
            engines = [replica.engine for replica in self._replicas]
            for engine in engines:
                engine.check_alive()
            return function(engines)

        return enter(self._replicas)

    @property
    def _opened(self) -> LoadedModel:
        return self._parts[0]

    @property
    def _input_processor(self) -> InputProcessor:
        return self._parts[1]

    @property
    def _parts(self) -> tuple[LoadedModel, InputProcessor]:
        """The loaded model and its input processor; raises once `close` (maybe on another thread) has freed them."""
        loaded = self._loaded
        if loaded is None:
            raise EngineClosedError(CLOSED)
        return loaded

    @property
    def _follows(self) -> bool:
        return self._group is not None and self._group.process > 0

    def follow(self) -> None:
        """Replay the steps of process 0 until it closes its `LLM` or calls `release_followers`.

        Call this in every process except process 0 when several processes serve one model:

            with LLM(model, tensor_parallel_size=jax.device_count()) as llm:
                if jax.process_index():
                    llm.follow()
                else:
                    print(llm.generate("..."))

        Raises:
            RuntimeError: this is process 0, which takes the requests.
            DistributedError: a process has died, or its tokens differ from those of process 0.
        """
        self._check_not_closed()
        if not self._follows:
            raise RuntimeError(
                "follow() is for processes other than process 0; this process takes the requests: use generate()"
            )
        self._following = True
        try:
            follow(self._engine.runner, self._group)
        finally:
            self._following = False

    def _abandon(self, error: BaseException | None) -> None:
        """Tell the other processes of an error in this one while all of them train, where nobody else would notice."""
        group, leader = self._group, self._engine.runner.leader
        released = group is not None and (group.released or (leader is not None and leader.has_released))
        if released and isinstance(error, Exception):
            group.abandon(f"process {group.process} failed: {type(error).__name__}: {error}")

    def close(self) -> None:
        """Abort all requests and free the cache's memory; further calls do nothing.

        Calls on other threads that wait for results raise EngineClosedError. If several processes serve the model,
        `follow` returns in the other processes.
        """
        if self._closed:
            return
        self._closed = True
        if self._thread.forked:  # in a forked child: the engine belongs to the parent process
            self._finalizer.detach()
            return
        leader = self._engine.runner.leader
        try:
            with ExitStack() as closing:
                for thread in self._threads:
                    closing.callback(thread.close)
        finally:
            self._finalizer.detach()
            if leader is not None:
                leader.end()
            elif self._group is not None:
                self._group.end_quietly()
            self._loaded = None
            self._tokenizer = None
            heap.thaw(collect=True)  # the engine's objects refer to each other, and to weights and cache
            heap.trim()

    def _check_not_closed(self) -> None:
        if self._closed:
            raise EngineClosedError(CLOSED)

    def _check_open(self) -> None:
        self._check_not_closed()
        if self._follows:
            raise DistributedError(
                f"this is process {self._group.process} of several that serve the model, and only process 0 takes "
                "requests; call llm.follow() here, which replays the steps of process 0"
            )


def _name_of(model: str | Path | nnx.Module) -> str:
    """Return a short name of a model: its class, the last part of its path, or its Hub id."""
    if isinstance(model, nnx.Module):
        return type(model).__name__
    path = Path(model)
    return path.resolve().name if path.exists() else str(model)


def _drop(threads: list[EngineThread]) -> None:
    """Stop the engine threads of a garbage-collected LLM."""
    for thread in threads:
        thread.stop()
    heap.thaw()
