"""Scalars, histograms and images for TensorBoard or VisualDL, behind one small writer.

Look at a run with ``tensorboard --logdir output`` or ``visualdl --logdir output``. Where the
package is missing, a line in the log says so and the run goes on without. (No Paddle in here.)
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np

_log = logging.getLogger("resmlp")


class Dashboard:
    """Writes nothing: what a run without a dashboard has, and the interface of those that do."""

    active = False  # whether what is written goes anywhere

    def scalar(self, name: str, value: float, step: int) -> None:
        """Adds a point to the curve ``name``, at an optimizer step."""

    def histogram(self, name: str, values: np.ndarray, step: int) -> None:
        """Adds the distribution of ``values``, of any shape."""

    def image(self, name: str, image: np.ndarray, step: int) -> None:
        """Adds a picture, uint8 ``[H, W, 3]``."""

    def close(self) -> None:
        """Writes what is still in memory."""


class _Writer(Dashboard):
    """Through a package's writer; both packages have the same methods."""

    active = True

    def __init__(self, writer):
        self._writer = writer

    def scalar(self, name, value, step):
        self._writer.add_scalar(name, value, step)

    def histogram(self, name, values, step):
        self._writer.add_histogram(name, values.ravel(), step)

    def image(self, name, image, step):
        self._writer.add_image(name, image, step, dataformats="HWC")

    def close(self):
        self._writer.close()


def build_dashboard(kind: str, folder: str | os.PathLike, step: int = 0) -> Dashboard:
    """Opens the writer that DASHBOARD names; its files go to ``folder/kind``.

    It writes nothing for ``none``, and where the package cannot be imported. ``step`` is that of a
    run that is resumed: TensorBoard drops the points after it.
    """
    path = str(Path(folder) / kind)
    try:
        if kind == "tensorboard":  # tensorboardX needs neither TensorFlow nor PyTorch
            from tensorboardX import SummaryWriter

            again = {"purge_step": step + 1} if os.path.isdir(path) else {}
            return _Writer(SummaryWriter(path, flush_secs=30, **again))
        if kind == "visualdl":
            from visualdl import LogWriter

            return _Writer(LogWriter(logdir=path))
    except ImportError as error:
        package = {"tensorboard": "tensorboardX"}.get(kind, kind)
        _log.warning(f"DASHBOARD {kind} is off: `pip install {package}` ({error})")
    return Dashboard()
