"""One line to the person at the screen.

Lines go to stderr through the logger `selfsup_fastai`, so `logging.getLogger('selfsup_fastai').setLevel('WARNING')`
silences them. They never carry a file name or a value read from a file: those may identify a patient.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

_logger = logging.getLogger("selfsup_fastai")


class _CurrentStderr(logging.StreamHandler):
    """Writes to whatever `sys.stderr` is now: notebooks and tests replace it."""

    @property
    def stream(self):
        return sys.stderr

    @stream.setter
    def stream(self, _value): ...

    def emit(self, record):
        """Above a bar that is drawn just then, not into it."""
        with tqdm.external_write_mode(self.stream):
            super().emit(record)


if not _logger.handlers:
    _logger.addHandler(_CurrentStderr())
    _logger.setLevel(logging.INFO)
    _logger.propagate = False


def say(text: str) -> None:
    """Tell the user something worth knowing that is not an error."""
    _logger.info(text)


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing is said inside: for work that is one step of many."""
    level = _logger.level
    _logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        _logger.setLevel(level)
