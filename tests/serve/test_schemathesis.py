"""schemathesis against the server: the document is true to what the endpoints do.

By default requests that break the schema, each in one way, which the server must refuse. With JAXINFER_TEST_FUZZ=1 also
those that keep to it, and random ones, which takes three times as long.
"""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

pytestmark = [
    pytest.mark.xdist_group("serve"),
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("schemathesis") is None, reason="schemathesis is not installed"),
]
WRONG = ["--phases=coverage", "--mode=negative"]
ALL = ["--phases=coverage,fuzzing", "--max-examples=5"]
LEFT_OUT = "positive_data_acceptance"
"""A request may have the schema and be refused: conditions over several fields, grammars, audio that is none."""


def test_the_server_does_what_its_document_says(make_server):
    with make_server(max_tokens=2, max_n=2) as url:
        words = ["run", f"{url}/openapi.json", "--no-color", *(ALL if os.environ.get("JAXINFER_TEST_FUZZ") else WRONG)]
        words += [f"--exclude-checks={LEFT_OUT}", "--request-timeout=60", "--seed=1", "--suppress-health-check=all"]
        command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
