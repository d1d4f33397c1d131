"""Run the server: `python -m jaxinfer.serve MODEL`."""

import sys

from jaxinfer.serve.cli import main

if __name__ == "__main__":
    sys.exit(main())
