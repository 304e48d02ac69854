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
from port_weights import verify
from port_weights.download import download, is_address
from port_weights.port import port
from port_weights.torch_files import read_torch_weights
from port_weights.zoo import ZOO
from storage.weights import check_state


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
