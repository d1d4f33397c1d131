"""Keep Python's garbage collector off the objects that stay as long as a model is served.

JAX, transformers and a loaded model are a quarter of a million objects. A full collection looks at each of them and
stops all threads meanwhile, a step for every running request included. `gc.freeze` takes them out of its sight.

What is frozen is never collected, though: an object of the caller that was alive when a model was loaded and is dropped
later as part of a reference cycle stays, with all that it refers to. So everything is thawed when an LLM is closed or
dropped, and before the next one is loaded, which finds an LLM that was dropped in such a cycle.
"""

import gc

_frozen = False


def freeze() -> None:
    """Collect garbage, then take all objects that are left out of later collections, where these are enabled."""
    global _frozen
    if gc.isenabled():
        gc.unfreeze()
        gc.collect()
        gc.freeze()
        _frozen = True


def thaw(*, collect: bool = False) -> None:
    """Undo `freeze`; does nothing where it was not called.

    Args:
        collect: also collect what became garbage while it was frozen.
    """
    global _frozen
    if _frozen:
        _frozen = False
        gc.unfreeze()
        if collect:
            gc.collect()
