"""The optimizer, weight decay by role, gradient clipping, and the learning-rate schedule."""

from __future__ import annotations

from cpu import setup  # noqa: F401  isort: skip

import logging
import math
from bisect import bisect_right

import numpy as np
import paddle
from paddle import nn

from cli.errors import CheckpointError

_log = logging.getLogger("resmlp")


def scaled_rate(config, total_batch: int) -> float:
    """BASE_LR for a total batch: times ``total_batch / LINEAR_SCALED_LR`` where that is set."""
    train = config.TRAIN
    return train.BASE_LR * (total_batch / train.LINEAR_SCALED_LR if train.LINEAR_SCALED_LR else 1)


def learning_rate(config, epoch: float, total_batch: int) -> float:
    """The learning rate after ``epoch`` epochs (step 30 of 100 in the third done: 2.3) where a step
    is of ``total_batch`` images, over all processes and accumulated batches.

    Source: timm's schedulers in epoch mode, as DeiT uses them: the warmup replaces the first
    epochs of the curve, and only the base rate is scaled.
    """
    train, schedule = config.TRAIN, config.TRAIN.LR_SCHEDULER
    base = scaled_rate(config, total_batch)
    if epoch >= train.NUM_EPOCHS:  # cooldown
        return train.END_LR
    if schedule.NAME != "cosine" and epoch < train.WARMUP_EPOCHS:
        return train.WARMUP_START_LR + (base - train.WARMUP_START_LR) * epoch / train.WARMUP_EPOCHS
    if schedule.NAME == "constant":
        return base
    if schedule.NAME == "step":
        milestones = [float(m) for m in schedule.MILESTONES.split(",") if m.strip()]
        drops = bisect_right(milestones, epoch) if milestones else epoch // schedule.DECAY_EPOCHS
        return base * schedule.DECAY_RATE**drops
    cosine = 0.5 * (1 + math.cos(math.pi * epoch / train.NUM_EPOCHS))
    return train.END_LR + (base - train.END_LR) * cosine


