"""How the processes of a job meet, share and stop."""

from cpu import setup  # noqa: F401  (before Paddle)
