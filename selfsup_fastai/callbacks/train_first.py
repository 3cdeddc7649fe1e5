"""Stages: a part of the model is trained, once, before the training of the rest begins."""

import torch
from fastai.callback.core import Callback
from tqdm.auto import tqdm

from selfsup_fastai.encoders.frozen import TrainedFirst
from selfsup_fastai.messages import say
from selfsup_fastai.processes import alone, is_first, shared
from selfsup_fastai.seeding import preserved_rng


class TrainFirst(Callback):
    """Trains every `TrainedFirst` part of the model on the training images before the first step is taken.

    By its `own_loss`, with Adam and a step size that falls linearly to 0. It happens in the first `fit` or `lr_find`,
    never in `validate` or `get_preds`, and not again once it is done: the part remembers that with its weights. All of
    it is drawn from a loader of its own, so the training that follows draws what it would have drawn without. Of
    several processes each does it with all images, and what the first one has come to counts.
    """

    order = 40  # before the Recorder and bars (50), and before the learning rate finder (60) saves the model

    def __init__(
        self,
        n_epochs: int,
        step_size: float = 3e-4,  # Of Adam, at the start
        momentum: float = 0.5,  # Adam's first beta
    ):
        self.n_epochs, self.step_size, self.momentum = n_epochs, step_size, momentum

    def before_fit(self):
        if hasattr(self.learn, "lr_finder"):  # which saves the model now and puts it back in the end
            self._train_parts()

    def before_train(self):  # `validate` and `get_preds` never come here
        self._train_parts()

    def _train_parts(self) -> None:
        for part in self.learn.model.modules():
            if isinstance(part, TrainedFirst) and not part.is_trained:
                say(f"First the {part.what} is trained: {self.n_epochs} epoch{'s' * (self.n_epochs > 1)}.")
                with preserved_rng(), part.learning(), alone():
                    loss = self._train(part)
                shared(part)
                say(f"The {part.what} is trained, its own loss is {loss:.3g}, and is frozen from now on.")

    def _train(self, part: TrainedFirst) -> float:
        """The loss of the last epoch."""
        dl = self.dls.train.new()
        n_steps = self.n_epochs * len(dl)
        optimizer = torch.optim.Adam(part.parameters(), self.step_size, betas=(self.momentum, 0.999))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / n_steps)
        with tqdm(total=n_steps, desc=part.what, leave=False, disable=None if is_first() else True) as bar:
            for _ in range(self.n_epochs):
                losses = []
                for b in dl:
                    loss = part.own_loss(*b[: dl.n_inp])
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    schedule.step()
                    losses.append(loss.detach())
                    bar.update()
        return torch.stack(losses).mean().item()
