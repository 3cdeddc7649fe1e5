"""Queues that are full before a rate is searched."""

from selfsup_fastai.callbacks.of_model import OfModel
from selfsup_fastai.encoders.memories import FeatureQueue, Memory
from selfsup_fastai.seeding import preserved_rng


class FillForRates(OfModel):
    """Before `lr_find` the model's queues take in what it makes of training images, until they are full.

    A run begins with random directions, from which everything is far: as keys take their place the loss rises
    manyfold, whatever the rate, and the finder would take that for the rate at which training breaks down. It puts the
    model back in the end, queues too.
    """

    order = 11  # after what memories noted before is forgotten

    def before_train(self):
        if self.epoch or not hasattr(self.learn, "lr_finder"):
            return
        queues = [m for m in self.task_model.modules() if isinstance(m, FeatureQueue)]
        with preserved_rng():
            for b in self.dls.train:
                if all(queue.is_full for queue in queues):
                    break
                self.learn.model(*b[: self.dls.n_inp])
                for queue in queues:
                    queue.commit()
        for memory in self.learn.model.modules():
            if isinstance(memory, Memory):  # of other tasks
                memory.forget()
