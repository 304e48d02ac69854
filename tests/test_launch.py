"""How the ranks of a job are watched, and how a run says that it ended."""

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from contextlib import closing

import pytest

import launch
from cli.errors import ConfigError, UserError
from config import get_config
from parallel import process, rendezvous
from parallel.process import PREEMPTED, Preempted, StopSignal, launched_ranks

from .helpers.runs import ROOT, alive, error_line, run
from .helpers.runs import command as command_for
from .helpers.tiny_data import make_data

_forking = multiprocessing.get_context("fork")


PADDLES = "\n---\nC++ Traceback\n---\n0 f()\n\n---\nError Message Summary:\n---\nIt broke.\n"
MEMORY, PROCESSES = "error: out of memory; lower -batch_size", "error: the system starts no more"
MEMORY_TEXTS = [
    "ResourceExhaustedError: Out of memory error on GPU 0. Cannot ...",
    "(External) CUDA error(2).",
    "(External) CUBLAS error(3). [Hint: 'CUBLAS_STATUS_ALLOC_FAILED'.",
    "(External) CUBLAS error(3).",
    "CUDNN error(4004), CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "NCCL error(1), unhandled cuda error. Cuda failure 2 'out of memory'",
    "NCCL error(1), unhandled cuda error. Failed to CUDA malloc 8 bytes",
]


@pytest.mark.parametrize(
    "error, code, expected",
    [
        (UserError("no data"), 2, "error: no data\n"),
        (UserError("out of memory"), 2, "error: out of memory\n"),  # in its own words
        (Preempted("stopped after step 3"), PREEMPTED, "step 3; -resume auto goes on from there\n"),
        (RuntimeError("odd"), 1, "\nerror: RuntimeError: odd\n"),
        (ValueError(PADDLES), 1, "\nerror: ValueError: It broke.\n"),
        (ConnectionError("rank 0 is gone"), 1, "error: rank 0 is gone\n"),
        (MemoryError(), 2, MEMORY),
        *((OSError(text), 2, MEMORY) for text in MEMORY_TEXTS),
        (BlockingIOError(11, "Resource temporarily unavailable"), 2, PROCESSES),  # of fork
        (RuntimeError("can't start new thread"), 2, PROCESSES),
    ],
)
def test_how_a_run_ends_decides_its_exit_code_and_last_line(
    monkeypatch, capsys, error, code, expected
):
    def run(*args):
        raise error

    monkeypatch.setattr(launch, "run", run)
    assert launch.launch(get_config(), 1) == code
    text = capsys.readouterr().err
    assert expected in text
    assert text.startswith("Traceback") if "\nerror" in expected else text.count("\n") == 1


# ------------------------------------------------------------------------------ watching
def end_like_a_rank(writer, code, after=0.0, text=None):
    time.sleep(after)
    if text is not None:
        writer.send((code, text))
    if code < 0:
        os.kill(os.getpid(), -code)
    if text is not None and code not in (0, PREEMPTED):
        threading.Event().wait()
    os._exit(code)


FOREVER = dict(code=0, after=3600)
SOON, LATER = dict(code=2, text="error: x"), dict(code=2, text="error: x", after=0.2)
STOPPED = dict(code=PREEMPTED, text="stopped")


@pytest.mark.parametrize(
    "ranks, signals, endings",
    [
        ([dict(code=0), dict(code=0, after=0.3)], [], {0: (0, ""), 1: (0, "")}),
        ([FOREVER, dict(code=-9)], [], {1: (-9, "")}),  # one failure ends all
        ([FOREVER, dict(code=3)], [], {1: (3, "")}),
        ([FOREVER, dict(code=1, text="Traceback")], [], {1: (1, "Traceback")}),
        ([SOON, LATER, FOREVER], [], {0: (2, "error: x"), 1: (2, "error: x")}),  # all are heard
        ([STOPPED, FOREVER], [], {0: (PREEMPTED, "stopped")}),  # does not follow
        ([FOREVER], [-5, 0], {}),  # a second signal ends all at once ...
        ([dict(code=0, after=0.5)], [0, 0.01], {0: (0, "")}),  # ... but not one sent twice
    ],
)
def test_ranks_are_waited_for_until_one_fails_or_stops(monkeypatch, ranks, signals, endings):
    monkeypatch.setattr(launch, "GRACE", 0.3)
    readers, writers = zip(*(_forking.Pipe(duplex=False) for _ in ranks))
    workers = [
        _forking.Process(target=end_like_a_rank, args=[writer], kwargs=rank)
        for writer, rank in zip(writers, ranks)
    ]
    for worker in workers:
        worker.start()
    start = time.monotonic()
    signals = [start + after for after in signals]
    assert launch.watch_ranks(workers, readers, signals, lambda: False) == endings
    assert time.monotonic() - start < launch.FAILURE_GRACE + 2
    launch.end_ranks(workers)
    assert not any(worker.is_alive() for worker in workers)


