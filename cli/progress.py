"""A progress bar in the terminal. (No Paddle.)"""

from __future__ import annotations

import shutil
import sys
import time

CLEAR = "\r\033[K"  # a terminal's line, and begins it anew


class ProgressLine:
    """A progress bar on a terminal; silent anywhere else, and without ``show`` (ranks but 0)."""

    def __init__(self, label: str, show: bool = True):
        self.label, self.show = label, show and sys.stdout.isatty()
        self._next = 0.0

    def __call__(self, done: int, total: int) -> None:
        if self.show and time.monotonic() >= self._next:
            columns = shutil.get_terminal_size().columns - 1  # a full line would begin another
            count = f"{done}/{total} "
            width = max(0, min(30, columns - len(self.label) - len(count) - 4))
            bar = "#" * (width * done // max(total, 1))
            line = f"{self.label} [{bar:<{width}}] {count}"
            print(f"\r{line[:columns]}", end="", flush=True)
            self._next = time.monotonic() + 0.2

    def end(self) -> None:
        if self.show:
            print(CLEAR, end="", flush=True)


def line_start(stream) -> str:
    """What to print before a line, so that it does not go on behind a progress bar."""
    return CLEAR if stream.isatty() else ""
