"""The zoo's models for ``paddle.hub``:

paddle.hub.load(".", "resmlp_24_224", source="local", pretrained="resmlp_24_224")

``paddle.hub.help`` says where each model's file was published.
"""

from __future__ import annotations

from pathlib import Path as _Path

from config import get_config as _get_config
from port_weights.zoo import ZOO as _ZOO
from resmlp import build_resmlp as _build_resmlp
from resmlp import load_pretrained as _load_pretrained

dependencies = ["paddle", "numpy", "yacs", "yaml"]  # paddle.hub checks them


def _entry_point(name: str):
    path = str(_Path(__file__).resolve().parent / "configs" / f"{name}.yaml")
    weights = next(weights for weights in _ZOO if weights.name == name)
    source = f"ported from {weights.url} (docs/porting.md)"
    source = f"PPViT's: {weights.paddle.links}" if weights.paddle else source

    def build(pretrained=None, new_head=False, opts=()):
        named = ["MODEL.PRETRAINED", pretrained] if pretrained else []
        config = _get_config(path, [str(opt) for opt in (*named, *opts)])
        model = _build_resmlp(config)
        if pretrained:
            _load_pretrained(model, config, new_head)
        model.eval()
        return model

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""The model of configs/{name}.yaml.

    {name}.pdparams is {source}

    Args:
        pretrained: weight file, with or without its suffix; or a name of the zoo or the https
            address of a published file (downloaded once); None leaves the initialisation.
        new_head: accept weights for another number of classes, and initialise the head.
        opts: config keys and values: ``["MODEL.NUM_CLASSES", 10, "DATA.IMAGE_SIZE", 160]``.

    Returns:
        A `ResMLP` in evaluation mode; call its ``train()`` to train it.

    Raises:
        WeightsError: the file cannot be read, or does not fit.
    """
    return build


# paddle.hub finds entry points among this module's names: one for each config of the zoo.
globals().update({name: _entry_point(name) for name in {weights.config for weights in _ZOO}})
