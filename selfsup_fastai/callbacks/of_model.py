"""Callbacks that look for parts of one task's model."""

from fastai.callback.core import Callback
from fastai.torch_core import get_model
from torch import nn


class OfModel(Callback):
    """A callback of a task that works on parts of the task's model.

    Of several tasks at once each has its model in the learner's: there, `place` is its name.
    """

    place = ""

    @property
    def task_model(self) -> nn.Module:
        """The model of the task whose callback this is."""
        return get_model(self.learn.model).get_submodule(self.place)  # on several devices it is wrapped
