"""A copy of a network that follows it slowly: the teacher of MoCo, BYOL, DINO and others."""

from copy import deepcopy

import torch
from torch import nn


class Teacher(nn.Module):
    """What a module was a while ago: its parameters are a running average of that module's.

    Called like the module, without gradients. Parameters alone are averaged, as in all the authors' codes; batch norms
    see and track batches of their own, in training mode where the student is. `callbacks.ema.EMATeacher` lets every
    teacher in a model follow after each step. Saved with the model, as any part of it.
    """

    def __init__(self, student: nn.Module):
        super().__init__()
        self.net = deepcopy(student).requires_grad_(False)
        self._student = [student]  # in a list, as no part of the teacher: its weights would be saved twice

    @torch.no_grad()
    def forward(self, *args, **kwargs):
        return self.net(*args, **kwargs)

    @torch.no_grad()
    def follow(
        self,
        momentum: float,  # Share of the old values that stays, 0..1
    ) -> None:
        """One step of the average: momentum * teacher + (1 - momentum) * student."""
        own, students = list(self.net.parameters()), list(self._student[0].parameters())
        if own:
            torch._foreach_lerp_(own, [p.detach() for p in students], 1 - momentum)
