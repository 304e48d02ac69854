"""Shared fixtures: the process is prepared as in the mains, and no test sees another's log."""

from cpu import setup  # noqa: F401  isort: skip  (before Paddle)

import logging

import pytest


@pytest.fixture(autouse=True)
def fresh_log():
    """Takes away what a run in this process did to the log: its handlers, its reticence."""
    yield
    log = logging.getLogger("resmlp")
    for handler in list(log.handlers):
        handler.close()
        log.removeHandler(handler)
    log.propagate = True
