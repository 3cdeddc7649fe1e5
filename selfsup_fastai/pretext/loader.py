"""`PretextTransform` turns a batch of images into a question; `PretextDL` is a loader that carries one."""

from copy import copy

import torch
from fastai.data.transforms import Normalize
from fastai.torch_core import to_cpu
from fastcore.foundation import L
from fasttransform import Pipeline, Transform
from matplotlib.axes import Axes
from torch import Tensor

from selfsup_fastai.callbacks.consistency import Consistency
from selfsup_fastai.data.companions import Companions, TensorCompanion
from selfsup_fastai.data.loader import IndexedDL, TensorIndex, without
from selfsup_fastai.errors import DataError, TaskError
from selfsup_fastai.pretext import get_task
from selfsup_fastai.pretext.base import PretextTask
from selfsup_fastai.seeding import Generator, part_seed


class PretextTransform(Transform):
    """A batch transform that asks the question: `(x, ...)` -> `(*inputs, *targets)`. Labels are dropped.

    It runs on the device, after IntToFloatTensor (order 10) and augmentation (30-40) and before Normalize (99), so a
    task sees images in [0, 1] and its targets are never normalized. It works in a `PretextDL` only, which seeds it at
    the start of each pass: elsewhere two validation passes would ask different things.
    """

    order = 50

    def __init__(
        self,
        task: str | PretextTask,  # A name in TASKS, or a task
        consistency: Consistency | None = None,  # Which takes what it needs of a batch with it, behind the targets
        **settings,  # Of the task
    ):
        super().__init__()
        self.task, self.consistency = get_task(task, **settings), consistency
        self.seed = self._generator = self._common = None  # the last: what several processes draw together
        self.known: Tensor | None = None  # Of each image of the loader's dataset, as `PretextTask.known` gives it

    def reseed(self, seed: int, part: int | None = None) -> None:
        """What follows is drawn as `seed` says, whatever was drawn before. `part`: which of several processes it is."""
        self.seed, self._generator, self._common = seed, None, None
        if part is not None:
            self.seed = part_seed(seed, part)
            self._common = torch.Generator().manual_seed(part_seed(seed, "common"))

    def generator(self, device: torch.device) -> Generator:
        """What the task draws from; made anew after `reseed`, and on another device."""
        if self._generator is None or self._generator.device != device:
            self._generator = Generator(device, self.seed)
        return self._generator

    def __call__(self, b, split_idx: int | None = None, **kwargs) -> tuple[Tensor, ...]:
        if self.seed is None:
            raise TaskError("A PretextTransform draws as its loader says: make the loaders with dl_type=PretextDL.")
        items = list(b) if isinstance(b, (tuple, list)) else [b]
        idx = items.pop().as_subclass(Tensor) if isinstance(items[-1], TensorIndex) else None
        x, generator = items[0], self.generator(items[0].device)
        others = [t.as_subclass(Tensor) for t in items[1:] if isinstance(t, TensorCompanion)]
        extras = {"known": self.known_of(idx), "others": torch.stack(others, 1) if others else None}
        extras["common"] = self._common
        made = self.task.batch(x, generator=generator, train=split_idx == 0, idx=idx, **extras)
        return made if self.consistency is None else (*made, *self.consistency.extras(x, idx, generator))

    def known_of(self, idx: Tensor | None) -> Tensor | None:
        """What is known of these images, (B, K); None where nothing is."""
        if self.known is None or idx is None:
            return None
        self.known = self.known.to(idx.device)
        return self.known[idx]

    def decode(self, b, **kwargs):
        return b

    def __repr__(self) -> str:
        return f"PretextTransform({self.task!r})"

    def __getstate__(self) -> dict:
        generators = {"_generator": None, "_common": None}  # tied to their device
        return {**self.__dict__, **generators, "known": None}


