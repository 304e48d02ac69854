"""What lies on disk: the run's folder, checkpoints, weight files."""

from cpu import setup  # noqa: F401  (before Paddle)
