"""One run: a start, some labels, and what is predicted for the test images in the end.

Every start gets as many steps over as many images. A pretrained net is fine-tuned; a net with new weights is trained by
one cycle with all layers at one rate: low rates and frozen layers would hold it back, and flatter the others.
"""

from typing import NamedTuple

import fastai.callback.progress  # noqa: F401  (brings no_bar to Learner)
import numpy as np
import torch
from fastai.data.core import DataLoaders
from fastai.torch_core import set_seed
from torch import nn

from selfsup_fastai.callbacks.log import SkipValidation
from selfsup_fastai.checks import check_number
from selfsup_fastai.compare.starts import Start, made
from selfsup_fastai.data.subsets import labels_of, subset
from selfsup_fastai.downstream.learner import DownstreamLearner, downstream_learner
from selfsup_fastai.errors import DataError, TaskError
from selfsup_fastai.messages import quiet
from selfsup_fastai.metrics import image_dice

STEPS, EPOCHS, LEAST_EPOCHS = 200, 20, 5
BATCH, STEPS_AN_EPOCH = 16, 40  # larger batches would take longer for as many steps
RATE, RATE_WITHOUT_BATCH_NORM = 5e-3, 1e-3


class Budget(NamedTuple):
    """What a run may take; the same for all starts."""

    bs: int
    epochs: int
    repeats: int  # Times each labeled image is in an epoch


def budget_for(
    n: int,  # Labeled images
    bs: int,  # Batch size of the loaders
    steps: int | None = None,  # About so many
    epochs: int | None = None,  # Or so many passes over the labeled images
) -> Budget:
    """With few labels, small batches, and epochs in which each image comes several times: so that the stages of a
    fine-tuning, which are counted in epochs, are no single steps. With neither given, 200 steps, and 5 passes at least.
    """
    bs = max(1, min(bs, n, max(8, min(n // 4, max(BATCH, n // STEPS_AN_EPOCH)))))
    if epochs is not None:
        return Budget(bs, epochs, 1)
    least = LEAST_EPOCHS if steps is None else 2
    steps = steps or STEPS
    if steps / (n // bs) <= EPOCHS:
        return Budget(bs, max(least, round(steps / (n // bs))), 1)
    repeats = max(1, round(steps * bs / (n * EPOCHS)))
    return Budget(bs, round(steps / (n * repeats // bs)), repeats)


def check_length(steps: int | None, epochs: int | None) -> None:
    """Raises `TaskError` for a length that no run can have."""
    if steps is not None and epochs is not None:
        raise TaskError("steps and epochs both say how long a run is: give one of them.")
    for name, value, least in (("steps", steps, 1), ("epochs", epochs, 2)):
        if value is not None:
            check_number(name, value, least, whole=True)


def check_tested(dls: DataLoaders) -> None:
    """Raises `DataError` for labeled loaders without test images."""
    if len(dls.loaders) < 2 or not len(dls.valid_ds):
        raise DataError("There are no test images: dls.valid is empty. Make the loaders with valid_pct=0.3, for one.")


def labeled_with(dls: DataLoaders, places: np.ndarray, budget: Budget) -> DataLoaders:
    """Loaders that train on these images of `dls.train`; `dls.valid` stays what it is."""
    train = subset(dls.train, places.tolist() * budget.repeats, bs=budget.bs)
    return DataLoaders(train, dls.valid, path=dls.path, device=dls.device)


def fine_tuned(
    dls: DataLoaders,  # Trained on, and tested on
    start: Start,
    seed: int,
    budget: Budget,
    lr: float | None = None,  # Peak rate of new weights; twice it that of a pretrained net's head while alone
    **how,  # `precision` and `channels_last` of the learner
) -> DownstreamLearner:
    """The learner after its last step. Test images are not looked at."""
    set_seed(seed, reproducible=True)
    with quiet():
        learn = downstream_learner(dls, made(start.source(seed)), metrics=[], **how)
        lr = lr or _rate(learn.model)
        cbs = [SkipValidation(), *(start.cbs() if start.cbs else [])]
        with learn.no_bar(), learn.no_logging():
            if start.fresh:
                learn.fit_one_cycle(budget.epochs, lr, cbs=cbs)
            else:
                frozen = max(1, budget.epochs // 10)
                learn.fine_tune(max(1, budget.epochs - frozen), 2 * lr, freeze_epochs=frozen, cbs=cbs)
    return learn


def _rate(model: nn.Module) -> float:
    """Nets without batch norm, such as ViTs, diverge at rates that suit the others."""
    batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.encoder.modules())
    return RATE if batch_norm else RATE_WITHOUT_BATCH_NORM


def predicted(
    learn: DownstreamLearner,
    kind: str,  # Of the labels
) -> np.ndarray:
    """For each test image, in order: probabilities, numbers, or, of masks, the Dice coefficient."""
    rows, model = [], learn.model.eval()
    activation = getattr(learn.loss_func, "activation", None) or (lambda x: x)
    with torch.no_grad():
        for x, y in learn.dls.valid:
            answer = activation(model(x)).float().cpu()
            rows.append(_dice(answer, y, learn) if kind == "mask" else answer.flatten(1).numpy())
    return np.concatenate(rows).astype(np.float32)


def _dice(answer: torch.Tensor, y: torch.Tensor, learn: DownstreamLearner) -> np.ndarray:
    ignored = getattr(getattr(learn.loss_func, "func", None), "ignore_index", None)
    return image_dice(answer.argmax(1).numpy(), y.cpu().numpy(), answer.shape[1], ignored)


def truth_of(
    dls: DataLoaders,
    kind: str,
) -> np.ndarray:
    """What is true of each test image, as the scores want it; of masks only how many there are."""
    if kind == "mask":
        return np.zeros(len(dls.valid_ds))
    if kind == "category":
        return np.array([int(label) for label in labels_of(dls.valid)])
    tests = dls.valid.new(shuffle=False, drop_last=False)
    return torch.cat([torch.as_tensor(y).float().reshape(len(y), -1).cpu() for _, y in tests]).numpy()