class PretextDL(IndexedDL):
    """A loader of pretext batches: an `IndexedDL` with a `PretextTransform` among its batch transforms.

    For DataBlock users: `dblock.dataloaders(path, dl_type=PretextDL, batch_tfms=[PretextTransform('rotation')])`.
    """

    def __init__(self, dataset, *args, after_batch=None, batch_tfms=None, **kwargs):
        tfms = list(Pipeline(after_batch).fs)
        # fastai's loaders drop `batch_tfms` without a word; DataBlock.dataloaders hands them to every split's loader
        tfms += [t for t in L(batch_tfms) if all(type(t) is not type(f) for f in tfms)]
        # a copy of its own: else a look at one loader would reseed the draws of another
        tfms = [copy(t) if isinstance(t, PretextTransform) else t for t in tfms]
        super().__init__(dataset, *args, after_batch=Pipeline(tfms), **kwargs)
        self._types, self._n_inp = None, None  # spares fastai a pass through the pipeline to find out
        self._learned = None, None, None  # from which facts; what is known of each image; which others come with it

    @property
    def transform(self) -> PretextTransform:
        found = [t for t in self.after_batch.fs if isinstance(t, PretextTransform)]
        if len(found) != 1:
            raise TaskError(f"A PretextDL needs one PretextTransform among its batch_tfms, this one has {len(found)}.")
        return found[0]

    @property
    def task(self) -> PretextTask:
        return self.transform.task

    @property
    def n_inp(self) -> int:
        return self.task.n_inp

    @property
    def with_index(self) -> bool:
        consistency, needs = self.transform.consistency, self.task.needs
        return "index" in needs or "facts" in needs or (consistency is not None and consistency.needs_index)

    @property
    def known(self) -> Tensor | None:
        """What the task learns of each image from the facts, (N, K), NaN where nobody knows; None without facts."""
        return self._from_facts()[1]

    @property
    def companions(self) -> Companions | None:
        """The images that the task wants beside each one; None if none, or without facts."""
        return self._from_facts()[2]

    def _from_facts(self) -> tuple:
        if self.facts is None:
            return None, None, None
        if self._learned[0] is not self.facts:
            if len(self.facts) != len(self.dataset):
                fix = "Row i of `facts` is about item i of the loader's dataset."
                raise DataError(f"There are {len(self.dataset)} images and {len(self.facts)} rows of facts. {fix}")
            known = self.task.known(self.facts) if "facts" in self.task.needs else None
            self._learned = self.facts, known, self.task.companions(self.facts)
        return self._learned

    @property
    def plain(self) -> IndexedDL:
        """A loader of the same images in [0, 1], without the question."""
        return self.new(cls=IndexedDL, after_batch=Pipeline(without(self.after_batch.fs, PretextTransform, Normalize)))

    def before_iter(self):
        super().before_iter()
        self.transform.reseed(self.pass_seed, self.part and self.part[0])
        self.transform.known = self.known

    def question(self, b) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(inputs, targets) of a batch as the task made them: before Normalize, on the CPU, plain tensors."""
        b = tuple(b)
        for tfm in reversed(self.after_batch.fs):
            if tfm.order > PretextTransform.order:
                b = tfm.decode(b, split_idx=self.after_batch.split_idx)
        b = tuple(t.as_subclass(Tensor) for t in to_cpu(b))
        return b[: self.n_inp], b[self.n_inp : self.n_inp + self.task.n_targets]

    def show_batch(
        self, b=None, max_n: int = 9, ctxs=None, show: bool = True, unique: bool = False, **kwargs
    ) -> list[Axes]:
        """What the network is asked. `unique`: about one image, again and again; `show=False`: (inputs, targets)."""
        if b is None:
            b = self._repeated_item(max_n) if unique else self.one_batch()
        if not show:
            return self.question(b)
        return self.task.show(*self.question(b), ctxs=ctxs, max_n=max_n, **kwargs)

    def _repeated_item(self, n: int):
        return self.new(get_idxs=lambda: [0] * n, bs=n, n=n, shuffle=False, num_workers=0).one_batch()

    def show_results(self, b, out, max_n: int = 9, ctxs=None, show: bool = True, **kwargs) -> list[Axes]:
        """What the network was asked and what it answered; `out` as `task.decode` gives it."""
        inputs, targets = self.question(b)
        return self.task.show(inputs, targets, pred=to_cpu(out), ctxs=ctxs, max_n=max_n, **kwargs)
