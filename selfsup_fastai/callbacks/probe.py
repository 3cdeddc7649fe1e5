"""How near images of one label are to each other, after each epoch of pretraining."""

from fastai.data.core import DataLoaders

from selfsup_fastai.callbacks.columns import Columns
from selfsup_fastai.errors import DataError
from selfsup_fastai.features import embed, knn_accuracy


class OnlineKNN(Columns):
    """After each epoch the accuracy of the nearest neighbors among a few labeled images, as the column `knn`.

    `learn.fit_one_cycle(20, 3e-3, cbs=OnlineKNN(labeled))`. The frozen encoder that would be saved, on the images
    without augmentation: each validation image is named by the vote of its k nearest training images (see
    `knn_predict`, Wu et al. 2018). Nothing is trained, and the run stays as it is without. If you choose an epoch by
    it, the labels have been used: test on others. Costs a pass of all labeled images.
    """

    names = ("knn",)

    def __init__(
        self,
        dls: DataLoaders,  # Labeled: a training and a validation set with one category an image
        k: int = 20,  # Neighbors
        temperature: float = 0.07,  # Of the vote
    ):
        super().__init__()
        if not isinstance(dls, DataLoaders) or len(dls.loaders) < 2:
            raise DataError("OnlineKNN needs DataLoaders of labeled images, with a training and a validation set.")
        self.labeled, self.k, self.temperature = dls, k, temperature

    def look(self, encoder):
        train, valid = (embed(encoder, dl) for dl in (self.labeled.train, self.labeled.valid))
        return {"knn": knn_accuracy(train, valid, self.k, self.temperature)}
