"""Loaders: items seeded one by one, the index along where it is needed, and new loaders derived from given ones."""

import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from copy import copy
from inspect import signature
from typing import TypeVar

import numpy as np
import pandas as pd
import torch
from fastai.data.core import DataLoaders, Datasets, TfmdDL, TfmdLists
from fastai.data.load import DataLoader, fa_collate
from fastai.data.transforms import IntToFloatTensor, Normalize, ToTensor
from fastai.torch_core import TensorBase, TensorImage
from fastai.vision.augment import Resize, ResizeMethod
from fastai.vision.core import AddMaskCodes, PILImageBW, PointScaler
from fastcore.basics import chunked
from fastcore.foundation import L
from fasttransform import Pipeline, Transform

from selfsup_fastai.data.blocks import Cover, OpenCovered, OpenImage, TensorGrey, draw_corner
from selfsup_fastai.data.companions import Companions, TensorCompanion
from selfsup_fastai.data.opening import image_size, open_image
from selfsup_fastai.data.pixels import LUMA, is_grey
from selfsup_fastai.data.pixelstore import PixelStore, deep_to_255
from selfsup_fastai.data.shards import mixed_order
from selfsup_fastai.errors import DataError
from selfsup_fastai.memory import keep_freed_memory
from selfsup_fastai.messages import say
from selfsup_fastai.processes import n_processes, rank
from selfsup_fastai.seeding import VALID_SEED, item_seed, preserved_rng, seed_all, seeded_item
from selfsup_fastai.transfer import constant

T = TypeVar("T")


class TensorIndex(TensorBase):
    """The place of each image in its dataset, (B,) int64."""


_PER_ITEM = ("create_item", "do_item", "create_batch", "do_batch", "retain")
"""What a user may replace in a loader to change how batches are made of items."""


