"""Run the server: `python -m jaxinfer.serve MODEL`."""

from jaxinfer.commands.exit_status import end
from jaxinfer.serve.cli import main

if __name__ == "__main__":
    end(main())
