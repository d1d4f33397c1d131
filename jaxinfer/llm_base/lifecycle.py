"""Base class of `LLM` that loads a model, starts its engine thread and closes both."""

import dataclasses
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from jaxinfer import distributed
from jaxinfer._utils import compilation_cache, heap
from jaxinfer.config import CONTIGUOUS, EngineConfig
from jaxinfer.engine.engine import Engine
from jaxinfer.engine.engine_thread import CLOSED, EngineThread
from jaxinfer.engine.multihost import handshake
from jaxinfer.engine.multihost.replay import Leader, follow
from jaxinfer.engine.sizing.setup import build_engine
from jaxinfer.errors import DistributedError, EngineClosedError
from jaxinfer.inputs.defaults import ModelLimits, length_remedy
from jaxinfer.inputs.input_processor import InputProcessor
from jaxinfer.inputs.loaded_model import LoadedModel
from jaxinfer.loading.load import ModelArguments, open_model, place
from jaxinfer.loading.update import WeightTable
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
        **settings: Any,
    ):
        self._closed = False
        self._name = _name_of(model)
        if mesh is not None and not isinstance(mesh, Mesh):
            raise TypeError(f"mesh must be a jax.sharding.Mesh, got {type(mesh).__name__}")
        self._group = distributed.join(mesh, settings.get("peer_timeout"))
        with distributed.guard(self._group):
            config = EngineConfig.of(settings)
            compilation_cache.enable(config.compilation_cache_dir)
            heap.thaw(collect=True)  # free the weights of an earlier LLM that was deleted without `close`
            if self._group is not None:
                config, hf_overrides = handshake.share_config(self._group, config, hf_overrides)
            self._mesh, self.config = place(mesh, axes, config, "tensor_parallel_size" in settings, self._group)
            named = ModelArguments(model, tokenizer, skip_tokenizer_init, revision, hf_overrides)
            self._start(named, chat_template, use_tqdm)

    def _start(self, named: ModelArguments, chat_template: str | None, use_tqdm: bool) -> None:
        """Load the model, build its engine and start the engine thread."""
        group = self._group
        opened = open_model(named, self.config, self._mesh, group, progress=use_tqdm)
        module, known = opened.module, opened.tokenizer_len
        self._tokenizer = opened.tokenizer
        if group is not None:
            known = group.all_gather(known)[0]
        engine = build_engine(module, self.config, self._mesh, sampled_vocab=known)
        if group is not None:
            handshake.check_programs(group, engine.runner)
            engine.runner.leader = None if self._follows else Leader(group)
        longest, config = engine.runner.shapes.max_length, self.config
        length_hint = length_remedy(
            longest, config.max_model_len, module.config.max_length, contiguous=config.cache == CONTIGUOUS
        )
        limits = ModelLimits(
            module.config.vocab_size,
            longest,
            opened.eos_token_ids,
            tokenizer_len=known,
            length_hint=length_hint,
            **opened.forced,
        )
        self._weights = WeightTable(engine.runner.program, engine.runner.params)
        self._updating = threading.Lock()
        # Without its weights, which would stay in memory after others have replaced them.
        opened = dataclasses.replace(opened, module=self._weights.module)
        del module
        self._loaded: tuple[LoadedModel, InputProcessor] | None = (
            opened,
            InputProcessor(opened, self.config, limits, chat_template),
        )
        self._thread = EngineThread(engine)
        # Stops the thread if the LLM is garbage-collected without `close`, and when the interpreter exits.
        self._finalizer = weakref.finalize(self, _drop, self._thread)
        if self.config.freeze_gc:
            heap.freeze()

    @property
    def _engine(self) -> Engine:
        """The engine. The engine thread owns it; code on other threads must only read from it."""
        engine = getattr(self._thread, "engine", None)
        if engine is None:
            raise EngineClosedError(CLOSED)
        return engine

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
        """Replay the steps of process 0 until it closes its `LLM`.

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
        if self._closed:
            raise EngineClosedError("this LLM is closed; make a new one")
        if not self._follows:
            raise RuntimeError(
                "follow is for processes other than 0 of several; this one takes the requests: use generate"
            )
        follow(self._engine.runner, self._group)

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
            self._thread.close()
        finally:
            self._finalizer.detach()
            if leader is not None:
                leader.end()
            elif self._group is not None:
                self._group.end_quietly()
            self._loaded = None
            self._tokenizer = None
            heap.thaw()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosedError(CLOSED)
        if self._follows:
            raise DistributedError(
                f"this is process {self._group.process} of a model on several: requests enter at process 0; call "
                "llm.follow() here, which serves that one until it ends"
            )


def _name_of(model: str | Path | nnx.Module) -> str:
    """Return a short name of a model: its class, the last part of its path, or its Hub id."""
    if isinstance(model, nnx.Module):
        return type(model).__name__
    path = Path(model)
    return path.resolve().name if path.exists() else str(model)


def _drop(thread: EngineThread) -> None:
    """Stop the engine thread of a garbage-collected LLM."""
    thread.stop()
    heap.thaw()
