"""What the engine is made of: progress, evaluation, reports."""

from cpu import setup  # noqa: F401  (before Paddle)
