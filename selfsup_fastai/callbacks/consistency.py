"""Consistency: what a task makes of an image is to have the image's own embedding."""

from typing import Any

import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import ValueMetric
from fastai.torch_core import TensorImage, to_cpu
from torch import Tensor, nn

from selfsup_fastai.callbacks.memories import KeepMemories
from selfsup_fastai.checks import check_number
from selfsup_fastai.encoders.encoder import Encoder
from selfsup_fastai.encoders.invariant import invariant_heads
from selfsup_fastai.encoders.maps import undisturbed
from selfsup_fastai.encoders.memories import NEGATIVES, ContrastBank
from selfsup_fastai.errors import TaskError, unknown
from selfsup_fastai.losses import invariant_loss, view_distance
from selfsup_fastai.processes import totals
from selfsup_fastai.seeding import preserved_rng

TERMS = ("cosine", "mse", "nce")


class Consistency(Callback):
    """Pulls the embedding of each image and those of what the task makes of it together, whatever the task.

    `pretext_learner(dls, 'jigsaw', consistency=0.5)` adds 0.5 times the term to the task's loss in training. The
    embeddings of the transformed images are those that the task computes anyway; the images themselves go through the
    encoder once more, so a batch costs one image-sized pass more. The column `consistency` is the term on the
    validation images; losses there are the task's own.

    `term='cosine'` is 1 - cosine of the two embeddings, the mean over what was made of an image; `'mse'` the mean
    squared difference of their coordinates. Neither pushes different images apart: it is the task that keeps the
    embeddings from becoming all the same. `'nce'` does: the embedding must find the image's own row in a bank of all
    training images among rows drawn at random. It has the two heads and the bank of PIRL (Misra & van der Maaten 2020,
    arXiv 1912.01991), to which it comes down if the task's own loss has no weight: a cousin, as PIRL classifies
    nothing.

    A task such as rotation wants features that tell what was done to an image, consistency features that do not.
    A small weight leaves room for both. Tasks that show the encoder the images as they are (colorization, an
    autoencoder without noise), or only some patches (mae, ijepa), leave nothing to compare and are refused.
    """

    order = 5.5  # in after_loss before gradient accumulation (6) divides, and mixed precision (10) leaves its context

    def __init__(
        self,
        weight: float = 0.5,  # Of the term, beside the task's loss
        term: str = "cosine",  # 'cosine', 'mse' or 'nce'
        dim: int = 128,  # nce: width of its embeddings
        temperature: float = 0.2,  # nce: of the softmax; PIRL's 0.07
        negatives: int | None = None,  # nce: rows drawn; None: as many as training images, 4096 at most
        bank_momentum: float = 0.5,  # nce: share of the old row in the new one
        changed_weight: float = 0.5,  # nce: of the transformed image's part; the image's own has the rest
    ):
        check_number("The weight of consistency", weight, 0)
        if term not in TERMS:
            raise unknown("term of consistency", term, TERMS)
        check_number("dim", dim, 1, whole=True)
        check_number("temperature", temperature, above=0)
        if negatives is not None:
            check_number("negatives", negatives, 1, whole=True)
        check_number("bank_momentum", bank_momentum, 0, below=1)
        check_number("changed_weight", changed_weight, 0, 1)
        self.weight, self.term, self.dim, self.temperature = weight, term, dim, temperature
        self.negatives, self.bank_momentum, self.changed_weight = negatives, bank_momentum, changed_weight
        self.needs_index = term == "nce"
        self.heard, self.totals, self.n_rows = None, [0.0, 0], 1

    def settings(self) -> dict:
        """As they travel in the encoder's card."""
        names = ["weight", "term"]
        if self.term == "nce":
            names += ["dim", "temperature", "negatives", "bank_momentum", "changed_weight"]
        return {name: getattr(self, name) for name in names}

    # --- what `pretext_learner` asks for ------------------------------------------------------------------------------

    def setup(self, task: Any, model: nn.Module, dls: DataLoaders) -> None:
        """See what the task makes of the images of one batch; for 'nce' the model gets heads and bank.

        Raises `TaskError` where there is nothing to compare.
        """
        if task.input == "sobel":
            raise TaskError(f"{task.name} feeds its network with edges, consistency with images: take sobel=False.")
        if task.input:
            self._refuse(task, "shows the network the images as they are, if in other colors")
        self.n_rows = len(dls.train_ds)
        with preserved_rng():
            looked_at = dls.train.new(shuffle=False, num_workers=0).one_batch(), dls.valid.one_batch()
        own, changed = self._seen(task, model, looked_at[0], dls.n_inp)
        with torch.no_grad():
            _, in_validation = self._seen(task, model, looked_at[1], dls.n_inp)
        if changed.shape[-1] != own.shape[-1]:
            self._refuse(task, "takes other features than those of whole images")
        if torch.allclose(own.unsqueeze(1).expand_as(changed), changed, atol=1e-5):
            self._refuse(task, "shows the network the images as they are")
        if self.term == "nce":
            if changed.shape[1] != in_validation.shape[1] or hasattr(task, "tasks"):
                why = "does not make equally many things of an image each time"
                raise TaskError(f"{task.name} {why}, as 'nce' needs it: take term='cosine' or 'mse'.")
            bank = ContrastBank(self.n_rows, self.dim, self.bank_momentum, self.temperature)
            model.consistency = invariant_heads(own.shape[1], changed.shape[1], self.dim, bank)

    def _seen(self, task: Any, model: nn.Module, b: tuple, n_inp: int) -> tuple[Tensor, Tensor]:
        """Embeddings of the images of a batch, (B, D), and of what is made of them, (B, V, D)."""
        b, with_grad = to_cpu(b), torch.is_grad_enabled()
        plain = b[-self.n_extras]
        with undisturbed(model), torch.set_grad_enabled(with_grad), Heard(model.encoder) as heard:
            model(*b[:n_inp])
            changed = heard.rows(len(plain))
            if changed is None:
                self._refuse(task, "feeds its network with parts of images only")
            return heard.embed(plain).detach(), changed.detach()

    @staticmethod
    def _refuse(task: Any, why: str) -> None:
        raise TaskError(f"{task.name} {why}: consistency has nothing to compare. Leave it out, or take another task.")

    def extras(self, x: Tensor, idx: Tensor | None, generator: torch.Generator) -> tuple[Tensor, ...]:
        """What a batch carries behind its targets: the images (B, C, H, W); for 'nce' their places and those drawn."""
        plain = x.as_subclass(TensorImage)
        if self.term != "nce":
            return (plain,)
        k = self.negatives or min(NEGATIVES, self.n_rows)
        drawn = torch.randint(self.n_rows, (len(x), 2, k), generator=generator, device=generator.device)
        return plain, idx, drawn

    @property
    def n_extras(self) -> int:
        return 3 if self.term == "nce" else 1

    def callbacks(self) -> list[Callback]:
        """This one, and what keeps the bank up to date."""
        if self.term != "nce":
            return [self]
        keeper = KeepMemories()
        keeper.place = "consistency"
        return [self, keeper]

    def metric(self) -> ValueMetric:
        """The term on the validation images."""
        return ValueMetric(self._mean, "consistency")

    def _mean(self) -> float | None:
        total, n = self.totals
        return total / n if n else None

    # --- in training --------------------------------------------------------------------------------------------------

    def before_validate(self):
        self.totals = [0.0, 0]

    def before_batch(self):
        targets, self.kept = self.yb[: -self.n_extras], self.yb[-self.n_extras :]
        self.learn.yb = tuple(targets)
        self._stop()
        self.heard = Heard(self.learn.model.encoder).__enter__()

    def after_pred(self):
        plain, *rest = self.kept
        changed = self.heard.rows(len(plain))
        own = self.heard.embed(plain)
        self._stop()
        if self.term != "nce":
            self.value = view_distance(own, changed, self.term)
        else:
            found = self.learn.model.consistency(own, changed, *rest, own=None if self.training else own)
            self.value = invariant_loss(found.logits, self.changed_weight)

    def after_loss(self):
        if self.training:
            self.learn.loss_grad = self.learn.loss_grad + self.weight * self.value
            self.learn.loss = self.learn.loss_grad.clone()
        else:
            n = len(self.kept[0])
            self.totals = [self.totals[0] + float(self.value) * n, self.totals[1] + n]

    def after_validate(self):
        self.totals = totals(self.totals)

    def after_cancel_batch(self):
        self._stop()

    def after_fit(self):
        self._stop()

    def _stop(self) -> None:
        if self.heard:
            self.heard.__exit__()
        self.heard = None


class Heard:
    """Listens to the embeddings that an encoder gives while a task's model runs."""

    def __init__(self, encoder: Encoder):
        self.encoder, self.features, self.maps = encoder, [], []

    def __enter__(self) -> "Heard":
        self.handle = self.encoder.register_forward_hook(lambda _module, _args, out: self.features.append(out))
        own = self.encoder.feature_map

        def feature_map(x: Tensor) -> Tensor:
            found = own(x)
            self.maps.append(found.mean((2, 3)))
            return found

        self.encoder.feature_map = feature_map
        return self

    def __exit__(self, *_) -> None:
        self.handle.remove()
        del self.encoder.feature_map  # the class's own comes back

    def rows(self, n: int) -> Tensor | None:
        """What was heard of n images, (n, V, D); None if nothing. Maps count where nothing was pooled."""
        found = self.features or self.maps
        return torch.cat([z.unflatten(0, (n, -1)) for z in found], 1) if found else None

    def embed(self, x: Tensor) -> Tensor:
        """The images (B, C, H, W) the way the task had its own, (B, D)."""
        return self.encoder(x) if self.features else self.encoder.feature_map(x).mean((2, 3))
