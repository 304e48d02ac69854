"""How a CPU is made fast: the process, the block's operators, Pillow's pixels."""

from cpu import setup  # noqa: F401  (before Paddle)
