"""Run-time type checker of the tests: beartype, with int accepted for float (PEP 484).

With JAXINFER_TEST_GPU=1 beartype may be missing; annotations are then not checked.
"""

import os

try:
    from beartype import BeartypeConf, beartype

    checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
except ModuleNotFoundError:
    if os.environ.get("JAXINFER_TEST_GPU") != "1":
        raise

    def checked(function):
        """Return the function unchanged."""
        return function