class Schedule:
    """The steps of a run (``batches`` an epoch on each of ``world`` processes) and their rates."""

    def __init__(self, config, batches: int, world: int, images: float = math.inf):
        self.config, self.accum_iter = config, min(config.TRAIN.ACCUM_ITER, batches)
        wanted = config.DATA.BATCH_SIZE * world * config.TRAIN.ACCUM_ITER
        self.samples_per_step = min(config.DATA.BATCH_SIZE * world * self.accum_iter, images)
        if self.samples_per_step < wanted:
            _log.warning(
                f"DATA.BATCH_SIZE {config.DATA.BATCH_SIZE} and TRAIN.ACCUM_ITER "
                f"{config.TRAIN.ACCUM_ITER} ask for {wanted} images a step, more than an epoch "
                f"has: a step is one of {self.samples_per_step}, and the learning rate goes by that"
            )
        self.steps_per_epoch = -(-batches // self.accum_iter)
        self.total_epochs = config.TRAIN.NUM_EPOCHS + config.TRAIN.COOLDOWN_EPOCHS
        self.base_rate = scaled_rate(config, self.samples_per_step)

    def rate(self, epoch: int, step: int) -> float:
        """The learning rate of a step of an epoch, both counted from 0."""
        epoch = epoch + step / self.steps_per_epoch
        return learning_rate(self.config, epoch, self.samples_per_step)


def decayed_parameters(model: nn.Layer) -> set[str]:
    """Names of the weights of linear layers and the patch convolution (DeiT, LAMB's usual set)."""
    return {
        f"{prefix}.weight"
        for prefix, layer in model.named_sublayers()
        if isinstance(layer, (nn.Linear, nn.Conv2D))
    }


def trainable_parameters(model: nn.Layer) -> dict[str, paddle.Tensor]:
    """The parameters that are not frozen (TRAIN.FREEZE), by name."""
    return {name: p for name, p in model.named_parameters() if not p.stop_gradient}


_ADAM = frozenset({"moment1_0", "moment2_0", "beta1_pow_acc_0", "beta2_pow_acc_0"})
OPTIMIZERS = {  # TRAIN.OPTIMIZER.NAME -> Paddle's class, what that keeps for each parameter
    "lamb": (paddle.optimizer.Lamb, _ADAM),
    "adamw": (paddle.optimizer.AdamW, _ADAM),
    "sgd": (paddle.optimizer.Momentum, frozenset({"velocity_0"})),
}


def build_optimizer(config, model: nn.Layer) -> paddle.optimizer.Optimizer:
    """Builds one of `OPTIMIZERS` (SGD is Nesterov's); the engine sets its rate and clips.

    It has one flat parameter list: Paddle clips and schedules groups one by one.
    """
    settings, decay = config.TRAIN.OPTIMIZER, config.TRAIN.WEIGHT_DECAY
    everything, named = dict(model.named_parameters()), trainable_parameters(model)
    names = decayed_parameters(model) & named.keys()
    decayed = {named[name].name for name in names}  # Paddle's own names
    depth = len(model.mixer_layers)
    for name, parameter in named.items():
        level = 0 if name.startswith("patch_embed.") else depth + 1  # of head and last norm
        if name.startswith("mixer_layers."):
            level = int(name.split(".")[1]) + 1
        factor = (config.TRAIN.LAYER_DECAY or 1.0) ** (depth + 1 - level)  # as BEiT
        parameter.optimize_attr["learning_rate"] = factor
        if settings.NAME == "sgd" and name in names:
            parameter.regularizer = paddle.regularizer.L2Decay(decay)
    betas = dict(beta1=settings.BETAS[0], beta2=settings.BETAS[1], epsilon=settings.EPS)
    options = {
        "lamb": dict(
            lamb_weight_decay=decay,
            exclude_from_weight_decay_fn=lambda parameter: parameter.name not in decayed,
            **betas,
        ),
        "adamw": dict(
            weight_decay=decay, apply_decay_param_fun=lambda name: name in decayed, **betas
        ),
        "sgd": dict(momentum=settings.MOMENTUM, use_nesterov=True),
    }
    optimizer = OPTIMIZERS[settings.NAME][0](
        parameters=list(named.values()),
        learning_rate=config.TRAIN.BASE_LR,
        **options[settings.NAME],
    )

    def values(names):
        return sum(int(np.prod(everything[name].shape)) for name in names) / 1e6

    kept, frozen = named.keys() - names, everything.keys() - named.keys()
    _log.info(
        f"{settings.NAME}: weight decay {decay:g} on {len(names)} tensors ({values(names):.2f} M "
        f"values), none on {len(kept)} ({values(kept):.2f} M)"
        + (f"; {len(frozen)} frozen ({values(frozen):.2f} M)" if frozen else "")
    )
    return optimizer


@paddle.no_grad()
def clip_gradients(parameters: list, max_norm: float | None) -> paddle.Tensor:
    """Scales all gradients together to a global norm of at most ``max_norm`` (None: only measures).

    Returns the norm before clipping, a float32 scalar on the device.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    on_gpu = paddle.get_device() != "cpu"  # where a copy costs less than a launch a parameter
    parts = [paddle.concat([g.flatten() for g in grads])] if on_gpu else grads
    squares = [paddle.square(part).sum() for part in parts]  # ** is 50 times slower
    norm = paddle.stack(squares).sum().sqrt()
    if max_norm is None:
        return norm
    excess = paddle.clip(norm, min=max_norm)
    if on_gpu:  # divides them all in one launch
        paddle._C_ops.check_finite_and_unscale_(grads, (excess / max_norm).reshape([1]))
        return norm
    for grad in grads:
        grad.multiply_(max_norm / excess)
    return norm


def optimizer_state(optimizer, model: nn.Layer) -> dict:
    """The optimizer's state under the model's parameter names: ``{parameter: {slot: tensor}}``.

    Paddle's own keys hang on the order in which layers were built, and shift silently.
    """
    names = {parameter.name: name for name, parameter in model.named_parameters()}
    return by_parameter(optimizer.state_dict(), names)


def by_parameter(state: dict, names: dict[str, str]) -> dict:
    """``{<Paddle's name>_<slot>: value}`` as ``{parameter: {slot: value}}``; ``names`` leads from
    Paddle's names to the model's. CheckpointError if an entry belongs to no parameter.
    """
    result: dict = {}
    for key, value in state.items():
        if hasattr(value, "shape"):
            own = max((n for n in names if key.startswith(f"{n}_")), key=len, default=None)
            if own is None:
                raise CheckpointError(f"the optimizer state {key} belongs to no parameter")
            result.setdefault(names[own], {})[key[len(own) + 1 :]] = value
    return result


def load_optimizer_state(optimizer, model: nn.Layer, state: dict) -> None:
    """Puts back what `optimizer_state` returned; CheckpointError for another model or optimizer."""
    if not state:  # saved before the first step
        return
    parameters, own_state = trainable_parameters(model), {}
    if odd := sorted(state.keys() ^ parameters.keys()):
        raise CheckpointError(
            f"the optimizer state is of another model, or of another TRAIN.FREEZE; it differs in "
            f"{odd[:4]}"
        )
    for name, slots in state.items():
        for slot, value in slots.items():
            expected = [1] if "_pow_acc" in slot else list(parameters[name].shape)
            if list(np.shape(value)) != expected:
                raise CheckpointError(
                    f"the optimizer state {name}/{slot} has shape {list(np.shape(value))}; "
                    f"the model needs {expected}"
                )
            if slot == "master_weight":  # of AMP O2, which there once was; "model" rounds it
                parameters[name].set_value(np.asarray(value))
            else:
                own_state[f"{parameters[name].name}_{slot}"] = paddle.to_tensor(np.asarray(value))
    slots = {frozenset(s) - {"master_weight"} for s in state.values()}
    expected = next(names for kind, names in OPTIMIZERS.values() if isinstance(optimizer, kind))
    if slots != {expected}:
        found = sorted(set().union(*slots))
        raise CheckpointError(
            f"the checkpoint's optimizer has {found}; {type(optimizer).__name__} needs "
            f"{sorted(expected)}: set TRAIN.OPTIMIZER.NAME as it was, or start from its weights "
            f"with -pretrained"
        )
    optimizer.set_state_dict(own_state)
