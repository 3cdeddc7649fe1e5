"""Memories of a model, brought up to date after each step."""

from selfsup_fastai.callbacks.of_model import OfModel
from selfsup_fastai.encoders.memories import Memory


class KeepMemories(OfModel):
    """What the model's memories noted in a step enters them after it; what they noted without one is forgotten.

    An accumulated step may begin in one epoch and be taken in the next: what it noted stays, as its gradient does,
    until the fit is over.
    """

    order = 10

    def after_step(self):
        for memory in self.memories:
            memory.commit()

    def before_train(self):
        self.memories = self._memories()  # once: a network has hundreds of modules
        if self.epoch == 0:
            self._forget()

    def after_fit(self):
        self._forget()

    def _forget(self) -> None:
        for memory in self._memories():
            memory.forget()
            memory.look_again()

    def _memories(self) -> list[Memory]:
        return [m for m in self.task_model.modules() if isinstance(m, Memory)]
