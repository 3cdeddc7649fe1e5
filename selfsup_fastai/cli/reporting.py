"""What ends a command, in one line and an exit code."""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from functools import wraps

import typer

from selfsup_fastai.errors import LostProcessError, SelfsupError

LAUNCHED = "SELFSUP_LAUNCHED"  # Set where `selfsup --nproc` started this process
LOST = 75  # Exit code of such a process that has lost another one


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
            _leave_quietly(code)
        except (typer.Exit, typer.BadParameter, BrokenPipeError):
            raise  # typer's own affair; where nobody reads on it ends quietly
        except Exception as error:
            if "--debug" in sys.argv:
                traceback.print_exc()
            expected = isinstance(error, SelfsupError | OSError)
            said = str(error).rpartition(":\n\t")[2]  # without fastai's line about the callback that it came through
            line = said if expected else f"{type(error).__name__}: {said} (selfsup --debug shows where)"
            code = 1
            if isinstance(error, LostProcessError):
                _leave_quietly(LOST)
        typer.echo(f"selfsup: {line}", err=True)
        raise typer.Exit(code)

    return run


def _leave_quietly(code: int) -> None:
    """If this is one of several processes that a command started (`runs.launching`): it tells what happened.

    At once, as others may be gone: nobody is to be waited for.
    """
    if LAUNCHED in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def terminate(*_):
    """The handler of SIGTERM."""
    if multiprocessing.parent_process():  # a worker that opens images inherits this handler; it has nothing to save
        os._exit(143)
    raise Terminated
