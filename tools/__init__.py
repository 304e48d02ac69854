from cpu import setup  # noqa: F401  (before Paddle)
