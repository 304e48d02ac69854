"""A recorded training of timm's, step by step; see golden/make_golden.py."""

from pathlib import Path

import numpy as np
import paddle
import pytest

from config import get_config
from cpu import ops
from loading.loader import Batch
from parallel.process import Process
from port_weights.names import convert
from resmlp import DropPath, build_resmlp, load_state
from training.learner import Learner

GOLDEN = Path(__file__).parent / "golden" / "training_timm.npz"
KEEP = 0.9


def train(monkeypatch, **amp):
    """Trains with the recorded weights, batches, masks and rates; returns theirs and our losses."""
    golden = np.load(GOLDEN)
    config = get_config()
    config.DATA.IMAGE_SIZE, config.MODEL.NUM_CLASSES = 16, 10
    mixer = config.MODEL.MIXER
    mixer.PATCH_SIZE, mixer.EMBED_DIM, mixer.DEPTH, mixer.MLP_RATIO = 4, 24, 2, 4.0
    config.MODEL.DROPPATH, config.TRAIN.WEIGHT_DECAY = 1 - KEEP, 0.2
    for key, value in amp.items():
        config[key] = value
    model = build_resmlp(config)
    weights = {name[5:]: golden[name] for name in golden.files if name.startswith("timm/")}
    load_state(model, convert(weights, "timm", "paddle")[0])
    learner = Learner(config, Process(), model)
    learner.augment = lambda images, targets, rng: (images, targets)
    masks = iter(golden["kept"].reshape(-1, 4, 1, 1).astype("float32") / KEEP)
    monkeypatch.setattr(DropPath, "mask", lambda self, x: paddle.to_tensor(next(masks)))
    model.train()
    losses = []
    for step, (pixels, targets) in enumerate(zip(golden["images"], golden["targets"])):
        images = paddle.to_tensor(pixels.astype("float32") / 32)
        batch = Batch(images, paddle.to_tensor(targets), list(range(len(images))))
        record = learner.step([batch], float(golden["rates"][step]), None, step)
        losses.append(record.read()[0] / len(images))
    assert next(masks, None) is None  # each was used
    return golden["losses"], np.array(losses)


@pytest.mark.parametrize("layers", [False, True])
def test_sixty_steps_of_the_whole_recipe_have_timms_losses(monkeypatch, layers):
    if layers:  # Paddle's operators instead of our own
        monkeypatch.setattr(ops, "usable", lambda layer: False)
    theirs, losses = train(monkeypatch)
    assert np.abs(losses - theirs).max() < 1e-4


def test_with_amp_they_are_timms_too_rounded_where_it_is_bfloat16(monkeypatch):
    theirs, losses = train(monkeypatch, AMP=True)
    if ops.choose_precision("auto")[0] == "float32":  # what -amp is on this processor
        assert np.abs(losses - theirs).max() < 1e-4
    theirs, losses = train(monkeypatch, AMP=True, AMP_DTYPE="bfloat16")
    assert np.abs(losses - theirs).max() < 2e-3 and abs(np.mean(losses - theirs)) < 1e-4
