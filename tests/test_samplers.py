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


@pytest.mark.parametrize("num_images,world", [(256, 1), (300, 3), (1023, 4), (5000, 7), (512, 4)])
def test_repeated_augmentation_selects_as_many_as_deit_copies_on_different_ranks(num_images, world):
    for rank in range(world):
        shard = train_indices(num_images, 0, 0, rank, world, repeats=3)
        assert len(shard) == num_images // 256 * 256 // world
        assert np.bincount(shard).max() == 1 or world < 3


@pytest.mark.parametrize("world", [1, 3])
def test_repeated_augmentation_puts_each_image_three_times_in_a_row(world):
    order = global_order(600, world, repeats=3)
    whole = order[: len(order) // 3 * 3].reshape(-1, 3)
    assert (whole == whole[:, :1]).all()
    assert len(set(whole[:, 0])) == len(whole)  # then the next image, never the same again
    np.testing.assert_array_equal(whole[:, 0], train_indices(600, 3, 5)[: len(whole)])


def test_repeated_augmentation_works_for_fewer_images_than_256():
    assert len(global_order(10, 1, repeats=3)) == 10
    assert len(global_order(10, 4, repeats=3)) == 12
    assert set(global_order(1, 8, repeats=3)) == {0}


@pytest.mark.parametrize("num_images,world", [(1, 3), (7, 3), (1001, 3), (12, 4)])
def test_evaluation_batches_hold_every_image_once_and_their_number_is_told(num_images, world):
    samplers = [EvalBatchSampler(num_images, 4, rank, world) for rank in range(world)]
    batches = [list(sampler) for sampler in samplers]
    assert [len(b) for b in batches] == [len(s) for s in samplers]
    seen = [index for rank in batches for batch in rank for _, _, index in batch]
    assert sorted(seen) == list(range(num_images))
    assert all(0 < len(batch) <= 4 for rank in batches for batch in rank)


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("num_images,world,batch", [(1003, 3, 4), (300, 2, 8), (37, 4, 2)])
def test_n_processes_see_in_each_step_what_one_with_n_times_the_batch_sees(
    num_images, world, batch, repeats
):
    many = steps(num_images, batch, world, repeats, drop_last=True)
    one = steps(num_images, batch * world, 1, repeats, drop_last=True)
    assert many == one
    assert len(many) > 0
    assert len(one[-1]) == world * batch


def test_without_drop_last_all_ranks_have_equally_long_batches_and_every_image_is_seen():
    samplers = [TrainBatchSampler(10, 3, 0, rank, 3, drop_last=False) for rank in range(3)]
    lengths = [[len(batch) for batch in sampler] for sampler in samplers]
    assert lengths == [[3, 1]] * 3
    assert [len(sampler) for sampler in samplers] == [2, 2, 2]
    seen = {index for sampler in samplers for batch in sampler for _, _, index in batch}
    assert seen == set(range(10))


@pytest.mark.parametrize("drop_last,expected", [(True, 16), (False, 17)])
@pytest.mark.parametrize("skip", [0, 1, 5, 7])
def test_a_resumed_epoch_goes_on_at_the_next_unseen_batch(skip, drop_last, expected):
    whole = steps(50, 3, 2, 1, drop_last)
    assert steps(50, 3, 2, 1, drop_last, start=skip * 3 * 2) == whole[skip:]
    sampler = TrainBatchSampler(50, 3, drop_last=drop_last)
    sampler.set_epoch(1, skip * 3)
    assert len(sampler) == len(list(sampler)) == expected - skip  # batches of the pass


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
def test_nothing_is_left_when_an_epoch_has_been_seen(drop_last):
    sampler = TrainBatchSampler(50, 3, world=2, drop_last=drop_last)
    sampler.set_epoch(1, start=len(sampler) * 6)
    assert (len(sampler), list(sampler)) == (0, [])


def test_samples_carry_epoch_position_and_index():
    sampler = TrainBatchSampler(8, 2, seed=1, rank=1, world=2)
    sampler.set_epoch(4)
    order = train_indices(8, 1, 4)
    assert [key for batch in sampler for key in batch] == [(4, p, order[p]) for p in (1, 3, 5, 7)]


def test_every_sample_has_its_own_random_stream():
    draws = {sample_rng(*key).random() for key in np.ndindex(3, 3, 3)}
    assert len(draws) == 27
    assert sample_rng(1, 2, 3).random() == sample_rng(1, 2, 3).random()


@pytest.mark.parametrize("seed", range(5))
def test_a_balanced_epoch_is_as_long_and_has_as_many_samples_of_each_class(seed):
    order = train_indices(86, seed, 7, labels=LABELS)
    assert len(order) == 86
    assert sorted(np.bincount(LABELS[order])) == [0, 21, 21, 22, 22]
    for label in (0, 1, 3, 4):
        times = np.bincount(order[LABELS[order] == label], minlength=86)[label == LABELS]
        assert times.max() - times.min() <= 1  # none comes twice before all of its class have come
    rounds = LABELS[order[:84].reshape(21, 4)]  # each of all classes, in an order of its own
    assert (np.sort(rounds) == [0, 1, 3, 4]).all()
    assert len(np.unique(rounds, axis=0)) > 10


def test_balanced_epochs_show_every_image_of_a_large_class():
    seen = [train_indices(86, 0, epoch, labels=LABELS) for epoch in range(10)]
    assert len(set(np.concatenate(seen))) == 86


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
