"""Ports ResMLP weights from PyTorch (timm or facebookresearch/deit) to Paddle, and proves it.

python port_weights/load_timm_weights.py -model resmlp_24_224.fb_distilled_in1k
python port_weights/load_timm_weights.py -checkpoint resmlp_24_dist.pth -output x.pdparams
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli.errors import UserError, WeightsError, run_as_script
from cli.parser import Parser
from config import get_config
from port_weights import names, verify
from port_weights.architecture import Architecture, infer
from port_weights.download import download, is_address
from port_weights.torch_files import read_torch_weights
from port_weights.zoo import ZOO
from resmlp import ResMLP, load_state
from storage.weights import check_state, read_weights, write_weights

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def port(
    state: dict[str, np.ndarray],
    output: str,
    cfg: str | None = None,
    proof: str = "auto",
    log=print,
) -> Architecture:
    """Ports a PyTorch state dict, proves the port, and writes it.

    Args:
        state: PyTorch parameter name -> float32 array.
        output: the file to write, ``.pdparams`` or ``.safetensors``.
        cfg: YAML config that the weights must fit; None: any architecture.
        proof: ``timm`` compares outputs, ``keys`` lists the tensors, ``auto`` compares where torch
            and timm are installed and lists otherwise.
        log: receives the lines of the report.

    Returns:
        The architecture of the weights.

    Raises:
        WeightsError: the state dict is not a whole ResMLP, does not fit ``cfg``, or the ported
            model differs from timm's. Nothing is written then.
    """
    source = names.detect_format(state)
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
    return architecture


def _describe(architecture: Architecture) -> str:
    fitting = [
        weights.config
        for weights in ZOO
        if not architecture.differences(get_config(CONFIGS / f"{weights.config}.yaml"))
    ]
    known = f"as configs/{fitting[0]}.yaml" if fitting else "no config of the zoo"
    return f"{', '.join(f'{k} {v:g}' for k, v in architecture._asdict().items())} ({known})"


def _download(tag: str) -> dict[str, np.ndarray]:
    """The weights that timm publishes under a tag."""
    if not verify.have_timm():
        raise WeightsError(
            "-model needs torch and timm (`pip install -r port_weights/requirements.txt`); "
            "or download the file yourself and give it with -checkpoint"
        )
    import timm

    try:
        model = timm.create_model(tag, pretrained=True)
    except Exception as error:  # network, hub, cache: whatever the download runs into
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsError(
            f"{tag}: timm could not fetch it ({reason}); download the file yourself and give it "
            f"with -checkpoint"
        ) from None
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    return check_state(state, tag)


def main(argv: list[str] | None = None) -> None:
    parser = Parser("Port ResMLP weights from PyTorch to Paddle, with a proof.")
    parser.flag("model", "timm's name with tag: it is downloaded", metavar="NAME.TAG")
    parser.flag("checkpoint", "a file or address instead: .pth, .bin, .safetensors", metavar="FILE")
    parser.flag("cfg", "YAML config that the weights must fit", metavar="FILE")
    parser.flag("output", "Paddle file to write (default: named after the model)", metavar="FILE")
    parser.flag("key", "which weights of a training checkpoint", default="auto", metavar="KEY")
    parser.flag(
        *("proof", "compare outputs with timm, or list the tensors (default: timm if installed)"),
        **dict(choices=("auto", "timm", "keys"), default="auto"),
    )
    args = parser.parse_args(argv)
    if bool(args.model) == bool(args.checkpoint):
        raise UserError("give one of -model NAME.TAG and -checkpoint FILE")
    if args.model:
        known = {weights.timm: weights for weights in ZOO}
        if args.model not in known:
            raise UserError(f"-model {args.model}: unknown; choose one of {', '.join(known)}")
        entry, state = known[args.model], _download(args.model)
    else:
        if is_address(args.checkpoint):
            args.checkpoint = str(download(args.checkpoint))
        by_file = {weights.file: weights for weights in ZOO}
        entry = by_file.get(Path(args.checkpoint).name)
        state, taken = read_torch_weights(args.checkpoint, args.key)
        print(f"read {f'{taken} of ' if taken else ''}{args.checkpoint}")
    name = entry.name if entry else Path(args.checkpoint).stem
    port(state, args.output or f"{name}.pdparams", args.cfg, args.proof)


if __name__ == "__main__":
    run_as_script(main)
