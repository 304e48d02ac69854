"""Shared fixtures: the process is prepared as in the mains, and no test sees another's log."""

from cpu import setup  # isort: skip  (before Paddle)

import logging
import os

import pytest

if processes := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # they share the cores
    os.environ.setdefault("RESMLP_THREADS", str(max(1, setup.physical_cores() // int(processes))))


@pytest.fixture(autouse=True)
def fresh_log():
    """Takes away what a run in this process did to the log: its handlers, its reticence."""
    yield
    log = logging.getLogger("resmlp")
    for handler in list(log.handlers):
        handler.close()
        log.removeHandler(handler)
    log.propagate = True
