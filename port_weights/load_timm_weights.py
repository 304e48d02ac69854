"""Ports ResMLP weights from PyTorch (timm or facebookresearch/deit) to Paddle, and proves it.

python port_weights/load_timm_weights.py -model resmlp_24_224.fb_distilled_in1k
python port_weights/load_timm_weights.py -checkpoint resmlp_24_dist.pth -output x.pdparams
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli.errors import UserError, run_as_script
from cli.parser import Parser
from port_weights.download import download
from port_weights.port import port
from port_weights.torch_files import read_torch_weights
from port_weights.zoo import ZOO, find


def main(argv: list[str] | None = None) -> None:
    parser = Parser("Port ResMLP weights from PyTorch to Paddle, with a proof.")
    parser.flag("model", "a name of the zoo, ours or timm's: it is downloaded", metavar="NAME")
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
        raise UserError("give one of -model NAME and -checkpoint FILE")
    source = args.model or args.checkpoint
    entry = find(source) or find(Path(source).name)
    if args.model and entry is None:
        known = ", ".join(weights.timm for weights in ZOO)
        raise UserError(f"-model {args.model}: unknown; choose one of {known}")
    if args.model or "://" in source:
        source = str(download(entry.hub_url if args.model else source))
    state, taken = read_torch_weights(source, args.key)
    print(f"read {f'{taken} of ' if taken else ''}{source}")
    name = entry.name if entry else Path(source).stem
    port(state, args.output or f"{name}.pdparams", args.cfg, args.proof)


if __name__ == "__main__":
    run_as_script(main)
