"""What the tests share: tiny models, one runner each, and engines with other host settings over it."""

from support.typecheck import checked as checked
