"""Ports ResMLP weights from PyTorch (timm or facebookresearch/deit) to Paddle, and proves it.

python port_weights/load_timm_weights.py -model resmlp_24_224.fb_distilled_in1k
python port_weights/load_timm_weights.py -checkpoint resmlp_24_dist.pth -output x.pdparams
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli.errors import UserError, WeightsError, run_as_script
from cli.parser import Parser
from config import get_config
from port_weights import names, verify
from port_weights.architecture import infer
from port_weights.download import download
from port_weights.zoo import ZOO, find
from resmlp import ResMLP, load_state
from storage.files import shorten
from storage.weights import read_weights, write_weights

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def port(state: dict, output: str, cfg: str | None, proof: str) -> None:
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
            f"(patch_embed.proj.weight, ...): found {shorten(sorted(state), 3)}"
        )
    ported, report = names.convert(state, source, "paddle")
    architecture = infer(ported)
    configs = {weights.config: CONFIGS / f"{weights.config}.yaml" for weights in ZOO}
    fit = [name for name, path in configs.items() if not architecture.differences(get_config(path))]
    known = f"as configs/{fit[0]}.yaml" if fit else "no config of the zoo"
    sizes = ", ".join(f"{key} {value:g}" for key, value in architecture._asdict().items())
    print(f"{source} names, {len(state)} tensors: {sizes} ({known})")
    if cfg and (differences := architecture.differences(get_config(cfg))):
        raise WeightsError(f"the weights do not fit {cfg}: {'; '.join(differences)}")
    model = ResMLP(**architecture._asdict())
    load_state(model, ported)  # tells what is missing, left over or mis-shaped
    if not architecture.num_classes:
        print("no head in the file: set MODEL.NUM_CLASSES 0 for features, or train a new head")
    order = list(model.state_dict())
    if proof == "timm" or (proof == "auto" and verify.have_timm()):
        print(f"proof: {verify.compare_with_timm(model, state, architecture)}")
    else:
        print(*(report[name] for name in order), sep="\n")
        print(f"{len(report)} tensors, none missing, none left over")
    write_weights({name: ported[name] for name in order}, output)
    expected, found = verify.checksum(ported), verify.checksum(read_weights(output).state)
    if found != expected:
        raise WeightsError(f"{output}: does not hold what was written; is the disk sound?")
    print(f"{output}: written and read back, sha256 of the values {expected}")


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
        source = download(entry.hub_url if args.model else source)
    file = read_weights(source, args.key)
    print(f"read {file}")
    name = entry.name if entry else Path(source).stem
    port(file.state, args.output or f"{name}.pdparams", args.cfg, args.proof)


if __name__ == "__main__":
    run_as_script(main)
