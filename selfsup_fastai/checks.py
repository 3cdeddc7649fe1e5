"""Whether what a user gave for a setting makes sense: for constructors, which refuse it before anything is run."""

import math
from collections.abc import Sequence
from numbers import Integral, Real

from selfsup_fastai.errors import TaskError, did_you_mean


def check_number(
    name: str,  # Of the setting
    value: object,  # What the user gave
    least: float = -math.inf,
    most: float = math.inf,
    *,
    above: float = -math.inf,  # Like `least`, itself left out
    below: float = math.inf,  # Like `most`, itself left out
    whole: bool = False,  # Integers only
) -> None:
    """Raises `TaskError` unless a setting is a finite number in its range."""
    is_number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    if is_number and least <= value <= most and above < value < below:
        return
    limits = {"at least": least, "above": above, "at most": most, "below": below}
    said = " and ".join(f"{word} {limit:,}" for word, limit in limits.items() if math.isfinite(limit))
    raise TaskError(f"{name} is a {'whole ' if whole else ''}number, {said}; got {value!r}.")


def check_flag(name: str, value: object) -> None:
    """Raises `TaskError` unless a setting is True or False: any other text would count as True."""
    if not isinstance(value, bool):
        raise TaskError(f"{name} is True or False, got {value!r}.")


def check_choice(name: str, value: object, choices: Sequence[str | None]) -> None:
    """Raises `TaskError` unless a setting is one of these."""
    if value not in choices:
        *others, last = map(repr, choices)
        hint = did_you_mean(value, [choice for choice in choices if choice])
        raise TaskError(f"{name} is {', '.join(others)} or {last}; got {value!r}.{hint}")
