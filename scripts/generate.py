#!/usr/bin/env python
"""Generate text from the command line: `jaxinfer generate`; without --model, use the packaged checkpoint."""

import sys

from jaxinfer.commands.generate.cli import main

if __name__ == "__main__":
    sys.exit(main())