class IndexedDL(TfmdDL):
    """A `TfmdDL` whose items do not depend on the number of workers, and that can carry each item's index along.

    With the pixels of its images in a store, a batch is one gather, and no worker process is started. The same images,
    order and pixels come out as without: an item pipeline that does more than to open and to cut takes the slow road.

    What else is known of the images, such as whose they are, are its `facts`. An image may bring others of its dataset
    along (`companions`): they are opened and cut by the very draws that it is cut by, and follow it in the batch.

    Where several processes train (`take_part`), all draw the same order, and each has its part of every batch.
    Loaders that are made of this one have all images.
    """

    with_index = False  # True: the last element of every batch is a `TensorIndex`
    companions: Companions | None = None  # Each is a `TensorCompanion` behind the images of a batch
    part: tuple[int, int] | None = None  # Of several processes: the number of this one, from 0, and how many there are

    def __init__(
        self,
        dataset,
        *args,
        store: PixelStore | None = None,  # Pixels of the images, or None
        rows: Iterable[int] | None = None,  # Where in `store` each image of `dataset` is
        facts: pd.DataFrame | None = None,  # Row i: what is known of image i of `dataset`
        **kwargs,
    ):
        self.store, self.facts = store, facts
        self.rows = None if rows is None else np.asarray(rows)
        images = _images_of(dataset)
        self.stored = list(images.items) if images else []  # Which they are: datasets can be changed in place
        super().__init__(dataset, *args, **kwargs)
        self.slow_workers = self.fake_l.num_workers

    @property
    def is_training(self) -> bool:
        """Whether this loader serves the training split; without a split, whether it shuffles."""
        split = getattr(self.dataset, "split_idx", None)
        return self.shuffle if split is None else split == 0

    @property
    def is_fast(self) -> bool:
        """Whether batches are gathered from the store."""
        if self.store is None or self.prebatched or self._window is None:
            return False
        own = all(getattr(getattr(self, name), "__func__", None) is getattr(IndexedDL, name) for name in _PER_ITEM)
        return own and torch.utils.data.get_worker_info() is None  # a worker process must not touch the GPU

    @property
    def _window(self) -> tuple[int, int] | None:
        """Height and width of what is cut from the stored images, where that is all that is done to them."""
        images = _images_of(self.dataset)
        tfms = [t for t in [*self.after_item.fs, *self.before_batch.fs] if not _is_plain(t)]
        if images is None or [type(t) for t in tfms] != [Cover] or [type(t) for t in images.tfms.fs] != [OpenCovered]:
            return None
        opener = images.tfms.fs[0]
        same = len(self.rows) == len(self.dataset) and opener.n_in == self.store.n_in and opener.size == tfms[0].size
        return tfms[0].size if same else None

    def new(self, dataset=None, cls=None, **kwargs):
        kwargs = {"num_workers": self.slow_workers, **kwargs}
        if issubclass(cls or type(self), IndexedDL) and self._has_items_of(dataset):
            if "store" not in kwargs and self.store is not None:
                kwargs |= {"store": self._store_for(dataset), "rows": self.rows}
            kwargs = {"facts": self.facts, **kwargs}
        return super().new(dataset, cls, **kwargs)

    def over(self, source: "IndexedDL", places: Iterable[int], split: int | None = None, **kwargs) -> "IndexedDL":
        """This loader, its transforms and its split, or another, over the images at `places` of the dataset of another
        or its own.

        `kwargs`: what else is to be new. Raises `DataError` for datasets other than fastai's: their items are hidden.
        """
        images = source.dataset
        if not isinstance(images, (Datasets, TfmdLists)):
            raise DataError(f"Images can be chosen from fastai's Datasets only, not from {type(images).__name__}.")
        places, split = list(places), getattr(self.dataset, "split_idx", None) if split is None else split
        parts = images.tls if isinstance(images, Datasets) else [images]
        parts = [part._new(items_at(part, places), split_idx=split) for part in parts]
        chosen = Datasets(tls=L(parts), n_inp=images.n_inp) if isinstance(images, Datasets) else parts[0]
        rows = None if source.rows is None else source.rows[places]
        facts = None if source.facts is None else source.facts.iloc[places]
        return self.new(chosen, store=source.store, rows=rows, facts=facts, **kwargs)

    def take_part(self, training: bool) -> None:
        """From now on batches are the part of this process: k-th of n, it has rows k * bs to (k + 1) * bs of n * bs.

        In training a last short batch is dropped, so all parts are equal; in validation each image comes once, and
        parts of the last batch differ by one image at most.
        """
        self.part = rank(), n_processes()
        self.drop_last = training
        if not training:
            self.bs = none_left_out(self.n, self.bs)

    def get_idxs(self) -> list[int]:
        idxs = super().get_idxs()
        return idxs if self.part is None else self._own(idxs)

    def __len__(self) -> int:
        return super().__len__() if self.part is None else -(-len(self._own(range(self.n))) // self.bs)  # rounded up

    def _own(self, idxs: Sequence[int]) -> list[int]:
        (k, n), whole = self.part, self.bs * self.part[1]
        full = len(idxs) - len(idxs) % whole
        own = [i for start in range(k * self.bs, full, whole) for i in idxs[start : start + self.bs]]
        rest = [] if self.drop_last else idxs[full:]
        return own + list(rest[len(rest) * k // n : len(rest) * (k + 1) // n])

    def _has_items_of(self, dataset) -> bool:
        if (self.store is None and self.facts is None) or dataset is None or dataset is self.dataset:
            return True
        others = _images_of(dataset)
        return others is not None and len(others) == len(self.stored) and self._unchanged(others, range(len(others)))

    def _unchanged(self, images: TfmdLists, samps: Iterable[int]) -> bool:
        return all(images.items[s] is self.stored[s] for s in samps)

    def _store_for(self, dataset) -> PixelStore | None:
        images = _images_of(self.dataset if dataset is None else dataset)
        if images is None:  # no opener is left in it
            return None
        n_in = getattr(images.tfms.fs[-1], "n_in", None)
        return self.store.with_channels(n_in) if n_in else None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "store": None, "stored": []}  # pixels do not travel

    def before_iter(self):
        super().before_iter()
        random_pass = self.is_training and self.shuffle  # an unshuffled pass is an evaluation: it must repeat
        self.pass_seed = self.rng.getrandbits(62) if random_pass else VALID_SEED

    def shuffle_fn(self, idxs: list[int]) -> list[int]:
        """A random order; of images in shards one that goes from shard to shard."""
        images = _images_of(self.dataset)
        order = mixed_order(images.items, idxs, self.rng) if images else None
        return super().shuffle_fn(idxs) if order is None else order

    def __iter__(self):
        if self.is_fast and not self._pins:
            keep_freed_memory()
        with self.fake_l.no_multiproc() if self.is_fast else nullcontext():
            yield from super().__iter__()

    def do_item(self, s):
        s_all = [s, *self._companions_of([s or 0])[:, 0].tolist()]
        items = [self._seeded(one, s or 0) for one in s_all]
        if any(item is None for item in items):
            return None
        item, *others = items
        if not others and not self.with_index:
            return item
        image, *labels = item if isinstance(item, tuple) else (item,)
        others = [_first(other).as_subclass(TensorCompanion) for other in others]
        return (image, *others, *labels, *([TensorIndex(s or 0)] if self.with_index else []))

    def _seeded(self, s: int | None, by: int):
        """Item `s`, whatever is random about it drawn as for item `by`."""
        with seeded_item(getattr(self, "pass_seed", VALID_SEED), by):
            return super().do_item(s)

    def _companions_of(self, samps: list[int]) -> np.ndarray:
        """(companions of an image, B): places in the dataset."""
        if self.companions is None:
            return np.empty((0, len(samps)), int)
        return self.companions.of(samps, getattr(self, "pass_seed", VALID_SEED)).T

    def create_batches(self, samps):
        if not self.is_fast:
            yield from super().create_batches(samps)
            return
        pixels = ((samps, self._pixels(samps)) for samps in chunked((s or 0 for s in samps), self.bs, self.drop_last))
        for samps, xs in _ahead(pixels) if self._pins else pixels:
            yield self.do_batch(list(map(self.do_item, samps))) if xs is None else self._batch(samps, xs)

    def _pixels(self, samps: list[int]) -> list[torch.Tensor] | None:
        """The images of a batch and their companions, on their way to a GPU; None if others have taken their places in
        the dataset."""
        wanted, images = [samps, *self._companions_of(samps)], _images_of(self.dataset)
        if not all(self._unchanged(images, places) for places in wanted):
            return None
        return [self._cut(places, samps) for places in wanted]

    def _cut(self, places: list[int] | np.ndarray, samps: list[int]) -> torch.Tensor:
        """The images at `places`, as windows drawn for those at `samps`."""
        rows, size = self.rows[places], self._window
        x = self.store.gather(rows, self._corners(samps, rows, size), size, pin=self._pins)
        x = x.to(self.device, non_blocking=True) if self._pins else x
        return deep_to_255(x) if self.store.deep else x

    def _batch(self, samps: list[int], xs: list[torch.Tensor]) -> tuple:
        """A batch as `do_batch` would make it of the same items."""
        x, *others = xs
        batch = ((TensorImage if self.store.n_in == 3 else TensorGrey)(x), *map(TensorCompanion, others))
        if isinstance(self.dataset, Datasets) and len(self.dataset.tls) > 1:
            batch += self._labels(samps)
        return (*batch, TensorIndex(torch.tensor(samps))) if self.with_index else batch

    def _labels(self, samps: list[int]) -> tuple:
        labels = []
        for s in samps:
            with seeded_item(self.pass_seed, s):
                labels.append([tl[s] for tl in self.dataset.tls[1:]])
        return tuple(map(fa_collate, zip(*labels)))

    @property
    def _pins(self) -> bool:
        return self.device is not None and self.device.type == "cuda"

    def _corners(self, samps: list[int], rows: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """(B, 2) top and left of the windows: those that `Cover` would draw."""
        left_over = self.store.shapes(rows) - size
        still = any(t.still for t in [*self.after_item.fs, *self.before_batch.fs] if isinstance(t, Cover))
        centered = still or getattr(self.dataset, "split_idx", None)
        corners = left_over // 2 if centered else np.zeros_like(left_over)
        if not centered:
            rng = random.Random()
            for i in np.flatnonzero(left_over.any(axis=1)):
                rng.seed(item_seed(self.pass_seed, samps[i]))
                corners[i] = draw_corner(left_over[i].tolist(), rng)
        return corners


def items_at(part: TfmdLists, places: list[int]):
    """Some of its items: a list, or rows of a table where it is made of one."""
    return part.items.iloc[places] if hasattr(part.items, "iloc") else [part.items[i] for i in places]


def _first(item: T | tuple[T, ...]) -> T:
    """The image of an item."""
    return item[0] if isinstance(item, tuple) else item


def _ahead(batches: Iterator[T], n: int = 2) -> Iterator[T]:
    """The same, up to `n` of them made in a thread while others are in use: fastai waits for the GPU at every step."""
    with ThreadPoolExecutor(1) as pool:
        coming = deque(pool.submit(next, batches, None) for _ in range(n))
        while (batch := coming.popleft().result()) is not None:
            coming.append(pool.submit(next, batches, None))
            yield batch


def fit_batch_size(bs: int, n_train: int) -> int:
    """The largest batch size up to `bs` that leaves out no more than a quarter of the training images in an epoch.

    fastai drops the last short batch: of 113 images in batches of 64 it would take 64 an epoch, of 40 images none.
    Of several processes each has its share of the images.
    """
    share = n_train // n_processes()
    if not share:
        raise DataError(f"{n_train} training images are too few for {n_processes()} processes: start fewer of them.")
    fitting = min(bs, share)
    while share % fitting > share / 4:
        fitting -= 1
    if share < bs:
        each = " for each process" * (n_processes() > 1)
        say(f"Batch size {bs} cut to {fitting}: there are no more training images{each}.")
    elif fitting < bs:
        used = n_processes() * (share - share % fitting)
        say(f"Batch size {bs} cut to {fitting}: an epoch then takes {used} of {n_train} training images.")
    return fitting


def none_left_out(n: int, bs: int) -> int:
    """The batch size nearest to `bs`, from there down and then up, whose last batch gives each process two images, or
    one.

    Raises `DataError` where there are fewer images than processes.
    """
    together = n_processes()
    if n < together:
        fix = "Keep more of them (valid_pct), or start fewer processes."
        raise DataError(f"{together} processes need as many validation images, there are {n}. {fix}")
    sizes = *range(bs, 0, -1), *range(bs + 1, n + 1)
    last = {size: n % (size * together) or size * together for size in sizes}  # images in the last batch
    return next(size for each in (2, 1) for size in sizes if last[size] >= each * together)


def take_parts(dls: DataLoaders) -> None:
    """Where several processes train, the loaders give each its part of the batches, on its own GPU."""
    if n_processes() == 1:
        return
    for i, dl in enumerate(dls.loaders):
        dl.take_part(training=i == 0)
    if dls.device is not None and dls.device.type == "cuda":
        dls.device = torch.device("cuda", torch.cuda.current_device())


def check_dls(dls: object) -> None:
    """Raises `DataError` unless `dls` is a fastai `DataLoaders` with data in it."""
    if not isinstance(dls, DataLoaders):
        hint = " Make them with UnlabeledDataLoaders.from_folder(path)." if not isinstance(dls, DataLoader) else ""
        raise DataError(f"Expected DataLoaders, got {type(dls).__name__}.{hint}")
    if not len(dls.loaders) or not len(dls.train_ds):
        raise DataError("The DataLoaders hold no training images.")


def without(tfms: Iterable[Transform], *kinds: type) -> list[Transform]:
    """Copies of the transforms, those of the given classes left out."""
    return [copy(t) for t in tfms if not isinstance(t, kinds)]


def derive_loaders(
    dls: DataLoaders,
    *,
    dl_type: type[TfmdDL] | None = None,  # Class of the new loaders; None: that of each given one
    inputs_only: bool = False,  # Drop the labels from the datasets: they are not even computed
    n_in: int | None = None,  # Channels to open images with; None: as they are
    stats: tuple[tuple[float, ...], tuple[float, ...]] | None = None,  # (mean, std) of a new Normalize
    resize: int | None = None,  # Size for items that nothing resizes yet; None: leave them
    whole: bool = False,  # Squeeze all of an image into that size; False: the part of it that is of its shape
    drop: tuple[type, ...] = (),  # Batch transforms to leave out, beside Normalize
    add: Iterable[Transform] = (),  # More batch transforms
) -> DataLoaders:
    """New loaders over copies of the datasets and transforms of `dls`, which stays as it was.

    A `Normalize` that `dls` brought is dropped; the batch size is cut to the training images.
    """
    check_dls(dls)
    bs = fit_batch_size(dls.train.bs, len(dls.train_ds)) if dls.train.bs else dls.train.bs
    loaders = []
    for i, dl in enumerate(dls.loaders):
        dataset, opened = _derive_dataset(dl.dataset, inputs_only, n_in)
        item_tfms, batch_tfms = list(dl.after_item.fs), without(dl.after_batch.fs, Normalize, *drop)
        if resize and nothing_resizes(dl):
            item_tfms.append(Resize(resize, ResizeMethod.Squish if whole else ResizeMethod.Crop))
        if n_in and not opened:
            batch_tfms.append(ToChannels(n_in))
        if stats:
            batch_tfms.append(Standardize.from_stats(*stats, cuda=False))
        batch_tfms += [copy(t) for t in add]
        kwargs = {"after_item": Pipeline(without(item_tfms)), "after_batch": Pipeline(batch_tfms)}
        loaders.append(_new_loader(dl, dataset, dl_type, bs=bs if i == 0 else dl.bs, n=dl.n, **kwargs))
    return DataLoaders(*loaders, path=dls.path, device=dls.device)


def _new_loader(dl: TfmdDL, dataset, dl_type: type[TfmdDL] | None, **kwargs) -> TfmdDL:
    """`dl.new(...)` that leaves no trace in `dl` and keeps nothing that was learned from its old pipeline."""
    before = set(dl.__dict__)
    kwargs = {"before_batch": Pipeline(without(dl.before_batch.fs)), **kwargs}
    if issubclass(dl_type or type(dl), IndexedDL):
        kwargs["facts"] = dl.__dict__.get("facts")  # fastai's own loaders have those that somebody gave them
    if dl_type in (None, type(dl)):
        kwargs = {**_own_settings(dl), **kwargs}
    with preserved_rng():  # fastai tries one item, with the user's random transforms
        new = dl.new(dataset, cls=dl_type, **kwargs)
    new.rng.seed(random.getrandbits(62))  # one draw for a new loader, as in fastai
    for name in set(dl.__dict__) - before:
        delattr(dl, name)
    new._types = None  # found anew from a batch of its own
    return new


def _own_settings(dl: TfmdDL) -> dict:
    """Arguments that a loader class adds to fastai's and keeps by name (`WeightedDL.wgts`): `new` forgets them."""
    classes = IndexedDL, TfmdDL, DataLoader  # their `new` sees to what is theirs
    known = {name for cls in classes for name in signature(cls.__init__).parameters}
    own = set(signature(type(dl).__init__).parameters) - known
    return {name: value for name, value in vars(dl).items() if name in own}


def _derive_dataset(dataset, inputs_only: bool, n_in: int | None):
    """A copy of a fastai dataset with our image opener; and whether an opener was found to replace."""
    if isinstance(dataset, TfmdLists):
        return _with_opener(dataset, n_in)
    if not isinstance(dataset, Datasets):
        return dataset, False
    tls = dataset.tls[: dataset.n_inp] if inputs_only else dataset.tls
    found = [_with_opener(tl, n_in) for tl in tls[: dataset.n_inp]]
    tls = [tl for tl, _ in found] + list(tls[dataset.n_inp :])
    return Datasets(tls=L(tls), n_inp=dataset.n_inp), all(opened for _, opened in found)


def is_opener(tfm: Transform) -> bool:
    """Whether this type transform opens an image: ours, or fastai's `PILImage.create` and its kin."""
    return isinstance(tfm, OpenImage) or tfm.name == "PILBase.create"


def _with_opener(tl: TfmdLists, n_in: int | None) -> tuple[TfmdLists, bool]:
    """A copy of `tl` that opens images with `n_in` channels; and whether it has an opener."""
    tfms = [_reopening(t, n_in) if n_in and is_opener(t) else t for t in tl.tfms.fs]
    new = tl._new(tl.items)
    new.tfms = Pipeline(tfms, split_idx=tl.split_idx)
    return new, any(isinstance(t, OpenImage) for t in tfms)


def _reopening(opener: Transform, n_in: int) -> OpenImage:
    if not isinstance(opener, OpenImage):
        return OpenImage(n_in)
    new = copy(opener)
    new.n_in = n_in
    return new


class Standardize(Normalize):
    """fastai's `Normalize` with the same values from one new tensor instead of two: fresh memory takes the time."""

    def encodes(self, x: TensorImage):
        return (x - self.mean).div_(self.std)


class ToChannels(Transform):
    """Float images (B, C, H, W) to `n_in` channels: three to their luma, one to copies of it.

    Raises `DataError` for other changes: what the channels of a multispectral image mean, nobody said.
    """

    order = 11  # right after IntToFloatTensor

    def __init__(self, n_in: int):
        super().__init__()
        self.n_in = n_in

    def __call__(self, b, **kwargs):
        x, *rest = b if isinstance(b, (tuple, list)) else (b,)
        return (self.changed(x), *(self.changed(t) if isinstance(t, TensorCompanion) else t for t in rest))

    def changed(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) with `n_in` channels."""
        if x.shape[1] == self.n_in:
            return x
        if x.shape[1] == 1:
            return x.expand(-1, self.n_in, -1, -1)
        if x.shape[1] == 3 and self.n_in == 1:
            return luma(x)
        raise DataError(
            f"Images of {x.shape[1]} channels cannot be turned into {self.n_in}. Choose channels in the dataset, or "
            f"take a net with n_in={x.shape[1]}."
        )

    def decode(self, b, **kwargs):
        return b


def luma(
    x: torch.Tensor,  # (B, 3, H, W), in any range
) -> torch.Tensor:  # (B, 1, H, W)
    """Color to grey as Pillow's mode L weighs it (ITU-R BT.601)."""
    return (x * constant(LUMA, x.dtype, x.device).view(3, 1, 1)).sum(1, keepdim=True)


def n_in_of(dls: DataLoaders, n: int = 64) -> int:
    """Channels that the images of `dls` need: 1 if all of `n` training images are grey, else 3 (or the batch's).

    Asks the files, evenly spread, and not the batches: fastai opens grey files as RGB.
    """
    images = _images_of(dls.train_ds)
    if images is None:
        with preserved_rng():
            return _batch_images(_evaluating(dls.train).one_batch()).shape[1]
    opener = next(t for t in images.tfms.fs if is_opener(t))
    if getattr(opener, "n_in", None):
        return opener.n_in
    if PILImageBW in (images.types or ()):
        return 1
    return 1 if all(is_grey(open_image(s, min_side=128)) for s in _sources(images, spread(len(images), n))) else 3


def are_scans(dls: DataLoaders) -> bool:
    """Whether the images are known to be scans: left and right differ, and three channels are windows, no colors."""
    return any(getattr(t, "are_scans", False) for t in _openers(dls))


def seen_as(dls: DataLoaders) -> str | None:
    """In which windows scans are seen, in words; None for other images."""
    return next((t.seen for t in _openers(dls) if getattr(t, "seen", None)), None)


def _openers(dls: DataLoaders) -> list[Transform]:
    images = _images_of(dls.train_ds)
    return [] if images is None else list(images.tfms.fs)


def needs_resize(dls: DataLoaders, n: int = 1000) -> bool:
    """Whether the images of `dls` differ in size and nothing resizes them: as they are they make no batches.

    Asks the headers of `n` images of each loader, evenly spread.
    """
    sizes = set()
    for dl in dls.loaders:
        found = image_sizes(dl.dataset, spread(len(dl.dataset), n)) if nothing_resizes(dl) else None
        if found is None:
            return False
        for size in found:
            sizes.add(size)
            if len(sizes) > 1:
                return True
    return False


def image_sizes(dataset, places: Iterable[int]) -> Iterator[tuple[int, int]] | None:
    """Width and height of the images at `places` as they are opened, from their headers; None where they are hidden."""
    images = _images_of(dataset)
    return None if images is None else map(image_size, _sources(images, places))


def spread(length: int, n: int) -> list[int]:
    """`n` places from 0 to `length` - 1, evenly spread, both ends among them; all, if there are fewer."""
    return np.linspace(0, length - 1, min(n, length)).astype(int).tolist()


def nothing_resizes(dl: TfmdDL) -> bool:
    """Whether images come out of a loader in the sizes that they were opened in."""
    tfms = [*dl.after_item.fs, *dl.before_batch.fs]
    return all(_is_plain(t) or isinstance(t, PointScaler | AddMaskCodes) for t in tfms)


def _is_plain(tfm: Transform) -> bool:
    """Whether this transform leaves sizes and pixels as they are."""
    return isinstance(tfm, ToTensor) or tfm.name == "noop"


def _images_of(dataset) -> TfmdLists | None:
    """The part of a fastai dataset that opens images; None where nothing in it does."""
    images = dataset.tls[0] if isinstance(dataset, Datasets) else dataset
    return images if isinstance(images, TfmdLists) and any(map(is_opener, images.tfms.fs)) else None


def _sources(images: TfmdLists, indices: Iterable[int]) -> Iterator:
    """What the opener gets to open, for each index."""
    fs = list(images.tfms.fs)
    before = Pipeline(fs[: next(i for i, t in enumerate(fs) if is_opener(t))])
    for i in indices:
        source = before(images._get(i))
        yield source() if callable(source) else source


def image_sources(dataset) -> Iterator | None:
    """What is opened for each image (a path, an array, ...), in order; None where the dataset does not tell."""
    images = _images_of(dataset)
    return None if images is None else _sources(images, range(len(images)))


def _evaluating(dl: TfmdDL) -> TfmdDL:
    """`dl` as it would be for one pass over all images in order, in this process."""
    return _new_loader(dl, dl.dataset, None, shuffle=False, drop_last=False, num_workers=0)


def _batch_images(b) -> torch.Tensor:
    """The images of a batch, as a plain tensor."""
    x = b[0] if isinstance(b, (tuple, list)) else b
    return x.detach().as_subclass(torch.Tensor) if isinstance(x, torch.Tensor) else x


def measure_stats(dls: DataLoaders, n: int = 1024) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel over at least `n` training images (all, if there are fewer), in [0, 1].

    One batch is not enough: its mean strays. The images are those that training sees, with the user's transforms,
    before any `Normalize`.
    """
    total, total_sq, count = 0.0, 0.0, 0
    for x in training_images(dls, n):
        x = x.cpu().transpose(0, 1).flatten(1).double()  # (B, C, H, W) -> (C, B*H*W); MPS has no float64
        total, total_sq, count = total + x.sum(1), total_sq + (x**2).sum(1), count + x.shape[1]
    mean = total / count
    std = (total_sq / count - mean**2).clamp(min=0).sqrt().clamp(min=1e-3)  # a folder of one flat color has std 0
    return tuple(mean.tolist()), tuple(std.tolist())


def training_images(
    dls: DataLoaders,
    n: int = 1024,  # At least so many images (all, if there are fewer)
    drop: tuple[type, ...] = (),  # Batch transforms to leave out, beside Normalize
) -> Iterator[torch.Tensor]:  # (B, C, H, W) in [0, 1]
    """Batches of training images as training sees them, with the user's transforms; always the same ones.

    The global random generators are afterwards as they were.
    """
    images = 0
    plain = Pipeline(without(dls.train.after_batch.fs, Normalize, *drop))
    with preserved_rng():
        seed_all(VALID_SEED)  # batch transforms of others draw from the global generators
        dl = _new_loader(dls.train, dls.train_ds, IndexedDL, shuffle=True, drop_last=False, after_batch=plain)
        dl.rng.seed(VALID_SEED)
        for b in dl:
            x = _batch_images(b)
            float_images(x)
            yield x
            images += len(x)
            if images >= n:
                break


def float_images(x: torch.Tensor) -> None:
    """Raises `DataError` unless `x` is a batch of float images: integers mean that IntToFloatTensor is missing."""
    if not isinstance(x, torch.Tensor) or x.ndim != 4:
        shape = tuple(getattr(x, "shape", ())) or type(x).__name__
        raise DataError(f"Expected a batch of images (B, C, H, W), got {shape}.")
    if not x.is_floating_point():
        fix = f"Add {IntToFloatTensor.__name__} to the batch transforms, or use UnlabeledBlock in the DataBlock."
        raise DataError(f"Expected float images in [0, 1], got {x.dtype}. {fix}")
