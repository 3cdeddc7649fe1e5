"""Slices in the order in which they lie in the body, and what does not make a volume.

By position along the normal of the slices; never by file name or slice location. Everything here works on the table
that `scan_dicoms` returns; no file is opened. Series are named by their pseudonyms only.
"""

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from selfsup_fastai.data.slice_facts import SliceFacts
from selfsup_fastai.errors import DataError

__all__ = ["PROBLEMS", "Volume", "neighbors", "slices_of", "volume_report", "volumes_of"]

PROBLEMS = {
    "few": "Places with a slice; a volume has three at least.",
    "unordered": "Slices without position or orientation, in the order of their numbers.",
    "orientations": "Orientations in the series; each has a stack of its own.",
    "duplicates": "Slices left out, as others are at their places.",
    "gaps": "Steps that are not as long as the median one.",
    "tilt": "Degrees between the normal of the slices and the direction in which they are stacked.",
    "shifted": "Slices beside the line on which the others are stacked.",
    "frames": "Frames of one file, whose places the table does not tell.",
}
"""Every key of `Volume.problems`, and what its number counts."""

_STEP = {"rtol": 0.05, "atol": 0.1}  # steps (mm) that count as equal
_SAME = 1e-3  # mm between slices at one place
_TURN = 1e-3  # between direction cosines of one orientation
_ASIDE = 1.0  # mm off the line
_TILT = 1.0  # degrees that rounded positions do not explain


@dataclass(frozen=True)
class Volume:
    """One stack of slices, in order. Whether it is a volume says `is_volume`."""

    rows: list  # Index labels of the table, in order along the normal
    series: str  # Pseudonym
    part: int = 0  # Number among the stacks of the series: orientations, echoes, time points
    plane: str = ""  # As in the table
    positions: tuple[float, ...] = ()  # Of the rows along the normal (mm); () where they are not known
    forward: bool = True  # The normal points to the left, back or head of the patient, not to the right, front or feet
    problems: dict[str, int] = field(default_factory=dict)  # Keys of `PROBLEMS`, with counts
    left_out: list = field(default_factory=list)  # Index labels of duplicates

    @property
    def is_volume(self) -> bool:
        """At least three slices of one orientation at known places on one line; steps may differ."""
        return not {"few", "unordered", "shifted", "frames"} & set(self.problems)

    @property
    def is_even(self) -> bool:
        """A volume with equal steps along its normal: what can be stacked to a right-angled array."""
        return self.is_volume and not {"gaps", "tilt"} & set(self.problems)

    @property
    def spacing(self) -> float:
        """The usual (median) distance from slice to slice along the normal in mm; NaN where there is none."""
        return _usual(np.diff(self.positions)) if len(self.positions) > 1 else float("nan")

    @property
    def relative(self) -> np.ndarray:
        """Where in the volume each slice is: 0 at the right, front or foot end, 1 at the left, back or head end."""
        share = (np.array(self.positions) - self.positions[0]) / (self.positions[-1] - self.positions[0])
        return share if self.forward else 1 - share


def volumes_of(
    table: pd.DataFrame,  # What `scan_dicoms` returns: one row a file
) -> list[Volume]:
    """Every stack of slices, in the order of the table. Each row is in one of them, in `rows` or in `left_out`.

    Slices are of one stack if series, orientation, height, width and echo time are the same. They are sorted by signed
    position along the normal, row direction x column direction. Where most places are taken again and again (fMRI,
    perfusion, phases of the heart) a stack is divided by image type, by acquisition, or else by repetition in the order
    of the instance numbers: into time points. Where only few are, the first slice stays and the others are duplicates,
    as is the same instance in another file. Acquisitions are also parted where steps are even in each and not in all
    together; else they stay together (some scanners count one for each turn of the tube). Slices without position or
    orientation go by number, and are no volume.

    Frames of one file are out of scope: the table has one row for all of them, and not their positions. Such a file is
    a stack of its own here, and no volume.
    """
    facts = SliceFacts(table)
    stacks = []
    for series in _grouped(np.arange(facts.n), facts.series):
        turns = _turns(facts, series)
        n_turns = len(set(turns) - {-1})
        problems = {"orientations": n_turns} if n_turns > 1 else {}
        keys = [(turn, *facts.key(i)) for turn, i in zip(turns, series)]
        found = [one for at in _grouped(series, keys) for one in _of_stack(facts, at, problems)]
        stacks += [replace(one, part=part) for part, one in enumerate(found)]
    return stacks


def _grouped(at: np.ndarray, keys: Iterable[Hashable]) -> list[np.ndarray]:
    """Parts with the same key, in the order in which keys come."""
    groups: dict[Hashable, list[int]] = {}
    for i, key in zip(at.tolist(), keys):
        groups.setdefault(key, []).append(i)
    return [np.array(group) for group in groups.values()]


