"""Base class of `LLM` for training loops: weights in and out, pauses, sleep."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial as bind
from typing import Any

import jax
from flax import nnx

from jaxinfer.distributed.wire import Kind
from jaxinfer.engine.control import KEEP, LEVELS, PAUSE_MODES, WAIT
from jaxinfer.engine.divided_call import DividedCall
from jaxinfer.engine.engine import Engine
from jaxinfer.engine.multihost.agreement import agree
from jaxinfer.errors import DistributedError, EngineError
from jaxinfer.layers import adapters
from jaxinfer.llm_base.lifecycle import EngineOwner
from jaxinfer.llm_base.replicas import Replica
from jaxinfer.loading.update import HF, JAXINFER, Checked, Prepared, WeightUpdate

UPDATE = "update_weights"


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
            ConfigError: the tensors have Hugging Face names, but the module was not made by `loading.weights`.
            TypeError: the weights are of another type.
            RuntimeError: requests are running and not paused, or another update is running.
            EngineDeadError: the device failed while weights were replaced.
            DistributedError: several processes serve the model, and they do not all call this, or with other weights.
        """
        self._check_all(UPDATE)
        if not self._updating.acquire(blocking=False):
            raise RuntimeError("update_weights while another update is running; wait for it")
        try:
            if self._group is not None:
                return self._together(bind(self._update_in_all, weights=weights, partial=partial, cast=cast))
            self._together(bind(_check_replaceable, partial=partial))
            prepared = [one.weights.prepare(weights, partial=partial, cast=cast) for one in self._replicas]

            def replace_all(engines: list[Engine]) -> int:
                _check_replaceable(engines, partial=partial)
                versions = [
                    engine.control.replace_weights(bind(_apply, replica, own), partial=partial)
                    for engine, replica, own in zip(engines, self._replicas, prepared, strict=True)
                ]
                return versions[0]

            return replace(prepared[0].report, version=self._together(replace_all))
        finally:
            self._updating.release()

    def _update_in_all(self, engines: list[Engine], *, weights: Any, partial: bool, cast: bool) -> WeightUpdate:
        """Replace weights that lie in several processes; runs in all of them, so that no step comes in between."""
        group, [engine], [replica] = self._group, engines, self._replicas

        def check() -> tuple[Checked, str]:
            _check_replaceable(engines, partial=partial)
            found = replica.weights.check(weights, partial=partial, cast=cast)
            return found, f"{found.facts} {partial} {cast}"

        def inspect() -> tuple[Prepared, str]:
            found = replica.weights.inspect(checked)
            return found, found.report.checksum

        checked = agree(group, UPDATE, "the names, shapes or dtypes of the weights", check)
        prepared = agree(group, UPDATE, "the values of the weights", inspect)
        with group.guard():
            version = engine.control.replace_weights(bind(_apply, replica, prepared), partial=partial)
        return replace(prepared.report, version=version)

    def release_followers(self) -> None:
        """Let `follow` return in the other processes, so that all processes can train.

        Until they call `follow` again, `update_weights`, `weights`, `module` and `weights_checksum` may be called, by
        all processes in the same order. Requests wait meanwhile: while other threads of this process send any, call
        `pause` before.

        Raises:
            RuntimeError: requests are running and not paused; or a single process serves the model.
            DistributedError: this is not process 0, or another process has died or diverged.
        """
        self._check_open()
        if self._group is None:
            raise RuntimeError("release_followers: a single process serves the model, and no other one follows it")

        def release(engines: list[Engine]) -> None:
            for engine in engines:
                engine.control.check_idle("release_followers")
                engine.runner.leader.release()

        self._together(release)

    def weights(self, names: str = "hf") -> Any:
        """Return the weights; arrays stay on their devices, and keep their values when the engine's are replaced.

        Args:
            names: "hf" for a dict of arrays with the names and shapes of transformers' state dict. The values equal a
                checkpoint in the engine's dtype bit for bit; experts are stacked, tied tensors occur once, and tensors
                that the model does not read are absent. "jaxinfer" for the `nnx.state` of the engine's module, with
                its fused projections.

        Raises:
            ConfigError: the weights are quantised, which only "jaxinfer" can give; or the module was not made by
                `loading.weights`.
        """
        if names not in (HF, JAXINFER):
            raise ValueError(f"weights: names must be {HF!r} or {JAXINFER!r}, got {names!r}")
        self._check_all("weights")
        params, table = self._thread.run(self._params, self._replicas[0]), self._replicas[0].weights
        return dict(table.tensors(params)) if names == HF else table.state(params)

    def module(self) -> nnx.Module:
        """Return a module with the engine's weights, for a trainer; it shares their arrays, and no settings.

        `functional.training` takes it after `prepare`. It keeps its weights when the engine's are replaced.

        Raises:
            RuntimeError: `sleep(level=2)` has dropped the weights.
        """
        self._check_all("module")
        params = self._thread.run(self._params, self._replicas[0])
        return adapters.remove(self._engine.runner.program.module(params))

    def weights_checksum(self) -> str:
        """Return `loading.checksum.checksum(weights(names="hf"))`, made from one parameter at a time.

        Raises:
            ConfigError: as `weights`.
            EngineError: replicas have different weights.
        """
        self._check_all("weights_checksum")
        found = [one.weights.checksum(one.thread.run(self._params, one)) for one in self._replicas]
        if len(set(found)) > 1:
            raise EngineError(f"weights_checksum: the replicas have different weights, with the checksums {found}")
        return found[0]

    @property
    def weight_version(self) -> int:
        """Number of times that the weights were replaced (`CompletionOutput.weight_segments`)."""
        return self._engine.control.version

    def pause(self, mode: str = KEEP) -> None:
        """Run no more steps until `resume`; returns once no step is running.

        Requests that arrive meanwhile wait: `generate` on this thread would wait for ever. Weights may be replaced, and
        requests aborted.

        Args:
            mode: what becomes of requests: "keep" keeps them and their cache, to be continued after `resume`; "abort"
                aborts all of them; "wait" waits until they have ended, and starts no others.

        Raises:
            ValueError: the mode is unknown.
            RuntimeError: the engine sleeps.
        """
        if mode not in PAUSE_MODES:
            raise ValueError(f"pause: mode must be one of {', '.join(PAUSE_MODES)}, got {mode!r}")
        self._check_open()
        paused, call = self._engine.control.paused, DividedCall(self._threads)
        release = call.release
        try:
            self._together(bind(_begin_pause, mode=mode))
            try:
                for replica in self._replicas:
                    control = replica.engine.control
                    done = control.drained if mode == WAIT else control.stopped
                    call.drive(replica.thread, bind(_negated, done))
                call.wait_for_all()
            except BaseException:
                self._together(lambda engines: [one.control.give_up(paused=paused) for one in engines])
                raise
        finally:
            list(release)

    def resume(self, *, recompute: bool = False) -> None:
        """Run steps again.

        Args:
            recompute: whether the cache of running requests is computed again, with the weights as they are now; by
                default tokens from before an update keep the keys and values that the old weights gave them.

        Raises:
            RuntimeError: the engine is not paused, or sleeps.
        """
        self._check_open()
        self._together(lambda engines: [one.control.resume(recompute=recompute) for one in engines])

    def sleep(self, level: int = 1) -> None:
        """Free the memory of the cache and, at level 2, of the weights, and keep compiled programs.

        Requests are refused until `wake_up` and, after level 2, until `update_weights` has given all weights, before or
        after `wake_up`; those that are kept in 4 bits only by a module or a state (`weights(names="jaxinfer")`).
        Weights that the caller holds (`LLM(module)`, a state) stay in memory as long as they are held.

        Raises:
            ValueError: the level is unknown.
            RuntimeError: requests are running or paused, or the engine sleeps at this level or a deeper one.
        """
        if level not in LEVELS or isinstance(level, bool):
            raise ValueError(f"sleep: level must be 1 (free the cache) or 2 (the weights, too), got {level!r}")
        self._check_open()
        self._together(bind(_sleep, level=level))

    def wake_up(self) -> None:
        """Allocate the cache again after `sleep`.

        Raises:
            RuntimeError: the engine does not sleep.
        """
        self._check_open()
        self._together(lambda engines: [one.control.wake_up() for one in engines])

    def _params(self, replica: Replica) -> list[jax.Array]:
        """Return the parameters; runs on the engine thread."""
        replica.engine.check_alive()
        if replica.engine.control.weightless:
            raise RuntimeError("weights: sleep(level=2) has dropped them; give them with update_weights()")
        return list(replica.engine.runner.params)

    def _check_all(self, method: str) -> None:
        """Check that the LLM is open and that the weights are not in use by steps of other processes.

        Raises:
            DistributedError: the other processes replay the steps of this one, or this one those of process 0.
        """
        if self._group is None:
            self._check_open()
            return
        self._check_not_closed()
        leader = self._engine.runner.leader
        if self._following or (leader is not None and (leader.followed or self._group.has_sent(Kind.FOLLOWS))):
            raise DistributedError(
                f"{method}: the weights lie in several processes, and processes other than 0 are in follow(); call "
                f"release_followers() in process 0, then {method} in all of them"
            )
        if method != UPDATE:  # which does so itself
            agree(self._group, method, "", lambda: (None, ""))


def _apply(replica: Replica, prepared: Prepared, params: list[Any]) -> None:
    """Replace a replica's parameters in the list."""
    replica.weights.apply(prepared, params)
    replica.adapters.restore(params)


def _check_replaceable(engines: Sequence[Engine], *, partial: bool) -> None:
    for engine in engines:
        engine.control.check_replaceable(partial=partial)


def _begin_pause(engines: Sequence[Engine], *, mode: str) -> None:
    """Let engines run no more steps, or with "wait" start no more requests; they are paused when `stopped` says so."""
    for engine in engines:
        if mode == WAIT:
            engine.control.drain()
        else:
            engine.control.stop(mode)


def _sleep(engines: Sequence[Engine], *, level: int) -> None:
    """Put all engines to sleep, or none."""
    for engine in engines:
        engine.control.check_sleep(level)
    for engine in engines:
        engine.control.sleep(level)


def _negated(condition: Callable[[], bool]) -> bool:
    return not condition()
