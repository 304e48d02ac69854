"""Sampler orders: pure, complete, the same for any number of processes."""

import numpy as np
import pytest

from loading.samplers import EvalBatchSampler, TrainBatchSampler, sample_rng, train_indices


def global_order(num_images, world, repeats=1, seed=3, epoch=5):
    """The positions of all ranks woven together again."""
    shards = [train_indices(num_images, seed, epoch, r, world, repeats) for r in range(world)]
    return np.stack(shards, axis=1).ravel()


def steps(num_images, batch_size, world, repeats, drop_last, epoch=2, start=0):
    """Per step, the samples of all ranks."""
    samplers = [
        TrainBatchSampler(num_images, batch_size, 7, rank, world, repeats, drop_last)
        for rank in range(world)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch, start)
    return [sorted(sum(batches, [])) for batches in zip(*samplers)]


@pytest.mark.parametrize("num_images", [1, 7, 12, 1001])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_an_epoch_holds_every_image_for_any_number_of_processes(num_images, world):
    order = global_order(num_images, world)
    assert set(order) == set(range(num_images))
    assert len(order) - num_images < world  # every rank as many, at most world - 1 seen twice
    np.testing.assert_array_equal(order[:num_images], global_order(num_images, 1))


LABELS = np.repeat([0, 1, 3, 4], [60, 20, 5, 1])  # of 86 images; class 2 has none


@pytest.mark.parametrize("labels", [None, LABELS])
def test_seed_and_epoch_change_the_order_and_nothing_else_does(labels):
    keys = [(0, 0), (0, 1), (1, 0)]
    orders, again = ([train_indices(86, *key, labels=labels) for key in keys] for _ in range(2))
    np.testing.assert_array_equal(orders, again)
    assert all((a != b).any() for a, b in zip(orders, orders[1:] + orders[:1]))


@pytest.mark.parametrize("num_images,world", [(1, 3), (7, 3), (1001, 3), (12, 4)])
def test_evaluation_batches_hold_every_image_once_and_their_number_is_told(num_images, world):
    samplers = [EvalBatchSampler(num_images, 4, rank, world) for rank in range(world)]
    batches = [list(sampler) for sampler in samplers]
    assert [len(b) for b in batches] == [len(s) for s in samplers]
    seen = [index for rank in batches for batch in rank for _, _, index in batch]
    assert sorted(seen) == list(range(num_images))
    assert all(0 < len(batch) <= 4 for rank in batches for batch in rank)


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("world, batch", [(1, 7), (2, 4), (3, 5), (4, 1)])
def test_other_processes_and_batches_go_on_at_the_very_next_position(
    world, batch, drop_last, repeats
):
    seen = [key for step in steps(310, 4, 2, repeats, drop_last)[:5] for key in step]
    rest = steps(310, batch, world, repeats, drop_last, start=len(seen))
    keys = seen + [key for step in rest for key in step]
    length = 310 if repeats == 1 else 256
    assert [position for _, position, _ in keys] == list(range(len(keys)))
    assert -world < length - len(keys) < (world * batch if drop_last else world)
    one = [key for step in steps(310, 1, 1, repeats, drop_last) for key in step]
    assert keys[: len(one)] == one[: len(keys)]


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_have_equally_long_batches_and_tell_how_many_are_left(rank, drop_last):
    sampler = TrainBatchSampler(50, 3, rank=rank, world=2, drop_last=drop_last)
    sizes = [3] * 8 + [1] * (not drop_last)  # of the 25 images of a rank
    for seen in (0, 1, 5, len(sizes)):
        sampler.set_epoch(1, start=seen * 6)
        assert [len(batch) for batch in sampler] == sizes[seen:]
        assert len(sampler) == len(sizes) - seen


def test_samples_carry_epoch_position_and_index_and_have_each_a_random_stream_of_their_own():
    sampler = TrainBatchSampler(8, 2, seed=1, rank=1, world=2)
    sampler.set_epoch(4)
    order = train_indices(8, 1, 4)
    assert [key for batch in sampler for key in batch] == [(4, p, order[p]) for p in (1, 3, 5, 7)]
    draws, again = ([sample_rng(*key).random() for key in np.ndindex(3, 3, 3)] for _ in range(2))
    assert len(set(draws)) == 27 and draws == again


@pytest.mark.parametrize("seed", range(5))
def test_a_balanced_epoch_is_as_long_and_has_as_many_samples_of_each_class(seed):
    epochs = [train_indices(86, seed, epoch, labels=LABELS) for epoch in range(40)]
    assert len(set(np.concatenate(epochs))) == 86  # every image of a large class, in the end
    order = epochs[7]
    assert len(order) == 86
    assert sorted(np.bincount(LABELS[order])) == [0, 21, 21, 22, 22]
    for label in (0, 1, 3, 4):
        times = np.bincount(order[LABELS[order] == label], minlength=86)[label == LABELS]
        assert times.max() - times.min() <= 1  # none comes twice before all of its class have come
    rounds = LABELS[order[:84].reshape(21, 4)]  # each of all classes, in an order of its own
    assert (np.sort(rounds) == [0, 1, 3, 4]).all()
    assert len(np.unique(rounds, axis=0)) > 10


@pytest.mark.parametrize("world, repeats", [(2, 1), (4, 1), (2, 3)])
def test_a_balanced_order_is_the_same_for_any_number_of_processes(world, repeats):
    labels = np.arange(600) // 200 * (np.arange(600) % 3)
    shards = [train_indices(600, 3, 5, r, world, repeats, labels) for r in range(world)]
    alone = train_indices(600, 3, 5, 0, 1, repeats, labels)
    woven = np.stack(shards, axis=1).ravel()
    np.testing.assert_array_equal(woven[: len(alone)], alone[: len(woven)])
    sampler = TrainBatchSampler(86, 8, 3, labels=LABELS)  # nor where it was interrupted
    whole = list(sampler)
    sampler.set_epoch(0, start=4 * 8)
    assert list(sampler) == whole[4:]
