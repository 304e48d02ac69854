"""What each rank of a job checks in test_distributed.py; spawned, so it cannot be in there."""

from __future__ import annotations

from cpu import setup  # noqa: F401  isort: skip

import ipaddress
import os
import socket
import sys
import time

import numpy as np
import paddle
import pytest

from loading.samplers import EvalBatchSampler
from parallel import rendezvous
from parallel.process import Process, from_all, main_first, prepare_process
from resmlp import ResMLP
from training.evaluation import evaluate

CLASSES = 7
SUBSET = [0, 2, 5, 6]


def evaluated(count: int, process: Process, **options):
    """What `evaluate` finds for so many images; random logits stand in place of them."""
    rng = np.random.default_rng(count)
    logits, labels = rng.random([count, CLASSES], "float32"), rng.integers(CLASSES, size=count)
    pairs = np.stack([labels, (labels + 1) % CLASSES], axis=1)  # two right labels an image, and
    accepted = np.where(np.arange(count)[:, None] % 3 == 0, -1, pairs)  # none for every third
    sampler = EvalBatchSampler(count, 4, process.rank, process.world)
    batches = [[index for _, _, index in keys] for keys in sampler]
    loader = [(paddle.to_tensor(logits[b]), paddle.to_tensor(labels[b]), b) for b in batches]
    options.update(accepted=accepted, subset=SUBSET)
    return evaluate([lambda x: x], loader, process, CLASSES, **options)


def evaluation_counts(process: Process) -> None:
    """As one process has them; test_evaluation.py has those against NumPy's."""
    for count in (1, 7, 1001):
        (all_ranks,) = evaluated(count, process, rows=True)
        (one,) = evaluated(count, Process(), rows=True)
        assert all_ranks.scores() == pytest.approx(one.scores(), rel=1e-12)
        assert (all_ranks.images, all_ranks.counts.sum() > count) == (count, True)
        np.testing.assert_array_equal(all_ranks.counts, one.counts)
        np.testing.assert_array_equal(all_ranks.rows, one.rows)


def breaking_off(process: Process) -> None:
    asked = process.rank == 1  # one rank alone is asked to stop; all learn of it
    assert evaluated(50, process, stop=lambda: asked) is None


def helpers(process: Process) -> None:
    texts = [str(rank) * (rank + 1) for rank in range(process.world)]
    assert from_all(texts[process.rank], process) == texts
    with main_first(process) as main:
        assert main == (process.rank == 0)


def gradients(process: Process) -> None:
    sizes = dict(image_size=16, patch_size=4, num_classes=CLASSES, embed_dim=24, depth=3)
    rng = np.random.default_rng(0)
    images = rng.normal(size=[4 * process.world, 3, 16, 16]).astype("float32")
    labels = rng.integers(CLASSES, size=len(images))

    def backward(model, network, rows):
        logits = network(paddle.to_tensor(images[rows]))
        paddle.nn.functional.cross_entropy(logits, paddle.to_tensor(labels[rows])).backward()
        grads = [p.grad.numpy() for p in model.parameters() if p.grad is not None]
        model.clear_gradients()
        return grads

    for frozen in (0, 2, "backbone"):
        paddle.seed(1)
        model = ResMLP(**sizes)
        model.freeze(frozen)
        model.train()
        whole = backward(model, model, slice(None))
        mine = slice(process.rank, None, process.world)
        shared = backward(model, paddle.DataParallel(model), mine)
        assert len(whole) == len(shared) == {0: 42, 2: 16, "backbone": 2}[frozen]
        assert max(np.abs(a - b).max() for a, b in zip(whole, shared)) < 1e-6
        assert max(np.abs(a).max() for a in whole) > 0.01


def a_meeting_lasts_until_the_last_rank_is_there(process: Process) -> None:
    for late in range(process.world):
        if process.rank == late:
            time.sleep(0.3)
        came = time.monotonic()
        rendezvous.wait_for_all(process)
        left = time.monotonic()
        assert left >= max(from_all(came, process))  # of one machine, so of one clock


def nobody_else_can_connect(process: Process) -> None:
    listening = list(map(_name_and_device, rendezvous.listening_sockets()))
    assert listening or not process.main, "Paddle's key-value store was not found"
    for name, device in listening:
        assert device == b"lo" or ipaddress.ip_address(name[0]).is_loopback, listening


def _name_and_device(found: socket.socket) -> tuple:
    device = found.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16)
    return found.getsockname(), device.rstrip(b"\0")


def a_rank_that_is_gone_is_named(process: Process) -> None:
    """The last check: rank 2 ends before a meeting; rank 0 learns of it there, rank 1 when rank 0
    ends.
    """
    if process.rank == 2:
        os._exit(0)
    with pytest.raises(ConnectionError, match=f"rank {2 - 2 * process.rank} is gone"):
        rendezvous.wait_for_all(process)


CHECKS = (
    helpers,
    a_meeting_lasts_until_the_last_rank_is_there,
    evaluation_counts,
    breaking_off,
    gradients,
)
if sys.platform == "linux":
    CHECKS += (nobody_else_can_connect,)
CHECKS += (a_rank_that_is_gone_is_named,)


def main() -> None:
    process = prepare_process()
    for check in CHECKS:
        rendezvous.wait_for_all(process)
        check(process)
        if process.main:
            print(f"passed: {check.__name__}", flush=True)
    os._exit(0)
