"""Memories of a model, brought up to date after each step."""

from fastai.callback.core import Callback

from selfsup_fastai.encoders.memories import Memory


class KeepMemories(Callback):
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
        return [m for m in self.learn.model.modules() if isinstance(m, Memory)]