def _turns(facts: SliceFacts, series: np.ndarray) -> list[int]:
    """A number for the orientation of each slice; -1 where position or orientation is missing."""
    known: list[np.ndarray] = []
    turns = {}
    for i in sorted(series[facts.known[series]].tolist(), key=lambda i: facts.orientation[i].tolist()):
        turn = facts.orientation[i]
        near = (j for j in reversed(range(len(known))) if np.abs(known[j] - turn).max() <= _TURN)
        turns[i] = next(near, len(known))
        known += [turn] if turns[i] == len(known) else []
    return [turns.get(i, -1) for i in series.tolist()]


def _of_stack(facts: SliceFacts, at: np.ndarray, problems: dict[str, int]) -> list[Volume]:
    """Of slices of one orientation and size."""
    at = at[np.argsort(facts.number[at], kind="stable")]
    if facts.frames[at[0]] > 1:
        return [_plain(facts, at, at[:0], problems | {"frames": int(facts.frames[at[0]])})]
    at, copies = _first_of(at, [facts.instance[i] or i for i in at])
    if not facts.known[at[0]]:
        return [_plain(facts, at, copies, problems | {"unordered": len(at)})]
    normal = np.cross(facts.orientation[at[0]][:3], facts.orientation[at[0]][3:])
    facts.along[at] = facts.position[at] @ (normal / np.linalg.norm(normal))
    forward = bool(normal[np.abs(normal).argmax()] > 0)
    found = []
    for part, left in _parts(facts, at):
        here = {facts.instance[i] for i in [*part, *left]}
        left = np.concatenate([left, [i for i in copies if facts.instance[i] in here]]).astype(int)
        found.append(_sorted(facts, part, left, forward, problems))
    return found


