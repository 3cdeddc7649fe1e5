"""The errors that a user can cause: each a `ValueError` that says what arrived, what was expected and what to do.

SelfsupError
├── UnknownNameError    a task, an architecture, an option that does not exist (the nearest name is suggested)
├── DataError           a folder, file, array or DataFrame that cannot be used as it is
├── EncoderFileError    a saved encoder that is damaged, foreign, or does not fit
├── ResumeError         the state of a killed run that is damaged, or of another run
├── LostProcessError    another process of a run on several has ended
└── TaskError           images or settings that a pretext task or a fine-tuning run cannot work with
"""

from collections.abc import Iterable
from difflib import get_close_matches


class SelfsupError(ValueError):
    """The root of every error that `selfsup_fastai` raises on purpose."""


class UnknownNameError(SelfsupError):
    """A name that is in no table."""


class DataError(SelfsupError):
    """Images that are not there, or not in a form that can be used."""


class EncoderFileError(SelfsupError):
    """A file that is no encoder of ours, is damaged, or does not fit where it is to be used."""


class ResumeError(SelfsupError):
    """A state that is damaged, or of another run than the one that should go on."""


class LostProcessError(SelfsupError):
    """Another process that trains the same model has ended."""


class TaskError(SelfsupError):
    """Images or settings that the chosen task cannot work with."""


def unknown(
    kind: str,  # What was being named: 'task', 'architecture', ...
    name: object,  # What the user wrote
    known: Iterable[str],  # The names that exist
) -> UnknownNameError:
    """The error for a name that does not exist: the nearest names first; all of them where they are few."""
    known = list(known)
    names = f" Known: {', '.join(sorted(known))}." if len(known) <= 40 else ""
    return UnknownNameError(f"There is no {kind} called {name!r}.{did_you_mean(name, known)}{names}")


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """A question that names the nearest of the known names; empty where none is near."""
    near = get_close_matches(str(name).lower(), [k for k in known if isinstance(k, str)], n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
