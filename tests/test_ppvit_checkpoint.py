"""PPViT's training checkpoints go on: the next step is that of its own optimizer."""

import numpy as np
import paddle
import pytest
from paddle import nn

import engine
from cli.errors import CheckpointError, UserError
from parallel.process import prepare_process
from storage import checkpoints
from training import ppvit_checkpoint
from training.learner import Learner
from training.saving import first_model

from .helpers.tiny_data import make_config

CHANNELS, TOKENS = 16, 4  # of tests/helpers/tiny_data.py


def affine():
    layer = nn.Layer()
    layer.alpha = paddle.create_parameter([1, 1, CHANNELS], "float32")
    layer.beta = paddle.create_parameter([1, 1, CHANNELS], "float32")
    return layer


class Block(nn.Layer):
    """Creates its parameters in PPViT's order, which is not the order of its state dict."""

    def __init__(self):
        super().__init__()
        self.norm1 = affine()
        self.linear_tokens = nn.Linear(TOKENS, TOKENS)
        self.norm2 = affine()
        self.mlp_channels = nn.Layer()
        self.mlp_channels.fc1 = nn.Linear(CHANNELS, 4 * CHANNELS)
        self.mlp_channels.fc2 = nn.Linear(4 * CHANNELS, CHANNELS)
        self.ls1 = paddle.create_parameter([CHANNELS], "float32")
        self.ls2 = paddle.create_parameter([CHANNELS], "float32")


class Model(nn.Layer):
    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Layer()
        self.patch_embed.patch_embed = nn.Conv2D(3, CHANNELS, 8, 8)
        self.mixer_layers = nn.Sequential(Block(), Block())
        self.norm = affine()
        self.head = nn.Linear(CHANNELS, 3)


def gradient(name, shape, step):
    seed = [step, *name.encode()]
    return np.random.default_rng(seed).normal(0, 0.01, shape).astype("float32")


class Theirs:
    """A training of PPViT's: its model, scheduler, AdamW and averaged weights."""

    def __init__(self, optimizer=paddle.optimizer.AdamW):
        self.model, self.rate = Model(), paddle.optimizer.lr.CosineAnnealingDecay(0.01, T_max=5)
        for name, parameter in self.model.named_parameters():
            parameter.set_value(gradient(name, parameter.shape, 0))
        self.optimizer = optimizer(
            parameters=self.model.parameters(), learning_rate=self.rate, weight_decay=0.0
        )
        self.ema = {name: p.numpy() for name, p in self.model.named_parameters()}

    def step(self, number, lr=None):
        for name, parameter in self.model.named_parameters():
            parameter.stop_gradient = False
            (parameter * paddle.to_tensor(gradient(name, parameter.shape, number))).sum().backward()
        if lr is not None:
            self.rate.last_lr = lr
        self.optimizer.step()
        self.optimizer.clear_grad()
        for name, parameter in self.model.named_parameters():
            self.ema[name] = 0.9 * self.ema[name] + 0.1 * parameter.numpy()

    def state(self, **more):
        ema = {name: paddle.to_tensor(value) for name, value in self.ema.items()}
        parts = {"model": self.model.state_dict(), "model_ema": ema}
        parts |= {"optimizer": self.optimizer.state_dict(), "epoch": 2}
        return {**parts, "lr_scheduler": self.rate.state_dict(), **more}


@pytest.fixture
def theirs():
    nn.Linear(3, 3)  # of another model: their names do not start at 0
    theirs = Theirs()
    for number in (1, 2, 3):
        theirs.step(number)
    theirs.rate.step(2)
    return theirs


@pytest.fixture
def config_for(tmp_path, data):
    """The config of a run that resumes the file at a path, in which ``state`` is saved."""

    def make(path, state, *opts):
        paddle.save(state, str(path))
        no_decay = ["TRAIN.WEIGHT_DECAY", 0, "TRAIN.GRAD_CLIP", None, "TRAIN.OPTIMIZER.EPS", 1e-8]
        ema = ["TRAIN.MODEL_EMA", True, "TRAIN.MODEL_EMA_DECAY", 0.9, "DATA.BATCH_SIZE", 12]
        run = ["MODEL.RESUME", path, "TRAIN.NUM_EPOCHS", 5]
        return make_config(tmp_path, data, *run, *no_decay, *ema, *opts)

    return make


@pytest.fixture
def path(tmp_path):
    return tmp_path / "theirs" / "Epoch-2-Loss-1.5.pdparams"


