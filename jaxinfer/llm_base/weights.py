"""Base class of `LLM` for training loops: weights in and out, pauses, sleep."""

from dataclasses import replace
from functools import partial as bind
from typing import Any

import jax
from flax import nnx

from jaxinfer.engine.control import LEVELS, PAUSE_MODES
from jaxinfer.errors import DistributedError
from jaxinfer.llm_base.lifecycle import EngineOwner
from jaxinfer.loading.update import HF, JAXINFER, WeightUpdate


class WeightsAndPauses(EngineOwner):
    """Methods of `LLM` that replace, return or free weights; `AsyncLLM` has the same as coroutines."""

    def update_weights(self, weights: Any, *, partial: bool = False, cast: bool = False) -> WeightUpdate:
        """Replace the weights and clear the prefix cache; after an error the old weights stay.

        Requests may be paused meanwhile (`pause`). They keep what they have computed, and continue with the new weights
        after `resume`; prompts that are not wholly computed start over.

        Everything is checked before anything is replaced: names, shapes, dtypes, and that all values are finite.

        Args:
            weights: a dict of Hugging Face names to arrays of JAX (on any devices, however sharded) or NumPy, which
                are fused on the engine's devices and copied; or an NNX module like the engine's, or its `nnx.state`,
                whose arrays are shared with the engine if their shardings are those of its own.
            partial: whether some tensors may be missing; what they fill keeps its values, down to single outputs of a
                fused projection and single experts.
            cast: whether floating-point values may be rounded to the engine's dtype. Conversions that keep every value
                need no permission.

        Raises:
            CheckpointError: a tensor is missing, unknown, or of another shape or dtype, not finite, or differs from
                one that it is tied to; names it, with what was expected and found.
            ConfigError: names of Hugging Face for a module that was not made by `loading.weights`.
            TypeError: the weights are of another type.
            RuntimeError: requests are running and not paused, or another update is running.
            EngineDeadError: the device failed while weights were replaced.
            DistributedError: several processes serve the model.
        """
        self._check_local("update_weights")
        if not self._updating.acquire(blocking=False):
            raise RuntimeError("update_weights while another update is running; wait for it")
        try:
            control = self._engine.control
            self._thread.run(bind(control.check_replaceable, partial=partial))
            prepared = self._weights.prepare(weights, partial=partial, cast=cast)
            apply = bind(self._weights.apply, prepared)
            version = self._thread.run(bind(control.replace_weights, apply, partial=partial))
            return replace(prepared.report, version=version)
        finally:
            self._updating.release()

    def weights(self, names: str = "hf") -> Any:
        """Return the weights; arrays stay on their devices, and keep their values when the engine's are replaced.

        Args:
            names: "hf" for a dict of the names and shapes of transformers' state dict to arrays: equal bit for bit to
                a checkpoint in the engine's dtype, experts stacked, tied tensors once, without tensors that the model
                does not read; "jaxinfer" for the `nnx.state` of the engine's module, fused as they are.

        Raises:
            ConfigError: the weights are quantised, which only "jaxinfer" can give; or the module was not made by
                `loading.weights`.
        """
        if names not in (HF, JAXINFER):
            raise ValueError(f"weights: names must be {HF!r} or {JAXINFER!r}, got {names!r}")
        self._check_local("weights")
        params = self._thread.run(self._params)
        return dict(self._weights.tensors(params)) if names == HF else self._weights.state(params)

    def module(self) -> nnx.Module:
        """Return a module with the engine's weights, for a trainer; it shares their arrays, and no settings.

        `functional.training` takes it after `prepare`. It keeps its weights when the engine's are replaced.

        Raises:
            RuntimeError: `sleep(level=2)` has dropped the weights.
        """
        self._check_local("module")
        params = self._thread.run(self._params)
        return self._engine.runner.program.module(params)

    def weights_checksum(self) -> str:
        """Return `loading.checksum.checksum(weights(names="hf"))`, made from one parameter at a time.

        Raises:
            ConfigError: as `weights`.
        """
        self._check_local("weights_checksum")
        return self._weights.checksum(self._thread.run(self._params))

    @property
    def weight_version(self) -> int:
        """Number of times that the weights were replaced (`CompletionOutput.weight_segments`)."""
        return self._engine.control.version

    def pause(self, mode: str = "keep") -> None:
        """Run no more steps until `resume`; returns when none is running.

        Requests that arrive meanwhile wait: `generate` on this thread would wait for ever. Weights may be replaced, and
        requests aborted.

        Args:
            mode: what becomes of requests: "keep" keeps them and their cache, to be continued after `resume`; "abort"
                aborts all of them; "wait" waits until they have ended, and starts no others.

        Raises:
            ValueError: the mode is unknown.
            RuntimeError: the engine sleeps.
            DistributedError: several processes serve the model.
        """
        if mode not in PAUSE_MODES:
            raise ValueError(f"pause: mode must be one of {', '.join(PAUSE_MODES)}, got {mode!r}")
        self._check_local("pause")
        control, lease = self._engine.control, self._thread.lease()
        waits = mode == "wait"
        try:
            self._thread.run(*((control.drain,) if waits else (control.stop, mode)))
            done = control.drained if waits else control.stopped
            try:
                self._thread.drive(lease.call, lambda: not done())
            except BaseException:
                self._thread.run(control.give_up)
                raise
        finally:
            lease.release(lease.call)

    def resume(self, *, recompute: bool = False) -> None:
        """Run steps again.

        Args:
            recompute: whether the cache of running requests is computed again, with the weights as they are now; by
                default tokens from before an update keep the keys and values that the old weights gave them.

        Raises:
            RuntimeError: the engine is not paused, or sleeps.
        """
        self._check_local("resume")
        self._thread.run(bind(self._engine.control.resume, recompute=recompute))

    def sleep(self, level: int = 1) -> None:
        """Free the memory of the cache and, at level 2, of the weights, and keep compiled programs.

        Requests are refused until `wake_up` and, after level 2, until `update_weights` has given all weights, which it
        may do before or after. Weights that the caller holds (`LLM(module)`, a state) stay in memory as long as they
        are held.

        Raises:
            ValueError: the level is unknown.
            RuntimeError: requests are running or paused, or the engine sleeps at this level or a deeper one.
            DistributedError: several processes serve the model.
        """
        if level not in LEVELS or isinstance(level, bool):
            raise ValueError(f"sleep: level must be 1 (free the cache) or 2 (the weights, too), got {level!r}")
        self._check_local("sleep")
        self._thread.run(self._engine.control.sleep, level)

    def wake_up(self) -> None:
        """Allocate the cache again after `sleep`.

        Raises:
            RuntimeError: the engine does not sleep.
        """
        self._check_local("wake_up")
        self._thread.run(self._engine.control.wake_up)

    def _params(self) -> list[jax.Array]:
        """Return the parameters; runs on the engine thread."""
        self._engine.check_alive()
        if self._engine.control.weightless:
            raise RuntimeError("weights: sleep(level=2) has dropped them; give them with update_weights()")
        return list(self._engine.runner.params)

    def _check_local(self, method: str) -> None:
        """Check that the LLM is open and that all of its weights can be reached from this process."""
        self._check_open()
        if self._group is not None:
            raise DistributedError(
                f"{method}: the weights lie in several processes, and those of the others cannot be reached from here; "
                "close this LLM in each of them and make a new one"
            )
