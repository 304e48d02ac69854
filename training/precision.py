"""Mixed precision: what a device computes in, Paddle's context for it, float16's loss scaler."""

from __future__ import annotations

from cpu import setup  # noqa: F401  isort: skip

import contextlib
from collections.abc import Callable

import paddle

from cli.errors import ConfigError
from cpu import ops
from utils import Normalize

# Where the float16 loss scale starts. The usual 2**16 would flush most gradients behind a
# LayerScale of 1e-6 to zero (tests/test_gpu.py); too high a start costs a skipped step a halving.
FLOAT16_LOSS_SCALE = 2.0**20
# The least compute capability for each: below it Paddle's auto_cast does nothing, and only warns.
_CAPABILITY = {"bfloat16": 8, "float16": 7}


def choose_precision(config, on_gpu: bool) -> tuple[str, str]:
    """What AMP computes in here, by AMP_DTYPE, and a line for the log; ("float32", "") without AMP.

    ``auto`` is bfloat16 where the device computes it, else float16 on a GPU and float32 on a CPU.
    ConfigError if AMP_DTYPE names what this GPU does not compute.
    """
    if not config.AMP:
        return "float32", ""
    dtype, line = _of_gpu(config) if on_gpu else ops.choose_precision(config.AMP_DTYPE)
    if config.AMP_LEVEL != "O1" and dtype != "float32":  # the config of a run of earlier versions
        line += f"; AMP_LEVEL {config.AMP_LEVEL} is no longer offered, this is O1"
    return dtype, line


def _of_gpu(config) -> tuple[str, str]:
    capability = paddle.device.cuda.get_device_capability()
    shown = f"this GPU has compute capability {capability[0]}.{capability[1]}"
    known = [dtype for dtype, least in _CAPABILITY.items() if capability[0] >= least]
    wanted, reason = config.AMP_DTYPE, ""
    if wanted == "auto":
        momentum = config.TRAIN.OPTIMIZER.NAME == "sgd" and not config.EVAL
        if momentum and paddle.__version__.startswith("2.") and known[:1] == ["bfloat16"]:
            known, reason = known[1:], "; Paddle 2 has no Momentum in bfloat16 on a GPU"
        if not known:
            return "float32", f"AMP: {shown}, too little for mixed precision; running in float32"
        wanted = known[0]
    elif wanted not in known:
        raise ConfigError(
            f"AMP_DTYPE is {wanted}, which needs compute capability {_CAPABILITY[wanted]}.0, and "
            f"{shown}: set AMP_DTYPE auto, or leave out -amp"
        )
    scaled = ", with a loss scaler" if wanted == "float16" else ""
    return wanted, f"AMP: {wanted}{scaled} ({shown}{reason})"


def autocast(config, on_gpu: bool):
    """The context in which layers compute in what `choose_precision` says."""
    dtype = choose_precision(config, on_gpu)[0]
    if dtype == "float32":
        return contextlib.nullcontext()
    return paddle.amp.auto_cast(level="O1", dtype=dtype) if on_gpu else ops.bfloat16()


def predictor(config, on_gpu: bool, model: Callable) -> Callable[[paddle.Tensor], paddle.Tensor]:
    """Makes of uint8 images ``[B, H, W, 3]`` the model's logits ``[B, K]``."""
    normalize = Normalize(config.DATA.IMAGENET_MEAN, config.DATA.IMAGENET_STD)

    def predict(images):
        with autocast(config, on_gpu):
            return model(normalize(images))

    return predict


class LossScaler(paddle.amp.GradScaler):
    """Paddle's scaler of float16's losses, whose own `_update` also prints the scale: by ``float``
    of a tensor of shape [1], which is a TypeError with NumPy 2.4 and later.
    """

    def __init__(self, enable: bool):
        super().__init__(enable, init_loss_scaling=FLOAT16_LOSS_SCALE, incr_every_n_steps=1000)

    def _update(self) -> None:
        overflow = getattr(self, "_cache_found_inf", None) or getattr(self, "_cache_founf_inf", 0)
        self._incr_count = 0 if overflow else self._incr_count + 1
        if overflow:
            self._scale = self._scale * self._decr_ratio
        elif self._incr_count == self._incr_every_n_steps:
            self._scale, self._incr_count = self._scale * self._incr_ratio, 0
