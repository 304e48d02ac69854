"""Shared fixtures: the process is prepared as in the mains, and every test gets its own folder."""

import runtime  # noqa: F401  (before Paddle)
