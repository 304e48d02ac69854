"""Writes Paddle ResMLP weights with PyTorch's names, for timm or facebookresearch/deit.

python port_weights/export_timm_weights.py x.pdparams -output x.safetensors
python port_weights/export_timm_weights.py x.pdparams -output x.pth -format facebook
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli.errors import WeightsError, run_as_script
from cli.parser import Parser
from port_weights import names, verify
from port_weights.architecture import infer
from port_weights.torch_files import read_torch_weights, write_torch_weights
from resmlp import ResMLP, load_state
from storage.weights import KEYS, naming, read_weights


def export(
    pretrained: str, output: str, target: str = "timm", key: str = "auto", log=print
) -> None:
    """Exports a weight file, proves it where timm is installed, and reads it back.

    ``output`` is ``.safetensors`` (no torch needed) or any other suffix for ``torch.load``;
    ``target`` is ``timm`` or ``facebook``. Raises WeightsError: the file is no whole ResMLP, timm's
    outputs differ, it cannot be written.
    """
    file = read_weights(pretrained, key)
    with naming(file.path):
        architecture = infer(file.state)
        model = ResMLP(**architecture._asdict())
        load_state(model, file.state)  # also tells what is missing or left over
    state, rows = names.from_paddle(file.state, target)
    if verify.have_timm():
        comparison = verify.compare_with_timm(model, state, architecture)
        verify.check(comparison)
        log(f"proof: {comparison}")
    else:
        for row in rows:
            log(str(row))
    write_torch_weights(state, output)
    back, _ = names.to_paddle(read_torch_weights(output)[0], target)
    expected, found = verify.checksum(file.state), verify.checksum(back)
    if expected != found:
        raise WeightsError(f"{output}: does not hold what was written; is the disk sound?")
    log(f"{output}: {file} with {target} names, read back bit-identical, sha256 {expected}")


def main(argv: list[str] | None = None) -> None:
    parser = Parser("Write Paddle ResMLP weights with PyTorch's names.")
    parser.paths("pretrained", "Paddle's weight file", metavar="FILE")
    parser.flag("output", ".safetensors, or .pth (needs torch)", required=True, metavar="FILE")
    parser.flag("format", "whose names (default: timm)", choices=names.FORMATS, default="timm")
    parser.flag("key", "which weights of a checkpoint", choices=KEYS, default="auto")
    args = parser.parse_args(argv)
    export(args.pretrained, args.output, args.format, args.key)


if __name__ == "__main__":
    run_as_script(main)
