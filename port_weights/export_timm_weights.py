"""Writes Paddle ResMLP weights with PyTorch's names, for timm or facebookresearch/deit.

python port_weights/export_timm_weights.py x.pdparams -output x.safetensors
python port_weights/export_timm_weights.py x.pdparams -output x.pth -format facebook
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli.errors import WeightsError, run_as_script
from cli.parser import Parser
from port_weights import names, verify
from port_weights.architecture import infer
from resmlp import ResMLP, load_state
from storage.files import write_atomically
from storage.torch_files import import_torch
from storage.weights import KEYS, naming, read_weights, write_weights


def write_torch_weights(state: dict, path: str | Path) -> None:
    """Writes ``.safetensors``, or with any other suffix a file for ``torch.load``."""
    if Path(path).suffix == ".safetensors":
        write_weights(state, path)
        return
    torch, buffer = import_torch(path), io.BytesIO()
    torch.save({name: torch.tensor(value) for name, value in state.items()}, buffer)
    write_atomically(buffer.getvalue(), path)


def main(argv: list[str] | None = None) -> None:
    """Exports a weight file, proves it where timm is installed, and reads it back."""
    parser = Parser("Write Paddle ResMLP weights with PyTorch's names.")
    parser.paths("pretrained", "Paddle's weight file", metavar="FILE")
    parser.flag("output", ".safetensors, or .pth (needs torch)", required=True, metavar="FILE")
    parser.flag("format", "whose names (default: timm)", choices=names.FORMATS, default="timm")
    parser.flag("key", "which weights of a checkpoint", choices=KEYS, default="auto")
    args = parser.parse_args(argv)
    file = read_weights(args.pretrained, args.key)
    with naming(file.path):
        architecture = infer(file.state)
        model = ResMLP(**architecture._asdict())
        load_state(model, file.state)  # also tells what is missing or left over
    state, report = names.convert(file.state, "paddle", args.format)
    if verify.have_timm():
        print(f"proof: {verify.compare_with_timm(model, state, architecture)}")
    else:
        print(*report.values(), sep="\n")
    write_torch_weights(state, args.output)
    back, _ = names.convert(read_weights(args.output).state, args.format, "paddle")
    expected, found = verify.checksum(file.state), verify.checksum(back)
    if expected != found:
        raise WeightsError(f"{args.output}: does not hold what was written; is the disk sound?")
    done = f"{args.output}: {file} with {args.format} names"
    print(f"{done}, read back bit-identical, sha256 {expected}")


if __name__ == "__main__":
    run_as_script(main)
