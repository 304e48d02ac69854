"""One rank of two fails: the whole job ends, soon, and one line says who, when and how to go on."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from loading.samplers import train_indices
from storage import checkpoints

from ..helpers import runs
from ..helpers.runs import alive, await_save, finish, metrics, run, start
from ..helpers.tiny_data import make_data

LIMIT = 30  # seconds from the fault to the end of the job; a start takes most of it here


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"), train=48, val=12)


def job(data, folder, *opts, nprocs=2, launched=False):
    opts = ["DATA.BATCH_SIZE", 4, "SAVE_STEPS", 1, "TRAIN.NUM_EPOCHS", 3, *opts]
    python, *words = runs.command(data, folder / "run", *opts, main=runs.DRIVER, nprocs=nprocs)
    launcher = ["-m", "paddle.distributed.launch", "--log_dir", str(folder / "logs")]
    launcher += ["--nproc_per_node", str(nprocs)]
    return [python, *(launcher if launched else []), *words]


ways = pytest.mark.parametrize("launched", [False, True], ids=["spawned", "launched"])


def fail(words, fault, folder):
    """Runs to the failure; exit code, output, and the closing line. Nothing may be left over."""
    begin = time.monotonic()
    code, output = run(words, fault=fault)
    assert time.monotonic() - begin < LIMIT + 15
    assert code not in (0, None), output
    assert alive(str(folder)) == []
    return code, output, output.splitlines()[-1]


@pytest.mark.parametrize(
    "rank, where, count, step",
    [
        *((rank, *place) for rank in (0, 1) for place in (("step", 4, 3), ("evaluation", 1, 6))),
        *((0, place, 3, 3) for place in ("snapshot", "save_half")),  # rank 0 alone saves
    ],
)
def test_a_killed_rank_ends_the_job(tmp_path, data, rank, where, count, step):
    code, output, line = fail(job(data, tmp_path), f"{where}:{rank}:{count}:kill", tmp_path)
    assert code == 1
    if where != "save_half":
        assert line.startswith(f"error: rank {rank}, after step {step}: it was killed by SIGKILL")
    assert f"rank {rank}, after step" in line and "killed by SIGKILL (out of memory?)" in line
    assert line.endswith(f"-resume auto goes on from {tmp_path}/run/last.pdparams")
    if where != "step":
        code, output = run(job(data, tmp_path, "MODEL.RESUME", "auto"))
        assert code == 0, output


def test_rank_1_dies_while_rank_0_saves(tmp_path, data):
    process = start(job(data, tmp_path), fault="snapshot:0:2:sleep3600")
    await_save(tmp_path, process)
    time.sleep(1)
    begin = time.monotonic()
    os.kill(children(process.pid, "spawn_main")[1], signal.SIGKILL)
    code, output = finish(process)
    assert time.monotonic() - begin < 10
    assert code == 1 and "rank 1" in output.splitlines()[-1], output
    assert alive(str(tmp_path)) == []


def all_end(folder, seconds):
    deadline = time.monotonic() + seconds
    while alive(str(folder)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return alive(str(folder)) == []


def children(parent, word):
    pids = map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split())
    return [pid for pid in pids if word in Path(f"/proc/{pid}/cmdline").read_text()]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_raises_is_heard_with_its_traceback(tmp_path, data, rank):
    code, output, line = fail(job(data, tmp_path), f"step:{rank}:3:raise", tmp_path)
    assert code == 1
    assert f"[rank {rank}] Traceback" in output
    assert line.startswith(f"error: rank {rank}, after step 2: ValueError: a fault of the test;")
    log = tmp_path / "run" / ("log.txt" if rank == 0 else "log.rank1.txt")
    assert "ValueError: a fault of the test" in log.read_text()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_nan_on_one_rank_is_named_by_all(tmp_path, data, rank):
    code, output, line = fail(job(data, tmp_path), f"forward:{rank}:4:nan", tmp_path)
    assert code == 2
    assert line.startswith(f"error: rank {rank}, step 3: the loss is not finite")
    assert f"nonfinite.rank{rank}.json" in line and "last.pdparams" in line
    assert output.count("is not finite") == 1
    facts = json.loads((tmp_path / "run" / f"nonfinite.rank{rank}.json").read_text())
    assert facts["rank"] == rank and facts["step"] == 3 and len(facts["images"]) == 4
    assert facts["loss"] != facts["loss"]


def test_a_nan_on_one_rank_is_skipped_by_all(tmp_path, data):
    code, output = run(job(data, tmp_path, "TRAIN.NONFINITE", "skip"), fault="forward:1:4:nan")
    assert code == 0, output
    assert "step 3: skipped" in output
    losses = [record["loss"] for record in metrics(tmp_path / "run", "step")]
    assert all(loss == loss for loss in losses)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_bad_image_on_one_rank_is_named(tmp_path, rank):
    data = make_data(tmp_path / "data", train=48, val=12)
    bad = sorted((data / "train").rglob("*.png"))[train_indices(48, 0, 0, rank, 2)[9]]
    bad.write_bytes(bad.read_bytes()[:60])
    code, output, line = fail(job(data, tmp_path, "DATA.NUM_WORKERS", 1), "", tmp_path)
    assert code == 2 and line.startswith(f"error: rank {rank}, after step 2: {bad}: "), output
    assert "DATA.BAD_IMAGE skip" in line and "Traceback" not in output


def test_a_save_of_40_seconds_times_nobody_out(tmp_path, data):
    """gloo's collectives give up after 30 seconds."""
    words = job(data, tmp_path, "TRAIN.NUM_EPOCHS", 1)
    begin = time.monotonic()
    code, output = run(words, fault="snapshot:0:2:sleep40", seconds=150)
    assert code == 0, output
    assert time.monotonic() - begin > 40


