"""One command line for the mains and the tools: each flag once, in whatever spelling."""

from __future__ import annotations

import argparse
import os
import sys

from cli.errors import ConfigError


def _text(value: str) -> str:
    if not value:
        raise argparse.ArgumentTypeError("is empty; leave it out, or give it a value")
    return value


def _path(value: str) -> str:
    return os.path.expanduser(_text(value))


class Parser(argparse.ArgumentParser):
    """Flags with one dash or two, with ``_`` or ``-``; a mistake is one line. A value whose
    ``metavar`` is FILE or DIR is a path: ``~`` is expanded.
    """

    def __init__(self, description: str):
        super().__init__(
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self._names: set[str] = set()
        self._part = self

    def group(self, title: str) -> None:
        self._part = self.add_argument_group(title)

    def flag(self, name: str, help: str, **kwargs) -> None:
        """Adds a flag, spelled with one dash and ``_`` in the help."""
        if "action" not in kwargs or kwargs["action"] == "extend":
            is_path = kwargs.get("metavar") in ("FILE", "DIR")
            kwargs.setdefault("type", _path if is_path else _text)
        default = kwargs.get("default")
        if default and "default" not in help:
            shown = " ".join(default) if isinstance(default, (list, tuple)) else default
            help += f" (default: {shown})"
        self._names.add(name)
        kwargs.setdefault("dest", name)
        self._part.add_argument(f"-{name}", help=help, **kwargs)

    def paths(self, name: str, help: str, **kwargs) -> None:
        """Adds a path, or several with ``nargs``, that stand without a flag."""
        self.add_argument(name, help=help, type=_path, **kwargs)

    def model_flags(self) -> None:
        """Adds the flags that name a trained model: ``-pretrained``, ``-cfg``, ``-opts``."""
        self.flag("pretrained", "weight file or checkpoint, or a name of the zoo", metavar="FILE")
        self.flag("cfg", "YAML config (default: config.yaml beside the weights)", metavar="FILE")
        self.opts_flag("config keys: -opts DATA.CROP_PCT 0.9 ...")

    def opts_flag(self, help: str) -> None:
        """Adds ``-opts``; given twice, it takes the keys of both."""
        help += " (`python config.py` prints all keys)"
        options = dict(action="extend", nargs="+", metavar="KEY VALUE", default=[])
        self.flag("opts", help, type=str, **options)

    def parse_known_args(self, args=None, namespace=None):
        """As in argparse, after every flag was brought to the spelling of the help."""
        args = list(sys.argv[1:] if args is None else args)
        end = args.index("--") if "--" in args else len(args)
        args[:end] = [self._respell(arg) for arg in args[:end]]
        return super().parse_known_args(args, namespace)

    def _respell(self, arg: str) -> str:
        head, equals, value = arg.partition("=")
        dashes = len(head) - len(head.lstrip("-"))
        name = head[dashes:].replace("-", "_")
        return f"-{name}{equals}{value}" if dashes in (1, 2) and name in self._names else arg

    def error(self, message: str):
        raise ConfigError(f"command line: {message} (see -h)")
