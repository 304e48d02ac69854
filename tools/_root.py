"""Makes the repository's modules importable from ``python tools/NAME.py``, whatever the folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cpu import setup  # noqa: E402, F401  (before Paddle)