# ------------------------------------------------------------------------------- telling
LINE = "error: rank 1, after step 8: {}; nothing was saved yet\n"
BROKEN = (1, "Traceback\n  here\nerror: RuntimeError: connection reset")
NO_DATA = (2, "error: no data folder")


@pytest.mark.parametrize(
    "first, second, code, text",
    [
        ((0, ""), (0, ""), 0, ""),
        ((-6, ""), (-9, ""), 1, LINE.format("it was killed by SIGKILL (out of memory?)")),
        (BROKEN, (2, "error: a.png: truncated"), 2, LINE.format("a.png: truncated")),  # the cause
        (
            (0, ""),
            BROKEN,
            1,
            "[rank 1] Traceback\n[rank 1]   here\n" + LINE.format("RuntimeError: connection reset"),
        ),
        (NO_DATA, NO_DATA, 2, "error: no data folder\n"),  # said once
        ((PREEMPTED, "stopped"), (PREEMPTED, "other"), PREEMPTED, "stopped\n"),
    ],
)
def test_how_the_ranks_ended_is_said_in_one_line(capsys, first, second, code, text):
    endings = {0: first, 1: second}
    assert launch.report_endings(endings, [7, 8], "/run/last.pdparams", False) == code
    assert capsys.readouterr().err == text


def test_the_checkpoint_to_go_on_from_is_named_and_a_stop_before_the_first(capsys, tmp_path):
    last = tmp_path / "last.pdparams"
    last.touch()
    assert launch.report_endings({1: (3, "")}, [7, 8], str(last), False) == 3
    assert capsys.readouterr().err.endswith(f"; -resume auto goes on from {last}\n")
    assert launch.report_endings({1: (-15, "")}, [0, 0], str(last), True) == 143


