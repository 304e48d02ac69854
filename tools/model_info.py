"""Layers, parameters and multiply-adds of a config's model; or the README's table of the zoo.

python tools/model_info.py -cfg configs/resmlp_12_224.yaml configs/resmlp_24_224.yaml
python tools/model_info.py -zoo

Counted is what timm and the papers count: one multiply-add for every weight of a convolution or
linear layer, every time that it is used. Affine, LayerScale and pooling are shown apart.
"""

from __future__ import annotations

if not __package__:
    import _root  # noqa: F401

import math
import re
from typing import NamedTuple

import paddle

from cli.errors import UserError, run_as_script
from cli.parser import Parser
from config import get_config
from port_weights.zoo import ZOO
from resmlp import ResMLP, build_resmlp
from tools.common import ROOT, markdown_table


class Part(NamedTuple):
    name: str
    layers: int
    shape: tuple[int, ...]  # of one layer's weight
    parameters: int
    macs: int  # multiply-adds for one image
    counted: bool  # in the usual figure: convolution and linear layers


class ModelInfo(NamedTuple):
    parts: list[Part]
    gelus: int  # GELU evaluations for one image

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    @property
    def macs(self) -> int:
        """Multiply-adds of convolution and linear layers, for one image."""
        return sum(part.macs for part in self.parts if part.counted)

    @property
    def ppvit_macs(self) -> int:
        """The figure that PPViT prints: it adds 8 operations for each GELU."""
        return self.macs + 8 * self.gelus


def model_info(model: ResMLP) -> ModelInfo:
    """Counts a model; it need not be initialised."""
    tokens, dim = model.patch_embed.num_patches, model.embed_dim
    kinds = (  # name, its modules, how often each weight is used for one image, counted
        ("patch embedding", r"patch_embed\.patch_embed", tokens, True),
        ("token mixing", r".*\.linear_tokens", dim, True),
        ("channel MLP, first", r".*\.fc1", tokens, True),
        ("channel MLP, second", r".*\.fc2", tokens, True),
        ("head", r"head", 1, True),
        ("Affine", r".*norm[12]?", tokens, False),
        ("LayerScale", r".*\.ls[12]", tokens, False),
    )
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    parts = []
    for name, module, uses, counted in kinds:
        its = {n: shape for n, shape in shapes.items() if re.fullmatch(rf"{module}(\.\w+)?", n)}
        # bias and beta are only added
        weights = [shape for n, shape in its.items() if not n.endswith((".bias", ".beta"))]
        if weights:
            size, macs = sum(map(math.prod, its.values())), uses * sum(map(math.prod, weights))
            parts.append(Part(name, len(weights), weights[0], size, macs, counted))
    parts.append(Part("pooling", 1, (tokens,), 0, tokens * dim, False))
    hidden = sum(part.shape[1] * part.layers for part in parts if part.name.endswith("first"))
    return ModelInfo(parts, tokens * hidden)


def config_info(config) -> ModelInfo:
    """Counts the model of a config, without allocating it."""
    with paddle.LazyGuard():
        return model_info(build_resmlp(config))


def describe(config) -> str:
    """A table of a config's model, for people."""
    info, mixer, size = config_info(config), config.MODEL.MIXER, config.DATA.IMAGE_SIZE

    rows = {True: [], False: []}
    for part in info.parts:
        shape = " x ".join(map(str, part.shape))
        row = f"  {part.name:20} {part.layers:6}  {shape:18} {part.parameters:14,} {part.macs:16,}"
        rows[part.counted].append(row)
    lines = [
        f"{config.MODEL.NAME}: {size} x {size} pixels, {(size // mixer.PATCH_SIZE) ** 2} tokens of "
        f"{mixer.EMBED_DIM} channels, {mixer.DEPTH} blocks",
        f"  {'':20} {'layers':>6}  {'weight':18} {'parameters':>14} {'multiply-adds':>16}",
        *rows[True],
        f"  {'together':61} {info.macs:16,}",
        "  not in this figure:",
        *rows[False],
        f"  {'all parameters':46} {info.parameters:14,}",
        f"  {info.parameters / 1e6:.2f} M parameters, {info.macs / 1e9:.2f} G multiply-adds; "
        f"with 8 for each GELU, as PPViT counts, {info.ppvit_macs / 1e9:.1f} G",
    ]
    return "\n".join(lines)


def zoo_table() -> str:
    """README's table of the published weights, as Markdown: percent, millions, billions."""
    rows = []
    for weights in ZOO:
        info = config_info(get_config(str(ROOT / "configs" / f"{weights.config}.yaml")))
        measured = weights.paddle or weights  # PPViT's own figures go with its file
        files = [weights.paddle.links] if weights.paddle else []
        cells = (
            f"[{weights.name}](configs/{weights.config}.yaml)",
            f"{measured.top1:.2f}" if measured.top5 else f"{measured.top1:.1f} (k-NN)",
            f"{measured.top5:.2f}" if measured.top5 else "",
            *(f"{top1:.2f}" if top1 else "" for top1 in map(weights.published, ("real", "v2"))),
            f"{info.parameters / 1e6:.2f}",
            f"{info.macs / 1e9:.2f}",
            " ".join([*files, f"[pth]({weights.url})"]),
        )
        rows.append(cells)
    header = ("weights", "top-1", "top-5", "ReaL", "V2", "params", "MACs", "files")
    return markdown_table(header, rows)


def main(argv: list[str] | None = None) -> None:
    parser = Parser("Layers, parameters and multiply-adds of ResMLP models.")
    parser.flag("cfg", "YAML configs", nargs="+", default=[], metavar="FILE")
    parser.opts_flag("config keys: -opts DATA.IMAGE_SIZE 384")
    parser.flag("zoo", "print the README's table of published weights", action="store_true")
    args = parser.parse_args(argv)
    if not args.cfg and not args.zoo:
        raise UserError("give -cfg FILE ... or -zoo")
    for path in args.cfg:
        print(describe(get_config(path, args.opts)), end="\n\n")
    if args.zoo:
        print(zoo_table())


if __name__ == "__main__":
    run_as_script(main)