@ways
def test_a_preempted_rank_waits_for_the_one_that_writes(tmp_path, data, launched):
    """Longer than a rank that is left alone may take to end."""
    words = job(data, tmp_path, "SAVE_STEPS", 0, launched=launched)
    code, output = run(words, fault="step:1:3:term save_half:0:1:sleep8")
    assert launched or code == 75, output
    assert f"stopped after step 3; saved in {tmp_path}/run" in output, output
    assert checkpoints.load(tmp_path / "run" / "last.pdparams")["place"]["step"] == 3


@ways
def test_a_checkpoint_on_its_way_is_finished_when_all_ranks_fail(tmp_path, data, launched):
    words = job(data, tmp_path, "SAVE_STEPS", 2, launched=launched)
    code, output = run(words, fault="save_half:0:2:sleep5 forward:1:5:nan")  # of steps 4, 5
    assert code != 0 and "error: rank 1, step 4: the loss is not finite" in output, output
    assert checkpoints.load(tmp_path / "run" / "last.pdparams")["place"]["step"] == 4


@pytest.mark.parametrize("nprocs", [1, 2])
def test_ctrl_c_saves_though_the_reader_of_the_output_is_gone(tmp_path, data, nprocs):
    """`... 2>&1 | tee log`: a terminal's Ctrl-C ends tee too."""
    process = start(job(data, tmp_path, "TRAIN.NUM_EPOCHS", 5000, "SAVE_STEPS", 0, nprocs=nprocs))
    await_save(tmp_path, process)
    process.stdout.close()
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(30) == 75 and "saved in" in runs.log_of(tmp_path / "run")


@pytest.mark.parametrize("nprocs", [1, 2])
def test_a_preempted_run_says_when_it_could_not_save(tmp_path, data, nprocs):
    words = job(data, tmp_path, "SAVE_STEPS", 2, nprocs=nprocs)
    code, output = run(words, fault="step:0:5:term save_half:0:3:full")
    assert code == 2 and "No space left" in runs.error_line(output), output
    assert checkpoints.load(tmp_path / "run" / "last.pdparams")["place"]["step"] == 4


def test_ranks_end_when_their_parent_is_killed(tmp_path, data):
    process = start(job(data, tmp_path, "TRAIN.NUM_EPOCHS", 5000, "DATA.NUM_WORKERS", 2))
    await_save(tmp_path, process)
    process.kill()
    process.wait()
    assert all_end(tmp_path, 10)


@ways
def test_ranks_end_when_their_parent_is_killed_while_they_start(tmp_path, data, launched):
    process = start(job(data, tmp_path, "TRAIN.NUM_EPOCHS", 5000, launched=launched))
    ranks = lambda: children(process.pid, "-u" if launched else "spawn_main")  # noqa: E731
    while sum("libpaddle" in Path(f"/proc/{pid}/maps").read_text() for pid in ranks()) < 2:
        assert process.poll() is None  # they import Paddle
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert all_end(tmp_path, 20)


