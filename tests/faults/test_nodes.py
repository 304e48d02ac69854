"""Two hosts (network namespaces; names mean 127.0.1.1) train, and fail, as one."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from storage import checkpoints

from ..helpers import runs
from ..helpers.tiny_data import make_data

SILENCE = 10  # seconds, of driver.py
LIMIT = 300  # seconds for all of a run, on a busy machine
MASTER = "10.213.0.1:6170"
# Its own names and host name, which end with it. The process stays the one that was started.
ON_A_HOST = 'mount --bind "$0" /etc/hosts && hostname "$1" && shift && exec "$@"'


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"), train=48, val=13)


@pytest.fixture
def hosts():
    """Names of two namespaces, 10.213.0.1 and 10.213.0.2; removed with their devices."""
    names = one, two = [f"resmlp-{os.getpid()}-{number}" for number in range(2)]
    commands = [f"netns add {name}" for name in names]
    commands += [f"link add eth0 netns {one} type veth peer name eth0 netns {two}"]
    commands += [f"-n {one} address add 10.213.0.1/24 dev eth0"]
    commands += [f"-n {two} address add 10.213.0.2/24 dev eth0"]
    commands += [f"-n {name} link set {device} up" for name in names for device in ("lo", "eth0")]
    if not shutil.which("ip"):
        pytest.skip("two hosts need iproute2")
    try:
        for words in commands:
            subprocess.run(["ip", *words.split()], check=True, capture_output=True, text=True)
        yield names
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces need root and its capabilities: {error.stderr.strip()}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


class Job:
    def __init__(self, hosts, data, folder):
        self.hosts, self.data, self.folder, self.nodes = hosts, data, folder, []
        self.one_host = runs.command(data, folder / "one", main="main_multi_gpu.py", nprocs=2)
        (folder / "hosts").write_text("127.0.0.1 localhost\n127.0.1.1 node\n")
        # A python that runs the program with faults built in, and shorter times of patience.
        python = folder / "python"
        swap = f"case $word in */main_multi_gpu.py) word={runs.DRIVER} ;; esac"
        swap = f'for word; do shift; {swap}\nset -- "$@" "$word"; done; exec {sys.executable} "$@"'
        python.write_text(f"#!/bin/sh\n{swap}\n")
        python.chmod(0o755)

    def start(self, *opts, script="run_train_multi.sh", output="run", faults=("", ""), **settings):
        environment = {
            **{"NNODES": "2", "MASTER": MASTER, "NPROCS": "1", "AMP": "0", "BATCH_SIZE": "4"},
            **{"CFG": str(self.folder / "tiny.yaml"), "DATASET": "imagefolder"},
            **{"DATA_PATH": str(self.data), "OUTPUT": str(self.folder / output)},
            **{"PYTHON": str(self.folder / "python"), **settings},
        }
        script = ["sh", str(runs.ROOT / script), "-opts", *map(str, opts)]
        for number, host in enumerate(self.hosts):
            around = ["ip", "netns", "exec", host, "unshare", "--uts", "--mount", "sh", "-c"]
            words = [*around, ON_A_HOST, str(self.folder / "hosts"), "node", *script]
            environment["NODE_RANK"] = str(number)
            self.nodes.append(runs.start(words, faults[number], **environment))
        return self.nodes[-2:]


@pytest.fixture
def job(hosts, data, tmp_path):
    job = Job(hosts, data, tmp_path)
    yield job
    for node in job.nodes:
        with suppress(ProcessLookupError):  # all of its group have ended
            os.killpg(node.pid, signal.SIGKILL)


def test_two_hosts_train_and_evaluate_as_two_ranks_of_one(job, tmp_path):
    opts = ["TRAIN.NUM_EPOCHS", 2, "DATA.BATCH_SIZE", 4]
    code, output = runs.run([*job.one_host, "-opts", *map(str, opts)], seconds=LIMIT)
    assert code == 0, output
    endings = [runs.finish(node, LIMIT) for node in job.start(*opts)]
    assert all(code == 0 for code, _ in endings), endings
    assert runs.differences(tmp_path / "one", tmp_path / "run") == []

    weights = str(tmp_path / "run" / "last.pdparams")
    nodes = job.start("DATA.BATCH_SIZE_EVAL", 4, script="run_eval_multi.sh", PRETRAINED=weights)
    endings = [runs.finish(node, LIMIT) for node in nodes]
    assert all(code == 0 for code, _ in endings), endings
    found = json.loads((tmp_path / "run" / "eval.json").read_text())
    expected = runs.metrics(tmp_path / "one", "epoch")[-1]
    assert found["images"] == 13
    assert all(found[key] == expected[f"val_{key}"] for key in ("loss", "top1", "top5"))


LOST = r"error: (rank \d, after step \d+: another rank cannot be reached|RuntimeError: .*gloo"
LOST += r"|rank \d is gone or cannot be reached)"


@pytest.mark.parametrize("place", ["step:1:70", "evaluation:1:1"])
def test_a_rank_killed_on_the_second_host_ends_both(job, place):
    faults = [place.replace(":1:", ":0:") + ":sleep1", f"{place}:kill"]
    opts = ["TRAIN.NUM_EPOCHS", 5000, "SAVE_STEPS", 50]
    endings = [runs.finish(node, LIMIT) for node in job.start(*opts, faults=faults)]
    assert all(code != 0 for code, _ in endings), endings
    assert re.search(LOST, endings[0][1]) and "code -9" in endings[1][1], endings
    assert runs.alive(str(job.folder)) == []


@pytest.mark.parametrize("fault", ["", "save_half:0:1:sleep20"], ids=["training", "waiting"])
def test_a_link_that_is_down_ends_both_hosts(job, hosts, fault):
    nodes = job.start("TRAIN.NUM_EPOCHS", 5000, "SAVE_STEPS", 50, faults=(fault, ""))
    runs.await_save(job.folder, *nodes)
    subprocess.run(["ip", "-n", hosts[1], "link", "set", "eth0", "down"], check=True)
    begin = time.monotonic()
    endings = [runs.finish(node, LIMIT) for node in nodes]
    assert time.monotonic() - begin < SILENCE + 30
    assert all(code != 0 and re.search(LOST, output) for code, output in endings), endings
    assert runs.alive(str(job.folder)) == []


@pytest.mark.parametrize("node", [0, 1])
def test_sigterm_at_one_host_saves_and_another_number_of_hosts_goes_on(job, node):
    nodes = job.start("TRAIN.NUM_EPOCHS", 5000, "SAVE_STEPS", 0)
    runs.await_save(job.folder, *nodes)
    nodes[node].terminate()
    endings = [runs.finish(node, LIMIT) for node in nodes]
    log, last = (job.folder / "run" / name for name in ("log.txt", "last.pdparams"))
    stopped = re.search(r"stopped (after step (\d+)|in evaluation); saved in", log.read_text())
    assert stopped, endings
    step = checkpoints.load(last)["place"]["step"]
    assert stopped[2] in (None, str(step))
    more = ["TRAIN.NUM_EPOCHS", step // 6 + 2, "MODEL.RESUME", "auto"]
    code, output = runs.run(
        [*job.one_host[:-1], "1", "-output", str(last.parent), "-opts", *map(str, more)]
    )
    assert code == 0 and "processes 2 -> 1" in output, output
