"""What the tools share: flags, a run's config and model, HTML pages."""

from __future__ import annotations

import base64
import html
import importlib.util
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from cli.errors import UserError, WeightsError
from config import get_config
from loading.classes import with_num_classes
from port_weights.zoo import find
from storage.files import write_atomically
from storage.weights import find_file

ROOT = Path(__file__).resolve().parent.parent
IMAGENET_CLASSES = Path(__file__).with_name("imagenet_classes.txt")


def run_config(
    pretrained: str | os.PathLike | None = None,
    cfg: str | os.PathLike | None = None,
    opts: Iterable[str] = (),
):
    """The frozen config of a trained model, with MODEL.PRETRAINED set to its weights.

    ``cfg`` is a YAML file; None: the run's ``config.yaml`` beside the weights, or that of the zoo.
    UserError without weights or config, or where either cannot be used.
    """
    if pretrained is None and cfg is None:
        raise UserError("give the model's config with -cfg and its weights with -pretrained")
    config = get_config(str(cfg or _config_beside(pretrained)), [str(opt) for opt in opts])
    weights = pretrained or config.MODEL.PRETRAINED
    if not weights:
        raise UserError("give the model's weights with -pretrained")
    config.MODEL.PRETRAINED = _weights_file(weights) or str(weights)
    config.freeze()
    return with_num_classes(config)


def _weights_file(name: str | os.PathLike) -> str | None:
    """The file of a name, with its suffix; None: published weights are meant."""
    try:
        return str(find_file(name))
    except WeightsError:
        if find(name) is None and "://" not in str(name):
            raise
        return None


def _config_beside(pretrained: str | os.PathLike) -> Path:
    """The config of weights that were given without one: of a run, or of the zoo."""
    weights, hint = _weights_file(pretrained), ""
    if weights:
        beside = Path(weights).with_name("config.yaml")
        if beside.is_file():
            return beside
        hint = f" (there is none beside the weights: {beside})"
    if entry := find(pretrained):
        return ROOT / "configs" / f"{entry.config}.yaml"
    raise UserError(f"give the model's config with -cfg{hint}")


def beside_weights(config, name: str) -> Path:
    """A folder beside the weights of a config; of published ones, in the current folder."""
    weights = config.MODEL.PRETRAINED
    return Path(weights).with_name(name) if "://" not in weights else Path(name)


def load_model(config):
    """The config's model and weights, in evaluation mode; WeightsError if they do not fit."""
    from resmlp import build_resmlp, load_pretrained  # with Paddle, which not all tools need
    from storage.adapt import read_pretrained

    model = build_resmlp(config)
    weights = read_pretrained(config.MODEL.PRETRAINED, config.MODEL.PRETRAINED_KEY)
    load_pretrained(model, config, file=weights)
    model.eval()
    model.classes = weights.classes
    return model


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
  body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2rem auto;
         padding: 0 1rem; }}
  h1 {{ font-size: 1.6rem; }}  h2 {{ font-size: 1.2rem; margin-top: 2.5rem; }}
  img, svg {{ max-width: 100%; height: auto; }}
  table {{ border-collapse: collapse; }}
  th, td {{ padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }}
  th:first-child, td:first-child {{ text-align: left; }}
</style>
<h1>{title}</h1>
{body}
</html>
"""


def html_page(title: str, sections: Iterable[tuple[str, str]]) -> str:
    """A self-contained page: a title, then ``(heading, HTML)`` sections."""
    body = "\n".join(f"<h2>{html.escape(heading)}</h2>\n{text}" for heading, text in sections)
    return _PAGE.format(title=html.escape(title), body=body)


def html_image(path: str | os.PathLike, alt: str) -> str:
    """An ``<img>`` that carries a PNG file inside."""
    data = base64.b64encode(Path(path).read_bytes()).decode("ascii")
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def html_table(header: Iterable, rows: Iterable[Iterable]) -> str:
    def row(cells, tag):
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(c))}</{tag}>" for c in cells) + "</tr>"

    lines = [row(header, "th"), *(row(cells, "td") for cells in rows)]
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def markdown_table(header: Sequence, rows: Iterable[Iterable]) -> str:
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (header, *rows)]
    lines.insert(1, "|---" * len(header) + "|")
    return "\n".join(lines)


def require(what: str, packages: Sequence[str]) -> None:
    """Raises a `UserError` that says what to install."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"{what} needs `pip install {' '.join(missing)}`")


def write_file(path: str | os.PathLike, data: str | bytes) -> None:
    """Writes text (UTF-8) or bytes whole or not at all (UserError); makes the folder."""
    data = data.encode("utf-8") if isinstance(data, str) else data
    if os.path.isfile(path) or not os.path.exists(path):
        write_atomically(data, path)
        return
    try:
        Path(path).write_bytes(data)  # a device or pipe, as /dev/stdout: not to be replaced
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