# ------------------------------------------------------------------------------- joining
def test_a_port_in_use_and_a_rank_0_that_cannot_be_reached_are_named(monkeypatch):
    with socket.create_server(("", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(UserError, match=f"rank 0 cannot listen at {address}: .*in use"):
            rendezvous.find_rank_0(0, address)
        rendezvous.find_rank_0(1, address)  # where rank 0 listens
    monkeypatch.setattr(rendezvous, "JOIN_TIMEOUT", 0.0)
    for address in ("127.0.0.1:9", "no-such-host.invalid:80"):
        with pytest.raises(UserError, match=f"rank 1 cannot reach rank 0 at {address}"):
            rendezvous.find_rank_0(1, address)


linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux alone ties sockets to devices")


@linux
def test_a_port_that_stays_open_to_others_is_said(caplog):
    rendezvous.shut_out_others(9)
    assert caplog.messages == ["warning: port 9 of this job is open to other machines"]


def test_a_stranger_is_not_taken_for_a_rank(monkeypatch):
    callers = []

    def tell(_, port_and_key):
        port, key = port_and_key
        for words in (b"", bytes(16) + b"\0\0\0\1", key[:9], key + b"\0\0\0\1"):
            callers.append(socket.create_connection(("127.0.0.1", port)))
            callers[-1].sendall(words)
            callers[-1].shutdown(socket.SHUT_WR)

    monkeypatch.setattr(rendezvous, "others", {})
    monkeypatch.setattr(rendezvous.dist, "all_gather_object", tell)
    rendezvous.connect(0, 2, "127.0.0.1")
    assert rendezvous.others[1].getpeername() == callers[-1].getsockname()
    for connection in (*callers, *rendezvous.others.values()):
        connection.close()


_MEETING = """
from cpu import setup
import os
import socket
import sys
from parallel import rendezvous

def meet():
    for found in rendezvous.listening_sockets():
        assert found.getsockname()[1] == int(sys.argv[1])
        device = found.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16)
        print(device.strip(b"\\0").decode())
    print(os.environ["PADDLE_TRAINERS_NUM"])

rendezvous.dist.init_parallel_env = meet
rendezvous.connect = lambda *args: None
rendezvous.join(0)
"""


@linux
@pytest.mark.parametrize("host", ["127.0.0.1", "10.0.0.1"])
def test_the_store_is_tied_before_the_ranks_meet(host):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {"PADDLE_TRAINER_ID": "0", "PADDLE_TRAINERS_NUM": "3", "GLOG_minloglevel": "2"}
    environment["PADDLE_MASTER"] = f"{host}:{port}"
    environment["PADDLE_CURRENT_ENDPOINT"] = f"{host}:1"
    environment["PADDLE_TRAINER_ENDPOINTS"] = f"{host}:1,{host}:2,{host}:3"
    code, output = run([sys.executable, "-c", _MEETING, port], PYTHONPATH=str(ROOT), **environment)
    assert code == 0 and "lo\n3\n" in output, output


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(launch, "gpu_count", lambda: 2)
    with pytest.raises(ConfigError, match="DIST.NPROCS is 3, but only 2 GPUs are visible"):
        launch.launch(get_config(), 3)


def test_processes_that_the_system_refuses_are_one_line(monkeypatch):
    started = []

    def spawn(*args, **kwargs):  # one of two
        started.append(_forking.Process(target=time.sleep, args=[60]))
        started[0].start()
        raise BlockingIOError(11, "Resource temporarily unavailable")

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(launch.dist, "spawn", spawn)
    monkeypatch.setattr(launch, "gpu_count", lambda: 2)
    with pytest.raises(UserError, match="starts no more processes or threads; lower -nprocs"):
        launch.launch(get_config(), 0)
    assert signal.signal(signal.SIGINT, before) is signal.SIG_IGN
    assert not started[0].is_alive()


# ------------------------------------------------------------------ a launcher's environment
JOB = {
    "PADDLE_TRAINER_ID": "1",
    "PADDLE_TRAINERS_NUM": "2",
    "PADDLE_CURRENT_ENDPOINT": "10.0.0.2:80",
    "PADDLE_TRAINER_ENDPOINTS": "10.0.0.1:80,10.0.0.2:80",
}
ALONE = {"PADDLE_TRAINER_ID": "0", "PADDLE_TRAINERS_NUM": "1"}


@pytest.fixture
def launched(monkeypatch):
    for name in [*JOB, "PADDLE_MASTER", "MASTER_ADDR", "FLAGS_selected_gpus"]:
        monkeypatch.delenv(name, raising=False)
    return lambda values: [monkeypatch.setenv(*item) for item in values.items()]


NO_RANK = "PADDLE_TRAINER_ID={} is no rank of PADDLE_TRAINERS_NUM={}"


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, 0),
        ({"PADDLE_TRAINERS_NUM": "1"}, 0),
        (ALONE, 1),
        (JOB, 2),
        *(({**JOB, name: ""}, f"a launcher's in part: {name} missing") for name in JOB),
        ({"PADDLE_TRAINERS_NUM": "2"}, "a launcher's in part: PADDLE_TRAINER_ID and .* missing"),
        ({**JOB, "PADDLE_TRAINER_ID": "2"}, NO_RANK.format("2", "2")),
        ({**JOB, "PADDLE_TRAINER_ID": "x"}, NO_RANK.format("x", "2")),
        ({**JOB, "PADDLE_TRAINERS_NUM": "two"}, NO_RANK.format("1", "two")),
    ],
)
def test_a_launcher_is_known_by_its_environment_and_half_of_one_is_one_line(
    launched, environment, expected
):
    launched(environment)
    if isinstance(expected, int):
        assert launched_ranks() == expected
    else:
        with pytest.raises(UserError, match=expected):
            launch.launch(get_config(), 1)


def test_one_rank_under_the_launcher_takes_its_device_alone(launched, monkeypatch):
    """On a node of eight GPUs with `--devices 3`."""
    launched({**ALONE, "FLAGS_selected_gpus": "3"})
    monkeypatch.setattr(process, "gpu_count", lambda: 8)
    monkeypatch.setattr(launch, "gpu_count", lambda: 8)
    monkeypatch.setattr(launch, "run_launched", lambda config: "one rank")
    assert launch.launch(get_config(), 0) == "one rank"
    devices = []
    monkeypatch.setattr(process.paddle, "set_device", devices.append)
    assert process.prepare_process().world == 1
    assert devices == ["gpu"]  # Paddle's word for the device of FLAGS_selected_gpus


# ------------------------------------------------------------------------------- signals
def test_a_signal_is_remembered_and_one_sent_twice_is_one():
    with closing(StopSignal()) as stop:
        child = os.fork()
        if not child:  # a loader worker leaves signals to the main process
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(stop.received)
        assert os.waitpid(child, 0)[1] == 0 and not stop.received
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received


def test_a_second_signal_later_exits_at_once(monkeypatch):
    child = os.fork()
    if not child:
        StopSignal()
        os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.setattr("parallel.process.SIGNAL_GRACE", -1.0)  # it is later
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143


# ----------------------------------------------------------------------------- for real
def test_a_mistake_in_two_processes_is_one_line(tmp_path):
    data = make_data(tmp_path / "data", train=3)  # does not fill a step
    words = command_for(data, tmp_path / "run", main="main_multi_gpu.py", nprocs=2)
    code, output = run(words)
    assert code == 2 and "do not fill one step of 2 x 8" in error_line(output)
    assert alive(str(tmp_path)) == []
