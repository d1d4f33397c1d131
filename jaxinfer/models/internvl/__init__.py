"""InternVL model family."""
