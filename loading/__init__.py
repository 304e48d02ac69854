"""From files and folders to batches: lists, samplers, worker processes."""

from cpu import setup  # noqa: F401  (before Paddle)
