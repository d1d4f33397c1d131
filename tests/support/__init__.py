"""Shared test helpers: tiny models with one runner each, engines over a runner, and reference implementations."""

from support.typecheck import checked as checked