def assert_next_step_is_theirs(config, saved, theirs):
    """The model and its average after one step of ours with the gradients of step 4."""
    learner = Learner(config, prepare_process(), first_model(config, saved), saved)
    for name, parameter in learner.model.named_parameters():
        (parameter * paddle.to_tensor(gradient(name, parameter.shape, 4))).sum().backward()
    learner.gradients = lambda window, rng: (paddle.ones([], "float64"), paddle.ones([]))
    learner.step([], 0.02, None, 3)
    theirs.step(4, 0.02)
    expected = {name: p.numpy() for name, p in theirs.model.named_parameters()}
    assert_same(learner.model, expected)
    if "model_ema" in saved:
        assert_same(learner.ema.model, theirs.ema)


def assert_same(ours, theirs):
    ours = {name: parameter.numpy() for name, parameter in ours.named_parameters()}
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=1e-8, err_msg=name)


def test_the_next_step_is_that_of_their_own_optimizer(config_for, path, theirs):
    scaler = {"scale": paddle.to_tensor([32768.0]), "incr_count": 3}
    config = config_for(path, theirs.state(amp_grad_scaler=scaler))
    assert_next_step_is_theirs(config, ppvit_checkpoint.load(path, config), theirs)


@pytest.mark.parametrize("name", ["ResMLP-Epoch-2-Loss-1.5", "mine"])
def test_a_pair_of_weights_and_optimizer_goes_on_too(tmp_path, config_for, theirs, name):
    config = config_for(tmp_path / f"{name}.pdparams", theirs.model.state_dict())
    paddle.save(theirs.optimizer.state_dict(), str(tmp_path / f"{name}.pdopt"))
    path = checkpoints.find(tmp_path / name)
    if name == "mine":  # which does not say the epoch
        with pytest.raises(CheckpointError, match="give them with -last_epoch N"):
            ppvit_checkpoint.load(path, config)
        config.defrost()
        config.TRAIN.LAST_EPOCH = 2
    saved = ppvit_checkpoint.load(path, config)
    assert saved["epoch"] == 2 and any("no model_ema" in note for note in saved["notes"])
    assert_next_step_is_theirs(config, saved, theirs)


def test_a_run_goes_on_at_their_epoch_and_says_what_is_new(config_for, path, theirs, capsys):
    config = config_for(path, theirs.state())
    folder = engine.run(config).folder
    lines = capsys.readouterr().out.splitlines()
    place = checkpoints.load(folder / "last")["place"]
    assert (place["epoch"], place["step"]) == (5, 10)
    assert "resumed PPViT's checkpoint after epoch 2, step 4" in lines
    new = [line for line in lines if line.startswith("not carried over: ")]
    assert [note.split(": ")[1] for note in new] == [
        "lr_scheduler (rate 0.00655 there)",
        "random numbers and the order of images",
        "the best accuracy so far",
    ]
    with pytest.raises(UserError, match="holds an earlier run"):
        engine.run(config)


def test_a_run_of_ours_beside_their_file_is_not_overwritten(tmp_path, config_for, theirs):
    config = config_for(tmp_path / "run" / "Epoch-2-Loss-1.5.pdparams", theirs.state())
    checkpoints.save({"model": {}}, tmp_path / "run" / "last.pdparams")
    with pytest.raises(CheckpointError, match="holds a run of its own"):
        engine.run(config)


def plain(tree):
    """Arrays without the names that Paddle's tensors have."""
    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items()}
    return tree.numpy() if isinstance(tree, paddle.Tensor) else tree


def test_what_is_not_carried_over_is_said(config_for, path, theirs):
    for state, opts, note in (
        (plain(theirs.state()), [], "does not say which parameter is which"),
        # before a first step, Momentum has no state
        (Theirs(paddle.optimizer.Momentum).state(), [], "there are none"),
        (theirs.state(), ["TRAIN.OPTIMIZER.NAME", "lamb"], "PPViT has no LAMB"),
    ):
        saved = ppvit_checkpoint.load(path, config_for(path, state, *opts))
        assert note in saved["notes"][0]
        assert bool(saved["optimizer"]) == bool(opts)


def test_moments_of_another_model_or_optimizer_are_refused(config_for, path, theirs):
    state = theirs.state()
    state["optimizer"] = {f"other_{k}": v for k, v in state["optimizer"].items() if "moment" in k}
    with pytest.raises(CheckpointError, match="belongs to no parameter"):
        ppvit_checkpoint.load(path, config_for(path, state))
    sgd = Theirs(paddle.optimizer.Momentum)
    sgd.step(1)
    config = config_for(path, sgd.state())
    with pytest.raises(CheckpointError, match="velocity_0.*set TRAIN.OPTIMIZER.NAME as it was"):
        assert_next_step_is_theirs(config, ppvit_checkpoint.load(path, config), sgd)


def test_weights_alone_are_still_no_checkpoint(tmp_path, config_for, theirs):
    path = tmp_path / "weights.pdparams"
    config = config_for(path, theirs.model.state_dict())
    assert ppvit_checkpoint.load(path, config) is None
    with pytest.raises(CheckpointError, match="start from it with -pretrained"):
        engine.run(config)
