"""How the programs speak to whoever runs them: errors in one line, values of config keys.

The modules of this repository have short names, as PPViT's have. Another module of such a name in
the process would be taken for ours, so it is looked for here, before ours are imported.
"""

import sys as _sys
from importlib.util import find_spec as _find_spec
from pathlib import Path as _Path

_NAMES = (  # what the model, training and evaluation are made of
    *("augment", "batch_augment", "config", "cpu", "datasets", "distillation", "engine", "loading"),
    *("losses", "mixup", "model_ema", "optimizer", "parallel", "random_erasing", "resmlp"),
    *("storage", "training", "transforms", "utils"),
)


def _refuse_namesakes() -> None:
    """Raises ImportError where a name of ours means another module."""
    root = _Path(__file__).resolve().parent.parent
    for name in _NAMES:
        try:
            spec = _find_spec(name)
        except ValueError:  # a module that was put together by hand
            spec = None
        place = _Path(spec.origin).resolve() if spec and spec.origin else None
        if place in (root / f"{name}.py", root / name / "__init__.py"):
            continue
        if name in _sys.modules:
            state, remedy = "was imported already", "run ours in a process of its own"
        elif spec:
            state, remedy = "is found first", f"begin with sys.path.insert(0, {str(root)!r})"
        else:
            continue
        raise ImportError(f"another module named {name} ({place or 'no file'}) {state}; {remedy}")


_refuse_namesakes()
