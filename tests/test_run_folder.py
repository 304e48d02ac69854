"""The folder of a run: chosen, claimed, and its metrics kept whole."""

import errno
import gc
import json
import logging
import os
import subprocess
import sys
from unittest import mock

import pytest

from cli.errors import CheckpointError, UserError
from config import get_config
from storage import run_folder
from storage.run_folder import RunFolder, choose_folder

from .helpers.runs import ROOT

full = mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))


def claim(path, training=True, resume=None, rank=0):
    gc.collect()  # ends the claims of earlier tests
    return RunFolder(path, rank, training, resume)


def lines(folder):
    return [json.loads(line)["n"] for line in (folder.path / "metrics.jsonl").open()]


def add(folder, *numbers):
    for number in numbers:
        folder.add_metrics({"n": number})


def test_a_chosen_folder_is_used_and_a_default_one_is_dated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = get_config()
    first = choose_folder(config)
    assert first.parent.name == "output" and first.name.startswith("train-")
    first.mkdir(parents=True)
    monkeypatch.setattr(run_folder.time, "strftime", lambda form: first.name[6:])
    assert choose_folder(config).name == f"{first.name}-2"
    config.EVAL = True
    assert choose_folder(config).name.startswith("eval-")
    config.SAVE = str(tmp_path / "mine")
    assert choose_folder(config) == tmp_path / "mine"


def test_a_resumed_run_goes_on_in_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = get_config()
    for saved, day in ((200, 1), (100, 2)):
        last = tmp_path / "output" / f"train-2026010{day}-00-00-00" / "last.pdparams"
        last.parent.mkdir(parents=True)
        last.touch()
        os.utime(last, (saved, saved))
    config.MODEL.RESUME = "auto"
    assert choose_folder(config).name == "train-20260101-00-00-00"  # the clock was set back
    (last.parent / "config.yaml").touch()
    config.MODEL.RESUME = str(last)
    assert choose_folder(config) == last.parent
    config.MODEL.RESUME = f"{'a' * 300}/last.pdparams"  # no file system takes it
    assert choose_folder(config).name.startswith("train-")


def test_a_second_run_is_refused_while_the_first_is_going(tmp_path):
    kept = claim(tmp_path)
    for resume in (None, "auto"):
        with pytest.raises(UserError, match="still going"):
            claim(tmp_path, resume=resume)
    claim(tmp_path, training=False)  # evaluation disturbs nobody
    claim(tmp_path, rank=1)
    assert kept.path == tmp_path


def test_the_claim_ends_with_its_process(tmp_path):
    code = "import os; from storage.run_folder import RunFolder\n"
    code += f"RunFolder({str(tmp_path)!r}, 0, True); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == -9
    claim(tmp_path)


@pytest.mark.parametrize("left", ["last.pdparams", "metrics.jsonl"])
def test_the_folder_of_another_run_is_refused_whatever_is_resumed(tmp_path, left):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / left).touch()
    (tmp_path / "a" / ".last.pdparams.tmp").write_text("half")  # of a run that was killed
    refused = []  # it lets the folder go, though a notebook keeps the error
    for resume in (None, str(tmp_path / "b" / "last.pdparams")):
        with pytest.raises(UserError, match="holds an earlier run; .* -resume auto") as error:
            claim(tmp_path / "a", resume=resume)
        refused.append(error.value)
    for resume in ("auto", str(tmp_path / "a" / "last.pdparams")):
        claim(tmp_path / "a", resume=resume)
    assert not (tmp_path / "a" / ".last.pdparams.tmp").exists()


@pytest.mark.parametrize(
    "name, message",
    [
        ("file/run", "file/run: cannot be written: Not a directory"),
        ("file", "file: is a file, not a folder"),
        ("a" * 300, "aaa: cannot be written: File name too long"),
    ],
)
def test_a_folder_that_cannot_be_made_is_named(tmp_path, name, message):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"-output .*{message}"):
        claim(tmp_path / name)


def test_the_log_takes_any_name(tmp_path):
    claim(tmp_path)
    log = logging.getLogger("resmlp")
    record = log.makeRecord("resmlp", logging.WARNING, "", 0, "photo \udcff ä", (), None)
    log.handlers[-1].handle(record)  # alone: pytest cannot report such a name
    assert "photo \\udcff ä" in (tmp_path / "log.txt").read_text(encoding="utf-8")


def test_metrics_are_cut_to_where_the_checkpoint_stood(tmp_path):
    folder = claim(tmp_path)
    add(folder, 1, 2, 3)
    assert folder.metrics_lines == 3
    folder.rewind_metrics(2)
    add(folder, 4)
    assert lines(folder) == [1, 2, 4] and folder.metrics_lines == 3
    folder.rewind_metrics(5)
    add(folder, 6)
    assert lines(folder) == [1, 2, 4, 6] and folder.metrics_lines == 4
    assert "has 3 of the 5 records" in (tmp_path / "log.txt").read_text()


def test_the_metrics_that_are_kept_are_not_altered_whatever_they_hold(tmp_path):
    folder, kept = claim(tmp_path), b'{"n": 1}\n{"n": "\xff\x0c\xe2\x80\xa8\r"}\n'
    for rest in (b'{"n": 3}\n', b'{"n": '):  # half a line, of a run that was killed
        (tmp_path / "metrics.jsonl").write_bytes(kept + rest)
        folder.rewind_metrics(2)
        assert (tmp_path / "metrics.jsonl").read_bytes() == kept and folder.metrics_lines == 2


@pytest.mark.parametrize("module,name", [(run_folder.os, "fsync"), (run_folder, "open")])
def test_records_that_cannot_be_written_come_later(tmp_path, monkeypatch, module, name):
    folder = claim(tmp_path)
    add(folder, 1)
    monkeypatch.setattr(module, name, full, raising=False)
    add(folder, 2, 3)
    with pytest.raises(CheckpointError, match="No space left"):
        folder.flush_metrics()
    monkeypatch.undo()
    assert lines(folder) == [1] and folder.metrics_lines == 1
    add(folder, 4)
    assert lines(folder) == [1, 2, 3, 4] and folder.metrics_lines == 4


def test_only_rank_0_writes_what_is_shared_and_each_rank_has_a_log(tmp_path):
    folder = claim(tmp_path, rank=3)
    folder.write("config.yaml", "x")
    add(folder, 1)
    folder.rewind_metrics(0)
    assert [path.name for path in tmp_path.iterdir()] == ["log.rank3.txt"]


def test_a_log_on_a_full_disk_is_said_once_and_without_a_traceback(tmp_path, capfd):
    folder = claim(tmp_path)
    log, said = logging.getLogger("resmlp"), []
    file, listener = log.handlers[-1], logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())
    log.addHandler(listener)
    stream = file.setStream(mock.Mock(write=full))
    for _ in range(3):
        log.warning("a line")
    file.setStream(stream)
    log.removeHandler(listener)
    folder.close()
    lost = [line for line in said if "lines of the log are lost: No space left" in line]
    assert len(lost) == 1 and len(said) == 4
    assert "Traceback" not in capfd.readouterr().err
