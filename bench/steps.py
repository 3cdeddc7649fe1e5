"""Training as it is timed: a learner's epochs, and the bare step that bounds them."""

import shutil
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path

import torch
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.torch_core import default_device, to_float
from measure import data_set
from torch import Tensor, nn

from selfsup_fastai.callbacks.layout import has_convolutions, lay_out
from selfsup_fastai.callbacks.log import SkipValidation
from selfsup_fastai.callbacks.precision import AutoPrecision
from selfsup_fastai.data.files import find_files
from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.encoders.frozen import TrainedFirst
from selfsup_fastai.pretext.learner import PretextLearner


class Bare:
    """A model's own work: forward, loss, backward and the optimizer's step, on one batch that is there already.

    The optimizer is torch's AdamW in its fused form, fastai's default in the fastest way there is.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable,  # Of the prediction and the targets
        inputs: Sequence[Tensor],
        targets: Sequence[Tensor],
        half: bool = False,  # bf16 instead of fp32, channels last where the net is of convolutions
    ):
        self.model, self.loss, self.inputs, self.targets = model.train(), loss, inputs, targets
        self.half, self.device = half, inputs[0].device.type
        lay_out(model, half and has_convolutions(model))
        self.opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3, fused=True)

    @classmethod
    def of(cls, learn: PretextLearner, half: bool = False) -> "Bare":
        """A copy of a learner's model, on one of its training batches."""
        batch = tuple(t.as_subclass(Tensor) for t in learn.dls.train.one_batch())
        n = learn.dls.n_inp
        model = deepcopy(learn.model).to(batch[0].device)
        return cls(model, learn.loss_func, batch[:n], batch[n:], half)

    def step(self) -> None:
        """One."""
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.half):
            loss = self.loss(to_float(self.model(*self.inputs)), *self.targets)
        loss.backward()
        self.opt.step()
        self.opt.zero_grad()

    def steps(self, n: int) -> int:
        """So many; the number of images, a batch each time."""
        for _ in range(n):
            self.step()
        return n * len(self.inputs[0])


def epoch(learn: Learner, cbs: Sequence[Callback] = (), rate: float = 1e-3) -> int:
    """One of training, without validation; the number of images."""
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, rate, cbs=[SkipValidation(), *cbs])
    return len(learn.dls.train) * learn.dls.train.bs


def half_epoch(learn: Learner) -> int:
    """The same in bf16, with channels last where the net is of convolutions."""
    return epoch(learn, [AutoPrecision("bf16", channels_last=has_convolutions(learn.model))])


def skip_first_stage(learn: Learner) -> None:
    """Take what a task trains before everything else for trained: that is not what is timed."""
    for part in learn.model.modules():
        if isinstance(part, TrainedFirst):
            part.is_trained.fill_(True)


def where_kept() -> bool | str:
    """Where pixels are kept while training is timed: on the GPU, if there is one."""
    return "device" if default_device().type == "cuda" else True


def photographs(work: Path, n: int, folder: Path | None = None) -> Path:
    """A folder of so many photographs: copies of those of a data set, over again where there are not enough.

    Raises `Absent`.
    """
    into = work / f"photographs-{n}"
    if not into.exists():
        files = [file for file in find_files(folder or data_set("clothing10_photos", work)) if is_picture(file)]
        into.mkdir(parents=True)
        for i in range(n):
            file = files[i % len(files)]
            shutil.copy2(file, into / f"{i:06d}{file.suffix}")
    return into


def is_picture(file: Path) -> bool:
    """By its suffix: a data set comes with texts, too."""
    return file.suffix.lower() in (".jpg", ".jpeg", ".png")


def loaders(folder: Path, size: int, bs: int) -> UnlabeledDataLoaders:
    """Ours, all images but one to train with."""
    return UnlabeledDataLoaders.from_folder(folder, size=size, bs=bs, valid_pct=0.0, cache=where_kept())
