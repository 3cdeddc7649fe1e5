"""Memories of a model, brought up to date after each step."""

from selfsup_fastai.callbacks.of_model import OfModel
from selfsup_fastai.encoders.memories import Memory


class KeepMemories(OfModel):
    """What the model's memories noted in a step enters them after it; what they noted without one is forgotten."""

    order = 10

    def after_step(self):
        for memory in self._memories():
            memory.commit()

    def before_train(self):
        for memory in self._memories():
            memory.forget()

    def after_fit(self):
        self.before_train()

    def _memories(self) -> list[Memory]:
        return [m for m in self.task_model.modules() if isinstance(m, Memory)]
