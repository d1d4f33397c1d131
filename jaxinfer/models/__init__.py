"""Model families: one file or folder each, found by `registry.family`."""

from jaxinfer.models import base as base
from jaxinfer.models import registry as registry
