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
import paddle.distributed as dist
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


def main_leaves_a_meeting_last(process: Process) -> None:
    """Rank 0 may end after a meeting, and the store with it: nobody may need it any more."""
    count = rendezvous.tally

    def slow_count(key: str, more: int = 0) -> int:
        if key.endswith("/here") and not more:  # is everybody here?
            deadline = time.monotonic() + 0.5
            while not count("rank 0 has left") and time.monotonic() < deadline:
                pass
            count("others asked", 1)
        return count(key, more)

    if not process.main:
        rendezvous.tally = slow_count
    rendezvous.wait_for_all(process)
    rendezvous.tally = count
    if process.main:
        asked = count("others asked")
        count("rank 0 has left", 1)
        assert asked >= process.world - 1


def nobody_else_can_connect_and_nothing_waits_to_be_sent(process: Process) -> None:
    """Each request to the store comes in pieces; none waits for the receipt of the one before."""
    listening, at_once = [], []
    for found in rendezvous.tcp_sockets():
        if found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            device = found.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16)
            listening.append((found.getsockname(), device.rstrip(b"\0")))
        else:
            at_once.append(found.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
    assert listening or not process.main, "Paddle's key-value store was not found"
    for name, device in listening:
        assert device == b"lo" or ipaddress.ip_address(name[0]).is_loopback, listening
    assert at_once and all(at_once)


def a_rank_that_is_gone_is_named(process: Process) -> None:
    """Rank 2 stays away and is silent; the others learn of it where they wait for it."""
    rendezvous.SILENCE, count = 0.5, rendezvous.tally
    if process.rank == 2:
        rendezvous.tally = lambda key, more=0: 0  # its signs of life go nowhere
        while count("others know") < process.world - 1:
            time.sleep(0.01)
        rendezvous.tally = count
        rendezvous.meetings += 1
    else:
        with pytest.raises(ConnectionError, match="rank 2 gives no sign of life for"):
            rendezvous.wait_for_all(process)
        count("others know", 1)
    rendezvous.SILENCE = 120.0


CHECKS = (
    helpers,
    main_leaves_a_meeting_last,
    a_rank_that_is_gone_is_named,
    evaluation_counts,
    breaking_off,
    gradients,
)
if sys.platform == "linux":
    CHECKS += (nobody_else_can_connect_and_nothing_waits_to_be_sent,)


def main() -> None:
    rendezvous.BEAT = 0.05
    process = prepare_process()
    for check in CHECKS:
        check(process)
        rendezvous.wait_for_all(process)
        if process.main:
            print(f"passed: {check.__name__}", flush=True)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)