def _first_of(at: np.ndarray, keys: Iterable[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """The first with each key, and the others."""
    groups = _grouped(np.arange(len(at)), keys)
    is_first = np.isin(np.arange(len(at)), [group[0] for group in groups])
    return at[is_first], at[~is_first]


def _parts(facts: SliceFacts, at: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Stacks with one slice at each place, each with the duplicates left out of it."""
    places = _places(facts, at)
    n, repeated = len(set(places)), _n_repeated(places)
    if n < 3:  # nothing to be put in order
        yield at, at[:0]
    elif repeated == 0:
        yield from ((part, at[:0]) for part in _even_acquisitions(facts, at))
    elif 2 * repeated < n:
        yield _first_of(at, places)
    else:
        for part in _repetitions(facts, at, places):
            yield from _parts(facts, part)


def _places(facts: SliceFacts, at: np.ndarray) -> list[int]:
    """Numbers of the places along the normal, the same for slices at one place."""
    order = np.argsort(facts.along[at], kind="stable")
    places = np.empty(len(at), int)
    places[order] = np.cumsum(np.diff(facts.along[at][order], prepend=-np.inf) > _SAME)
    return places.tolist()


def _n_repeated(places: list[int]) -> int:
    return int((np.bincount(places) > 1).sum())


def _even_acquisitions(facts: SliceFacts, at: np.ndarray) -> list[np.ndarray]:
    """By acquisition if steps are even in each and not in all together."""
    parts = _grouped(at, facts.acquisition[at])
    parted = len(parts) > 1 and not _is_even(facts, at) and all(len(p) >= 3 and _is_even(facts, p) for p in parts)
    return parts if parted else [at]


def _is_even(facts: SliceFacts, at: np.ndarray) -> bool:
    return _n_uneven(np.diff(np.sort(facts.along[at]))) == 0


def _usual(steps: np.ndarray) -> float:
    """The median; of an even number the lower one, as between the two there may be no step."""
    return float(np.sort(steps)[(len(steps) - 1) // 2])


def _n_uneven(steps: np.ndarray) -> int:
    return int((~np.isclose(steps, _usual(steps), **_STEP)).sum())


def _repetitions(facts: SliceFacts, at: np.ndarray, places: list[int]) -> list[np.ndarray]:
    """By image type or acquisition if that leaves fewer places repeated in each part; else by repetition."""
    for values in (facts.image_type, facts.acquisition):
        parts = _grouped(at, [values[i] for i in at])
        of_parts = [_places(facts, part) for part in parts]
        if len(parts) > 1 and all(len(set(of)) >= 3 and _n_repeated(of) < _n_repeated(places) for of in of_parts):
            return parts
    counts = dict.fromkeys(places, 0)
    times = []
    for place in places:  # in the order of the instance numbers
        times.append(counts[place])
        counts[place] += 1
    return _grouped(at, times)


def _plain(facts: SliceFacts, at: np.ndarray, left: np.ndarray, problems: dict[str, int]) -> Volume:
    """Slices whose places are not known."""
    counts = problems | {"duplicates": len(left), "few": len(at) if len(at) < 3 else 0}
    rows, left_out = ([facts.rows[i] for i in some] for some in (at, left))
    problems = {name: n for name, n in counts.items() if n}
    return Volume(rows, facts.name[at[0]], plane=facts.plane[at[0]], problems=problems, left_out=left_out)


def _sorted(facts: SliceFacts, at: np.ndarray, left: np.ndarray, forward: bool, problems: dict[str, int]) -> Volume:
    """Slices in the order of their places."""
    at = at[np.argsort(facts.along[at], kind="stable")]
    along, n_places = facts.along[at], len(set(_places(facts, at)))
    if n_places < 3:
        counts = {"few": n_places}
    else:
        counts = {"gaps": _n_uneven(np.diff(along)), **_off_line(along, facts.position[at])}
    plain = _plain(facts, at, left, problems)
    found = plain.problems | {name: n for name, n in counts.items() if n}
    return replace(plain, positions=tuple(along.tolist()), forward=forward, problems=found)


def _off_line(along: np.ndarray, points: np.ndarray) -> dict[str, int]:
    """Degrees of tilt, and the slices that are not where a straight stack has them."""
    way, share = points[-1] - points[0], (along - along[0]) / (along[-1] - along[0])
    degrees = np.degrees(np.arccos(np.clip((along[-1] - along[0]) / np.linalg.norm(way), -1, 1)))
    aside = np.linalg.norm(points - points[0] - share[:, None] * way, axis=1)  # (n,)
    return {"tilt": round(degrees) if degrees > _TILT else 0, "shifted": int((aside > _ASIDE).sum())}


def slices_of(
    volumes: pd.DataFrame | list[Volume],  # What `volumes_of` returns, or a table
) -> pd.DataFrame:
    """A row for each slice of a true volume: row (index label), volume (number), place (0 to n-1), position (0 to 1).

    Places count along the normal. Positions are shares of the way in mm, in one direction for all volumes of a plane:
    from right to left, front to back, feet to head (of what the volume shows, not of the body).
    """
    columns = {"row": [], "volume": [], "place": [], "position": []}
    for number, volume in _true(volumes):
        columns["row"] += volume.rows
        columns["volume"] += [number] * len(volume.rows)
        columns["place"] += range(len(volume.rows))
        columns["position"] += volume.relative.tolist()
    return pd.DataFrame(columns).astype({"volume": int, "place": int, "position": float})


def neighbors(
    volumes: pd.DataFrame | list[Volume],  # What `volumes_of` returns, or a table
    n: int = 3,  # Slices in a run, at least 3: what a step is shows beside another one
) -> pd.DataFrame:
    """Every run of `n` slices that follow each other in a true volume by equal steps: none reaches over a gap.

    The columns of `slices_of`, for the middle slice (of an even number the later one), and rows: the index labels of
    all `n`, in order along the normal: (previous, itself, next).
    """
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 3:
        raise DataError(f"n is the number of slices in a run, an integer from 3 up; got {n!r}.")
    found = []
    for number, volume in _true(volumes):
        steps, relative = np.diff(volume.positions), volume.relative
        for start in range(len(volume.rows) - n + 1):
            place = start + n // 2
            run = {"rows": tuple(volume.rows[start : start + n]), "row": volume.rows[place], "volume": number}
            if np.isclose(steps[start : start + n - 1], steps[start], **_STEP).all():
                found.append(run | {"place": place, "position": relative[place]})
    return pd.DataFrame(found, columns=["row", "volume", "place", "position", "rows"])


def _true(volumes: pd.DataFrame | list[Volume]) -> list[tuple[int, Volume]]:
    """Those that are volumes, with their numbers among all."""
    volumes = volumes_of(volumes) if isinstance(volumes, pd.DataFrame) else volumes
    return [(number, volume) for number, volume in enumerate(volumes) if volume.is_volume]


def volume_report(
    volumes: pd.DataFrame | list[Volume],  # What `volumes_of` returns, or a table
) -> pd.DataFrame:
    """A row for each stack: series (pseudonym), part, plane, slices, spacing (mm), volume (is it one?), problems."""
    volumes = volumes_of(volumes) if isinstance(volumes, pd.DataFrame) else volumes
    rows = [
        {
            "series": volume.series,
            "part": volume.part,
            "plane": volume.plane,
            "slices": len(volume.rows),
            "spacing": round(volume.spacing, 3),
            "volume": volume.is_volume,
            "problems": ", ".join(f"{name}: {n}" for name, n in volume.problems.items()),
        }
        for volume in volumes
    ]
    return pd.DataFrame(rows, columns=["series", "part", "plane", "slices", "spacing", "volume", "problems"])
