"""What ends a command, in one line and an exit code."""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from functools import wraps

import typer

from selfsup_fastai.errors import SelfsupError


class Terminated(KeyboardInterrupt):
    """SIGTERM, so that what Ctrl-C saves is saved then, too."""


def reported(command: Callable) -> Callable:
    """Turns what can end a command into one line and an exit code."""

    @wraps(command)
    def run(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt as stop:
            line, code = "stopped", 143 if isinstance(stop, Terminated) else 130
        except (typer.Exit, typer.BadParameter, BrokenPipeError):
            raise  # typer's own affair; where nobody reads on it ends quietly
        except Exception as error:
            if "--debug" in sys.argv:
                traceback.print_exc()
            expected = isinstance(error, SelfsupError | OSError)
            said = str(error).rpartition(":\n\t")[2]  # without fastai's line about the callback that it came through
            line = said if expected else f"{type(error).__name__}: {said} (selfsup --debug shows where)"
            code = 1
        typer.echo(f"selfsup: {line}", err=True)
        raise typer.Exit(code)

    return run


def terminate(*_):
    """The handler of SIGTERM."""
    if multiprocessing.parent_process():  # a worker that opens images inherits this handler; it has nothing to save
        os._exit(143)
    raise Terminated
