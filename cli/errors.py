"""Errors that a user can mend, and how a script shows them: one line and a non-zero exit."""

from __future__ import annotations

import logging
import os
import sys
from typing import Callable

from cli.progress import line_start


class UserError(Exception):
    """A mistake of the user's; the message says what, where, and how to mend it."""


class ConfigError(UserError, ValueError):
    """An unknown config key, a wrong type, an impossible value."""


class DataError(UserError):
    """A data folder, list file or image that cannot be used."""


class WeightsError(UserError):
    """A weight file that cannot be read safely or does not fit the model."""


class CheckpointError(UserError):
    """A training checkpoint that cannot be written, read or resumed from."""


class TrainingError(UserError):
    """Training cannot go on: a loss or gradient is not finite. All ranks raise it together."""


def run_as_script(main: Callable[[], int | None]) -> None:
    """Calls ``main`` and exits: 0 (or its return value), 2 on a `UserError`, 130 on Ctrl-C."""
    if sys.stdout is None:  # closed from the start (`>&-`): nobody wants to hear it
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (to the very end)
    if hasattr(sys.stdout, "reconfigure"):  # names that it cannot encode are shown escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    log = logging.getLogger("resmlp")  # until a run opens its own: bare lines, not Paddle's form
    log.propagate = False
    log.addHandler(logging.StreamHandler())
    try:
        code = main()
    except UserError as error:
        print(f"{line_start(sys.stderr)}error: {error}", file=sys.stderr, flush=True)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # `... | head` closed our output: nothing left to say
        sys.stderr.close()
        code = 0
    sys.exit(code)