@pytest.mark.parametrize("to", ["the parent", "its group", "every process"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_stops_all_ranks_at_the_same_step(tmp_path, data, to, number):
    """As a user, a terminal and a scheduler send it; loader workers get it too."""
    before = signal.signal(number, signal.SIG_DFL)  # under nohup SIGHUP would mean nothing
    process = start(job(data, tmp_path, "TRAIN.NUM_EPOCHS", 5000, "DATA.NUM_WORKERS", 2))
    signal.signal(number, before)
    await_save(tmp_path, process)
    begin = time.monotonic()
    if to == "its group":
        os.killpg(process.pid, number)
    else:
        for pid in [process.pid] if to == "the parent" else alive(str(tmp_path)):
            os.kill(pid, number)
    code, output = finish(process)
    assert code == 75, output
    assert time.monotonic() - begin < 10
    assert "-resume auto goes on from there" in output.splitlines()[-1]
    assert output.count("goes on from there") == 1 and "Traceback" not in output
    assert alive(str(tmp_path)) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_that_reaches_a_rank_late_does_not_kill_it(tmp_path, data, rank):
    """As from a scheduler, or by ranks that notice their launcher's end at different times."""
    fault = f"step:{1 - rank}:4:term goodbye:{rank}:1:term"
    code, output = run(job(data, tmp_path), fault)
    assert code == 75, output
    line = output.splitlines()[-1]
    assert line.startswith("stopped after step 4; saved in") and "killed" not in output


def test_a_second_signal_ends_all_at_once(tmp_path, data):
    process = start(job(data, tmp_path), fault="snapshot:0:2:sleep3600")
    await_save(tmp_path, process)
    process.terminate()
    time.sleep(1.5)
    assert process.poll() is None
    process.terminate()
    code, output = finish(process, 10)
    assert code != 0 and alive(str(tmp_path)) == [], output


def test_a_second_run_in_the_folder_is_refused_and_the_first_goes_on(tmp_path, data):
    process = start(job(data, tmp_path, "TRAIN.NUM_EPOCHS", 5000))
    await_save(tmp_path, process)
    code, output = run(job(data, tmp_path, "MODEL.RESUME", "auto", nprocs=1))
    assert code == 2 and "still going uses this folder" in output, output
    process.terminate()
    code, output = finish(process)
    assert code == 75 and "saved in" in output, output


def test_another_number_of_processes_goes_on_where_the_first_stopped(tmp_path, data):
    words = job(data, tmp_path, "REPORT_FREQ", 1)
    fail(words, "save_done:0:3:kill", tmp_path)  # after 3 steps of 8 images
    opts = ["REPORT_FREQ", 1, "MODEL.RESUME", "auto"]
    code, output = run(job(data, tmp_path, *opts, nprocs=1))
    assert code == 0, output
    assert "changed since the checkpoint: processes 2 -> 1" in output
    assert "resumed after epoch 0 and 24 images, step 3" in output
    steps = [record["step"] for record in metrics(tmp_path / "run", "step")]
    assert steps == list(range(1, 3 + 6 + 12 + 12 + 1))  # the rest of 48 images in steps of 4


def test_the_launcher_runs_the_same_job(tmp_path, data):
    code, output = run(job(data, tmp_path, launched=True))
    assert code == 0, output
    assert "12 images" in output and alive(str(tmp_path)) == []


@pytest.mark.parametrize(
    "fault, text",
    [
        ("step:0:4:kill", "{}/logs"),
        ("step:1:4:kill", "{}/logs"),
        ("step:1:4:raise", "{}/logs"),
        ("forward:1:4:nan", "error: rank 1, step 3: the loss is not finite"),  # all ranks say it
    ],
)
def test_the_launcher_ends_the_job_and_names_the_log_of_a_rank_that_fails(
    tmp_path, data, fault, text
):
    code, output, _ = fail(job(data, tmp_path, launched=True), fault, tmp_path)
    assert text.format(tmp_path) in output, output
    if fault.endswith("raise"):
        log = (tmp_path / "run" / "log.rank1.txt").read_text()
        assert "error: ValueError: a fault of the test" in log


def test_ranks_save_and_end_when_their_launcher_is_killed(tmp_path, data):
    opts = ["TRAIN.NUM_EPOCHS", 5000, "SAVE_STEPS", 100000]
    process = start(job(data, tmp_path, *opts, launched=True))
    await_save(tmp_path, process)
    process.kill()
    process.communicate()
    assert all_end(tmp_path, 15)
    assert "-resume auto goes on from there" in runs.log_of(tmp_path / "run")
