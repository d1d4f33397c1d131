"""Run a command: `python -m jaxinfer COMMAND`, as `jaxinfer COMMAND` does."""

from jaxinfer.cli import command

if __name__ == "__main__":
    command()
