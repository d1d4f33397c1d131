"""The run-time type checker of the tests: beartype, with int taken where float is asked for (PEP 484).

On a machine with a GPU (JAXINFER_TEST_GPU=1) beartype may be missing: then annotations are not checked there.
"""

import os

try:
    from beartype import BeartypeConf, beartype

    checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
except ModuleNotFoundError:
    if os.environ.get("JAXINFER_TEST_GPU") != "1":
        raise

    def checked(function):
        """The function as it is."""
        return function
