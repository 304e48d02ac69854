"""Ports ResMLP weights from PyTorch (timm or facebookresearch/deit) to Paddle, and proves it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cli.errors import WeightsError
from config import get_config
from port_weights import names, verify
from port_weights.architecture import Architecture, infer
from port_weights.zoo import ZOO
from resmlp import ResMLP, load_state
from storage.files import shorten
from storage.weights import read_weights, write_weights

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def port(
    state: dict[str, np.ndarray],
    output: str,
    cfg: str | None = None,
    proof: str = "auto",
    log=print,
) -> None:
    """Ports a PyTorch state dict, proves the port, and writes it.

    Args:
        cfg: YAML config that the weights must fit; None: any architecture.
        proof: ``timm`` compares outputs, ``keys`` lists the tensors, ``auto`` compares where torch
            and timm are installed and lists otherwise.

    Raises WeightsError, and writes nothing, where the state dict is not a whole ResMLP, does not
    fit ``cfg``, or the ported model differs from timm's.
    """
    source = names.torch_format(state)
    if "patch_embed.patch_embed.weight" in state:
        raise WeightsError("the names are Paddle's already: use the file with -pretrained")
    if not source:
        raise WeightsError(
            "neither timm's names (stem.proj.weight, ...) nor facebookresearch/deit's "
            f"(patch_embed.proj.weight, ...): found {shorten(sorted(map(str, state)), 3)}"
        )
    ported, rows = names.to_paddle(state, source)
    architecture = infer(ported)
    log(f"{source} names, {len(state)} tensors: {_describe(architecture)}")
    if architecture.in_channels != 3:
        raise WeightsError(
            f"the weights are for images of {architecture.in_channels} channels; here images are "
            f"RGB, of 3"
        )
    if cfg:
        differences = architecture.differences(get_config(cfg))
        if differences:
            raise WeightsError(f"the weights do not fit {cfg}: {'; '.join(differences)}")
    model = ResMLP(**architecture._asdict())
    load_state(model, ported)  # tells what is missing, left over or mis-shaped
    if not architecture.num_classes:
        log("no head in the file: set MODEL.NUM_CLASSES 0 for features, or train a new head")
    order = list(model.state_dict())
    if proof == "timm" or (proof == "auto" and verify.have_timm()):
        comparison = verify.compare_with_timm(model, state, architecture)
        verify.check(comparison)
        log(f"proof: {comparison}")
    else:
        for row in sorted(rows, key=lambda row: order.index(row.target)):
            log(str(row))
        log(f"{len(rows)} tensors, none missing, none left over")
    write_weights({name: ported[name] for name in order}, output)
    expected, found = verify.checksum(ported), verify.checksum(read_weights(output).state)
    if found != expected:
        raise WeightsError(f"{output}: does not hold what was written; is the disk sound?")
    log(f"{output}: written and read back, sha256 of the values {expected}")


def _describe(architecture: Architecture) -> str:
    fitting = [
        weights.config
        for weights in ZOO
        if not architecture.differences(get_config(CONFIGS / f"{weights.config}.yaml"))
    ]
    known = f"as configs/{fitting[0]}.yaml" if fitting else "no config of the zoo"
    return f"{', '.join(f'{k} {v:g}' for k, v in architecture._asdict().items())} ({known})"
