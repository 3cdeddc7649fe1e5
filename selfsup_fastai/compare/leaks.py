"""Has pretraining seen the images that the starts are tested on? Then it is memory that is measured."""

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pandas as pd
from fastai.data.core import DataLoaders, Datasets, TfmdDL, TfmdLists
from fastcore.parallel import num_cpus
from tqdm.auto import tqdm

from selfsup_fastai.data.groups import LEVELS, duplicates_across, pixel_hash, texts_of
from selfsup_fastai.data.loader import check_dls, image_sources
from selfsup_fastai.data.opening import open_image
from selfsup_fastai.data.reasons import BadImage
from selfsup_fastai.data.subsets import subset
from selfsup_fastai.errors import DataError
from selfsup_fastai.messages import say

_ALSO = "instance"  # Of a scan: two copies have the same, whatever window they are seen in
_PLURALS = {"patient": "patients", "study": "studies"}


class Unseen(NamedTuple):
    """What `check_unseen` checked."""

    dls: DataLoaders  # To pretrain on: as given, or without the images that are tested on
    found: dict  # What was compared, and the counts


def check_unseen(
    dls: DataLoaders,  # Images to pretrain on
    labeled: DataLoaders,  # Labeled images; those of `labeled.valid` are tested on
    exclude: bool = False,  # Leave out of pretraining what is tested on, instead of raising
    groups: str | None = None,  # A column that both have, which tells whose an image is, beside patient, study, series
) -> Unseen:
    """Raises `DataError`, with counts only, where images, or patients, of the test set are among those to pretrain on.

    Images are compared by their decoded pixels in full size (a copy in another format without loss is found, one that
    was resized or compressed anew is not), scans by their instance number, too. Test images that are also among the
    labeled training images, or whose patient (study, group) is, are counted and said: splitting them is your choice.
    """
    check_dls(dls)
    check_dls(labeled)
    seen, train = _known(dls.train, "unlabeled"), _known(labeled.train, "labeled")
    test = _known(labeled.valid, "test")
    names = [name for name in (*LEVELS, *([groups] if groups else [])) if name in seen and name in test]
    copies = _rows_of(seen, test, ["pixel_hash", _ALSO])
    related = _rows_of(seen, test, names)
    found = {"checked": _in_words(seen, test, names), "pretraining images": len(seen), "test images": len(test)}
    found |= {"test images seen in pretraining": int(_rows_of(test, seen, ["pixel_hash", _ALSO]).sum())}
    found |= {f"{_PLURALS.get(name, name)} on both sides": len(_shared(seen, test, name)) for name in names}
    found |= _between_labeled(train, test, groups)
    bad = copies | related
    found["left out of pretraining"] = int(bad.sum()) if exclude else 0
    if bad.any() and not exclude:
        raise DataError(_leak(found, int(bad.sum())))
    return Unseen(_without(dls, bad, names if related.any() else []) if bad.any() else dls, found)


def _between_labeled(train: pd.DataFrame, test: pd.DataFrame, groups: str | None) -> dict:
    """Test images that are among the labeled training images, or whose patient is; says how many there are."""
    twice = duplicates_across(train, test)
    again = len({row for rows in twice["valid"] for row in rows})
    if again:
        say(f"{again:,} of {len(test):,} test images are among the labeled training images, too: scores flatter all.")
    found = {"test images that are also labeled training images": again}
    names = [name for name in (*LEVELS, *([groups] if groups else [])) if name in train and name in test]
    if names:
        related = int(_rows_of(test, train, names).sum())
        found["test images of patients or groups that are in labeled training"] = related
        if related:
            what = f"share their {' or '.join(names)} with labeled training images"
            say(f"{related:,} of {len(test):,} test images {what}: scores flatter all. Split by patient, or group.")
    return found


def _leak(found: dict, n: int) -> str:
    both = " on both sides"
    shared = [f"{count:,} {name.removesuffix(both)}" for name, count in found.items() if name.endswith(both) and count]
    also = f"; on both sides: {', '.join(shared)}" if shared else ""
    return (
        f"Pretraining would see the test set: {found['test images seen in pretraining']:,} of {found['test images']:,} "
        f"test images are among those to pretrain on{also}. That concerns {n:,} images to pretrain on. Leave them out: "
        "in the shell with --exclude-tested, in Python "
        "by check_unseen(dls, labeled, exclude=True).dls, or compare_pretexts(..., leaks='exclude')."
    )


def _without(dls: DataLoaders, bad: np.ndarray, names: list[str]) -> DataLoaders:
    """`names`: what is on both sides beside images, such as patients."""
    kept = np.flatnonzero(~bad)
    if not len(kept):
        also = f", or share their {' or '.join(names)} with it" if names else ""
        raise DataError(f"All images to pretrain on are in the test set{also}: none is left.")
    also = f", or share their {' or '.join(names)} with test images" if names else ""
    left = f"{int(bad.sum()):,} of {len(bad):,} images are left out of pretraining"
    say(f"{left}, because they are tested on{also}; {len(kept):,} remain.")
    return DataLoaders(subset(dls.train, kept), *dls.loaders[1:], path=dls.path, device=dls.device)


def _known(dl: TfmdDL, what: str) -> pd.DataFrame:
    """What is known of each image: the sum over its pixels, and who it is of."""
    facts = getattr(dl, "facts", None)
    items = getattr(dl.dataset, "items", None)
    tables = [t for t in (facts, items) if isinstance(t, pd.DataFrame)]
    table = pd.DataFrame(index=range(len(dl.dataset)))
    for known in tables[::-1]:
        table = table.assign(**{str(name): known[name].to_numpy() for name in known.columns})
    hashes = _hashes(dl, what)
    return table.drop(columns="pixel_hash", errors="ignore") if hashes is None else table.assign(pixel_hash=hashes)


def _hashes(dl: TfmdDL, what: str) -> list[str] | None:
    """None where a dataset does not tell what it opens."""
    if not isinstance(dl.dataset, Datasets | TfmdLists):
        return None
    sources = image_sources(dl.dataset)
    if sources is None:
        return None
    with ThreadPoolExecutor(min(8, num_cpus())) as pool:
        hashes = pool.map(_hash, sources)
        return list(tqdm(hashes, f"{what} images", len(dl.dataset), delay=1, disable=None, leave=False))


def _hash(source) -> str:
    """Grey images and grey ones kept in color are the same."""
    try:
        return pixel_hash(np.asarray(open_image(source, n_in=3)))
    except BadImage:
        return ""


def _rows_of(table: pd.DataFrame, other: pd.DataFrame, names: list[str]) -> np.ndarray:
    """Which rows share one of these values with a row of the other table."""
    found = np.zeros(len(table), bool)
    for name in names:
        if name in table and name in other:
            found |= np.isin(texts_of(table[name]), sorted(_shared(table, other, name)))
    return found


def _shared(one: pd.DataFrame, other: pd.DataFrame, name: str) -> set[str]:
    return (set(texts_of(one[name])) & set(texts_of(other[name]))) - {""}


def _in_words(seen: pd.DataFrame, test: pd.DataFrame, names: list[str]) -> str:
    pixels = "pixel_hash" in seen and "pixel_hash" in test
    parts = ["the pixels of all images"] if pixels else []
    parts += [f"the {name} of each image" for name in names]
    if not pixels:
        say("These datasets do not tell what they open, so nobody can check whether pretraining sees the test images.")
    return ", ".join(parts) if parts else "nothing could be checked"
