"""Shared fixtures: the process is prepared as in the mains, and no test sees another's log."""

from cpu import setup  # isort: skip  (before Paddle)

import io
import logging
import os
import sys

import pytest

from cli.errors import run_as_script
from loading import archives

from .helpers.tiny_data import make_data

if processes := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # they share the cores
    os.environ.setdefault("RESMLP_THREADS", str(max(1, setup.physical_cores() // int(processes))))


@pytest.fixture(autouse=True)
def fresh_process():
    """Takes away what a test has left: opened archives, the log's handlers and reticence."""
    yield
    archives.open_archive.cache_clear()
    log = logging.getLogger("resmlp")
    for handler in list(log.handlers):
        handler.close()
        log.removeHandler(handler)
    log.propagate = True


@pytest.fixture
def caplog(caplog):
    """pytest's, also after a run in this process, which keeps its log to itself."""
    logging.getLogger("resmlp").propagate = True
    return caplog


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Tiny data of three classes, to read only."""
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def teacher(tmp_path_factory, data):
    """Keys for a distillation by a ResMLP that was trained; the last: its weights."""
    import engine

    from .helpers.tiny_data import make_config

    run = engine.run(make_config(tmp_path_factory.mktemp("teacher"), data))["folder"]
    opts = f"TRAIN.TEACHER_MODEL {run}/config.yaml TRAIN.TEACHER_PRETRAINED {run}/last.pdparams"
    return ["TRAIN.DISTILLATION_TYPE", "soft", *opts.split()]


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """The weights of a tiny run, beside its config and class names, to read only."""
    from .helpers.tiny_run import make_run  # with Paddle, which not all tests need

    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Runs a tool's main here, in `tmp_path`; returns its exit code and both outputs."""

    def call(main, *arguments, stdin=b""):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["tool", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as end:
            run_as_script(main)
        return end.value.code or 0, *capsys.readouterr()

    return call
