"""A pretrained encoder on labeled images: `downstream_learner` and its gradual `fine_tune`."""

import warnings
from collections.abc import Callable, Iterator, MutableSequence
from contextlib import contextmanager
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import fastai.vision.learner  # noqa: F401  (registers how results on images are shown)
import pandas as pd
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner, defaults
from fastai.metrics import accuracy
from fastai.optimizer import Optimizer, OptimWrapper
from fastai.vision.core import TensorPoint
from fastai.vision.data import get_grid
from fastcore.foundation import L
from matplotlib.axes import Axes

from selfsup_fastai.callbacks.aside import LooksAside
from selfsup_fastai.callbacks.count import CountImages
from selfsup_fastai.callbacks.keep_best import KeepBest
from selfsup_fastai.callbacks.log import LossesAsNumbers
from selfsup_fastai.callbacks.speed import sped_up
from selfsup_fastai.callbacks.syncs import LossesThere
from selfsup_fastai.callbacks.whole_run import WholeRun, whole_run
from selfsup_fastai.data.loader import derive_loaders, measure_stats, n_in_of, needs_resize, seen_as
from selfsup_fastai.data.subsets import hold_out
from selfsup_fastai.downstream.linear_models import score_of
from selfsup_fastai.downstream.models import DownstreamModel, head_maker, layer_groups
from selfsup_fastai.downstream.points import in_original
from selfsup_fastai.downstream.saving import save_model
from selfsup_fastai.downstream.schedule import (
    HEAD_PCT,
    NORMS,
    FrozenNorms,
    Rates,
    Stage,
    StageLog,
    plan,
    planned_rates,
    stage_rates,
    stages,
)
from selfsup_fastai.downstream.segmentation import KnownCodes
from selfsup_fastai.downstream.targets import KINDS, Target, ignored_value, in_words, target_of
from selfsup_fastai.downstream.trained import Facts, TrainedModel, activation_of, resize_of
from selfsup_fastai.encoders.checkpoint import copied_encoder, get_encoder, is_fresh, save_encoder
from selfsup_fastai.encoders.encoder import PUBLISHED, Encoder
from selfsup_fastai.encoders.inputs import CHANNELS, ToInput
from selfsup_fastai.errors import DataError, TaskError, unknown
from selfsup_fastai.messages import say
from selfsup_fastai.metrics import Dice, OfAll
from selfsup_fastai.optimizers import FusedAdam
from selfsup_fastai.pictures import plot_rates
from selfsup_fastai.plots import ShownFrame
from selfsup_fastai.processes import check_single
from selfsup_fastai.seeding import preserved_rng

_FORMATS = {"lr_min": "{:.1e}".format, "lr_max": "{:.1e}".format, "parameters": "{:,}".format}


class DownstreamLearner(LooksAside, Learner):
    """A fastai `Learner` for a `DownstreamModel`, with gradual unfreezing; made by `downstream_learner`."""

    def __init__(
        self,
        dls: DataLoaders,  # Labeled images as the encoder wants them
        model: DownstreamModel,  # What is trained
        target: Target | None = None,  # What it predicts
        cbs: Callback | MutableSequence | None = None,  # As in `Learner`
        **kwargs,  # Passed to `Learner`
    ):
        self.epochs_done, self.images_seen, self.last_values, self.target = 0, 0, {}, target
        cbs = [CountImages(), LossesAsNumbers(), LossesThere(), *L(cbs)]
        super().__init__(dls, model, splitter=layer_groups, cbs=cbs, **kwargs)
        self.fine_tune_log = pd.DataFrame()  # the last run of `fine_tune`: stage, epoch, losses, metrics

    def create_opt(self) -> None:
        """fastai's, with weight decay switched off where the net asks for it (position embeddings, class tokens).

        A torch optimizer in an `OptimWrapper` decays as it was told: it knows nothing of fastai's `do_wd`.
        """
        super().create_opt()
        parameters = dict(self.model.encoder.named_parameters())
        for name in self.model.encoder.no_weight_decay() & parameters.keys():
            self.opt.state[parameters[name]]["do_wd"] = False

    def fine_tune_plan(
        self,
        epochs: int,  # As in `fine_tune`
        base_lr: float = 2e-3,  # As in `fine_tune`
        freeze_epochs: int = 1,  # As in `fine_tune`
        schedule: str = "gradual",  # As in `fine_tune`
        lr_mult: float = 100,  # As in `fine_tune`
        layer_decay: float | None = None,  # As in `fine_tune`
        pct_start: float = 0.3,  # As in `fine_tune`
        div: float = 5.0,  # As in `fine_tune`
        stage_epochs: int | None = None,  # As in `fine_tune`
    ) -> ShownFrame:
        """What `fine_tune` with these arguments will do: one row a stage; `.show()` draws the rates over time."""
        groups, rates = layer_groups(self.model), Rates(base_lr, lr_mult, layer_decay)
        run = stages(len(groups), epochs, freeze_epochs, schedule, stage_epochs=stage_epochs)
        names = [*self.model.encoder.group_names(), "head"]
        table = plan(run, names, [sum(p.numel() for p in group) for group in groups], rates)
        shapes = [_shape(stage, pct_start, div) for stage in run]
        return ShownFrame(table, plot=partial(_drawn, planned_rates(run, names, rates, shapes)))

    def fine_tune(
        self,
        epochs: int,  # Epochs after the head's own
        base_lr: float = 2e-3,  # Peak rate of the head while it is alone; half of it is the highest rate afterwards
        freeze_epochs: int = 1,  # Epochs of the head alone
        schedule: str = "gradual",  # 'gradual', 'two_stage' (fastai's), 'all', 'lp_ft'; see `downstream.schedule`
        lr_mult: float = 100,  # The stem learns so many times slower than the head
        layer_decay: float | None = None,  # In place of lr_mult: each group at so much of the rate of the group above
        norms: str | None = None,  # 'eval', 'train' or 'still', see below; None: 'train' with two_stage, else 'eval'
        best: str | None = None,  # Keep the weights of the best epoch by this: 'valid_loss' or a metric's name
        patience: int | None = None,  # Stop after so many epochs without a better one; goes with `best`
        holdout: float = 0.2,  # With `best`: share of the training images to judge by; 0: judge by `dls.valid`
        pct_start: float = 0.3,  # Part of each later stage in which rates rise
        div: float = 5.0,  # Each later stage starts at its peak rates divided by this
        stage_epochs: int | None = None,  # gradual: of the stages between; None: a tenth of `epochs`, at least 1
        cbs: Callback | MutableSequence | None = None,  # Callbacks for every stage
        **kwargs,  # Passed to `fit_one_cycle`
    ) -> None:
        """Train the head, then more and more of the encoder from the top (Howard & Ruder 2018), each stage one-cycle.

        Rates spread from `base_lr / 2 / lr_mult` at the stem to `base_lr / 2` at the head. `epochs + freeze_epochs`
        is the total over all stages, whatever the schedule. The plan is shown first; `fine_tune_log` and the recorder
        hold the whole run. `norms`: with 'eval' norm layers of frozen groups hold still, weights and statistics; with
        'train' they learn, as in fastai; with 'still' the statistics of all norm layers stay those of pretraining.

        With `best` the weights are at the end those of the epoch that was best on images that are taken out of the
        training data for it (of each class the same share, at least one image), so that `dls.valid` can be the test
        set: it is not looked at. Raises `TaskError` where an argument makes no sense, `UnknownNameError` for another
        schedule or norm policy.
        """
        if norms not in (None, *NORMS):
            raise unknown("norm policy", norms, NORMS)
        norms = norms or ("train" if schedule == "two_stage" else "eval")
        shape = (pct_start, div, stage_epochs)
        table = self.fine_tune_plan(epochs, base_lr, freeze_epochs, schedule, lr_mult, layer_decay, *shape)
        if patience is not None and best is None:
            raise TaskError("patience goes with best, such as best='valid_loss': without, no epoch is better.")
        keeper = [KeepBest(best, patience)] if best else []
        say(table.to_string(index=False, formatters=_FORMATS))
        n_groups, log = len(layer_groups(self.model)), StageLog()
        run = stages(n_groups, epochs, freeze_epochs, schedule, stage_epochs=stage_epochs)
        with self._norm_policy(norms) as norm_cbs, self._judged_by(holdout if best else 0):
            cbs = [*L(cbs), *norm_cbs, *keeper, log]
            try:
                with whole_run(self, cbs, epochs + freeze_epochs):
                    self._fit_stages(run, Rates(base_lr, lr_mult, layer_decay), pct_start, div, cbs, **kwargs)
            finally:
                self.fine_tune_log = pd.DataFrame(log.rows)

    def _fit_stages(self, run: list[Stage], rates: Rates, pct_start: float, div: float, cbs: list, **kwargs) -> None:
        n_groups = len(self.opt.param_lists)
        for stage in run:
            if any(isinstance(cb, WholeRun) and cb.stopped for cb in [*cbs, *self.cbs]):
                break
            self._freeze_before(stage.first)
            shape = {**_shape(stage, pct_start, div), **kwargs}
            self.fit_one_cycle(stage.epochs, stage_rates(stage, n_groups, rates), cbs=cbs, **shape)

    @contextmanager
    def _judged_by(self, holdout: float) -> Iterator[None]:
        """Training images are held out to validate with; what `dls.valid` holds is left alone meanwhile."""
        dls = self.dls
        if holdout:
            self.dls = hold_out(dls, holdout)
            kept, out = len(self.dls.train_ds), len(self.dls.valid_ds)
            say(f"{out:,} of {kept + out:,} training images are held out to choose the best epoch by.")
        elif len(dls.loaders) < 2:
            fix = "Add one (an empty one will do), or pass best='valid_loss', which holds training images out."
            raise DataError(f"These DataLoaders have no loader to validate with. {fix}")
        try:
            yield
        finally:
            self.dls = dls

    def _freeze_before(self, first: int) -> None:
        """fastai's `freeze_to`, also after earlier training: weights with an old gradient, even 0, would decay."""
        self.freeze_to(first)
        for p in self.model.parameters():
            if not p.requires_grad:
                p.grad = None

    @contextmanager
    def _norm_policy(self, norms: str) -> Iterator[list[Callback]]:
        """See `fine_tune`."""
        if self.opt is None:
            self.create_opt()
        if norms == "train":
            yield []
            return
        train_bn = self.train_bn
        self._set_train_bn(False)
        try:
            yield [FrozenNorms(everywhere=norms == "still")]
        finally:
            self._set_train_bn(train_bn)

    def _set_train_bn(self, train_bn: bool) -> None:
        self.train_bn = train_bn
        for state in self._bn_bias_state(False):
            state["force_train"] = train_bn

    def predict(self, item: Any, rm_type_tfms: int | None = None, with_input: bool = False) -> tuple:
        """fastai's (label, its number or values, probabilities); points are in pixels of the image as it was opened.

        With `with_input` they are in pixels of that input, which may have another size.
        """
        with warnings.catch_warnings():  # fastai's DiceMulti takes the mean over the labels, of which there are none
            warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
            result = super().predict(item, rm_type_tfms, with_input)
        if with_input or getattr(self.target, "kind", None) != "points":
            return result
        points, *others = result
        dl = self.dls.test_dl([item], rm_type_tfms=rm_type_tfms, num_workers=0)
        original = in_original(others[-1].view(-1, 2), dl)
        return (points if original is None else TensorPoint(original), *others)

    def show_results(
        self,
        ds_idx: int = 1,  # 0: training, 1: validation images
        dl: TfmdDL | None = None,  # In place of these
        max_n: int = 9,
        shuffle: bool = True,
        **kwargs,  # For fastai's `show_results`
    ) -> None:
        """fastai's; of several labels and of numbers, which fastai cannot show, the true ones above those predicted."""
        dl = self.dls[ds_idx].new(shuffle=shuffle) if dl is None else dl
        if getattr(self.target, "kind", None) not in ("multicategory", "regression"):
            super().show_results(ds_idx, dl, max_n, shuffle, **kwargs)
            return
        b = dl.one_batch()
        _, _, preds = self.get_preds(dl=[b], with_decoded=True)
        true, predicted = (dl.decode_batch((b[0], y), max_n=max_n) for y in (b[1], preds))
        axes = get_grid(len(true), title="Target/Prediction", **kwargs)
        for ax, (image, label), (_, said) in zip(axes, true, predicted):
            image.show(ctx=ax, title=f"{in_words(label)}\n{in_words(said)}")

    def save_encoder(
        self,
        file: str | PathLike,  # Where to; `.safetensors` is added if missing
    ) -> Path:
        """Save the trained encoder, without the head; its lineage names this round too. Returns the file's path."""
        return save_encoder(self.model.encoder, file, **self.this_round(), metrics=self._scores())

    def save_model(
        self,
        file: str | PathLike,  # Where to; `.safetensors` is added if missing
    ) -> Path:
        """Save encoder, head and the names of the classes; `load_trained` reads it. Returns the file's path.

        Unlike fastai's `export` it holds no code: whoever loads it runs nothing. What turned files into images other
        than a resize, and augmentation, is not in it.
        """
        return save_model(self.trained_model(), file, **self.this_round(), metrics=self._scores())

    def trained_model(self) -> TrainedModel:
        """The model with what is known of its predictions, as `load_trained` gives it; with the learner's weights."""
        target, threshold = self.target, getattr(self.loss_func, "thresh", 0.5)
        dl = self.dls.valid if len(self.dls.loaders) > 1 and len(self.dls.valid) else self.dls.train
        kept = {
            "size": _seen_size(dl) if len(dl.dataset) else None,
            "resize": resize_of(dl),
            "threshold": float(threshold),
        }
        activation = activation_of(self.loss_func, target.kind)
        return TrainedModel(self.model, Facts(**vars(target), **kept, activation=activation))

    def _scores(self) -> dict[str, float]:
        return {name: float(value) for name, value in self.last_values.items() if value is not None}

    def this_round(self) -> dict:
        """What the lineage of an encoder tells of its training by this learner, by `fine_tune` and every other fit."""
        seen = seen_as(self.dls)
        scans = {"data": {"scans": seen}} if seen else {}
        return {"task": "fine_tune", "epochs": self.epochs_done, "images": self.images_seen, **scans}


def _shape(stage: Stage, pct_start: float, div: float) -> dict:
    """Of a stage's one cycle, as in fastai's `fine_tune`: the head's own rate rises nearly to the end."""
    one_cycle = {"div": 25.0, "pct_start": HEAD_PCT} if stage.head_only else {"div": div, "pct_start": pct_start}
    return {**one_cycle, "div_final": 1e5}


def _drawn(rates: pd.DataFrame, _table: pd.DataFrame, ax: Axes | None) -> Axes:
    return plot_rates(rates, ax)


def downstream_learner(
    dls: DataLoaders,  # Labeled images: categories, several of them, numbers, points or masks
    encoder: Any,  # A file from `save_encoder`, a learner, an `Encoder`, an `nn.Module` or a timm name
    n_out: int | None = None,  # Outputs of the head; None: what the labels need
    metrics: Callable | MutableSequence | None = None,  # None: accuracy, mAP, R2 or Dice, by the labels; []: none
    pretrained: bool = False,  # For a timm name: start from timm's weights (downloaded)
    n_in: int | None = None,  # For a new net: channels; None: 1 if the first images are all grey, else 3
    dropout: float = 0.0,  # Before the head's linear layer
    loss_func: Callable | None = None,  # None: what the labels need
    opt_func: Optimizer | OptimWrapper | Callable = FusedAdam,  # As in `Learner`; it is fastai's Adam, in one go
    lr: float | slice = defaults.lr,  # Default rate of `fit`; `fine_tune` has its own
    wd: float | None = None,  # Weight decay; None: the optimizer's
    cbs: Callback | MutableSequence | None = None,  # As in `Learner`
    path: str | PathLike | None = None,  # For fastai's `save` and `export`; None: the current folder
    model_dir: str | PathLike = "models",  # Folder below `path`
    *,
    precision: str | None = None,  # 'bf16', 'fp16', 'fp32' or 'auto': what a few timed steps prefer; None: fp32
    channels_last: bool | None = None,  # In memory; None: with precision='auto' where it pays, else not
    compile: bool = False,  # By torch.compile: minutes at first and after each stage, then faster steps
    checkpointing: bool = False,  # Less memory, slower; for more images in a step also fastai's GradientAccumulation
) -> DownstreamLearner:
    """A learner that trains a copy of `encoder` with a head on labeled images; `fine_tune` is its main call.

    The labels decide on the head: for masks the decoder of a U-Net, for points one that finds places, else a linear
    layer (`downstream.targets`, `downstream.models`).
    `dls` and `encoder` stay as they are: the learner has loaders of its own that open images with the encoder's
    channels and normalize with its statistics (those of the training images where it has none). Images of different
    sizes that nothing in `dls` resizes are resized to the encoder's size; for a new net to 128 pixels, 224 with
    published weights. One line says so.
    What precision='auto' takes depends on how busy the machine is, and results differ by rounding: that is why it is
    not the default.
    Raises `DataError` for data that is no labeled `DataLoaders`, `TaskError` for labels that it cannot train on,
    `SelfsupError` in one of several processes.
    """
    check_single("Fine-tuning")
    ignored = ignored_value(loss_func)
    target = target_of(dls, n_out, ignored)
    metrics = default_metrics(target, ignored) if metrics is None else metrics
    loss_func = loss_func or getattr(dls.train_ds, "loss_func", None) or KINDS[target.kind].loss()
    encoder, loaders = _adapt(dls, encoder, n_in, pretrained, target.kind)
    path = Path.cwd() if path is None else path  # never the folder of images that the dls bring
    model = DownstreamModel(encoder, head_maker(target, encoder, dropout)())
    cbs = [*L(cbs), *([KnownCodes(target.n_out, ignored)] if target.kind == "mask" else [])]
    cbs += sped_up(model, loaders.device, precision, channels_last, compile, checkpointing)
    training = {"loss_func": loss_func, "opt_func": opt_func, "lr": lr, "wd": wd, "cbs": cbs}
    return DownstreamLearner(loaders, model, target, metrics=metrics, path=path, model_dir=model_dir, **training)


def default_metrics(
    target: Target,
    ignored: int | None = None,  # A value of masks that does not count
) -> list:
    """What a comparison scores such labels by."""
    if target.kind == "category":
        return [accuracy]
    if target.kind == "mask":
        return [Dice(target.n_out, ignored)]
    kind = "regression" if target.kind == "points" else target.kind
    return [OfAll(KINDS[target.kind].score, partial(score_of, kind))]


def _adapt(dls: DataLoaders, source: Any, n_in: int | None, pretrained: bool, kind: str) -> tuple[Encoder, DataLoaders]:
    """An encoder of the learner's own and loaders that suit it; says what was adapted."""
    mixed, whole = needs_resize(dls), kind in ("mask", "points")  # nothing that is labeled may be cut off
    if is_fresh(source):
        origin = PUBLISHED if pretrained else "new"
        n_in = n_in or n_in_of(dls)
        side = (224 if pretrained else 128) if mixed else None
        loaders = derive_loaders(dls, n_in=n_in, resize=side, whole=whole)
        encoder = get_encoder(source, n_in=n_in, size=_image_size(loaders), pretrained=pretrained)
    else:
        encoder = copied_encoder(source, n_in, pretrained)
        origin = encoder.lineage[-1].get("task") if encoder.lineage else None
        side = (encoder.size or 128) if mixed else None
        loaders = derive_loaders(dls, n_in=encoder.image_channels, resize=side, whole=whole)
    own_stats = encoder.mean is not None
    if not own_stats:
        encoder.mean, encoder.std = measure_stats(loaders)
    say(_adapted(encoder, origin, own_stats, side))
    _say_windows(encoder, seen_as(dls))
    eaten = [ToInput(encoder.input)] if encoder.input in CHANNELS else []
    return encoder, derive_loaders(loaders, stats=(encoder.mean, encoder.std), add=eaten)


def _image_size(dls: DataLoaders) -> int | None:
    """The side of the images that the net will see; None where they are not square."""
    dl = dls.valid if len(dls.loaders) > 1 and len(dls.valid) else dls.train
    height, width = _seen_size(dl)
    return height if height == width else None


def _seen_size(dl: TfmdDL) -> tuple[int, int]:
    """Height and width of the images of a batch."""
    with preserved_rng():
        height, width = dl.one_batch()[0].shape[-2:]
    return height, width


def _say_windows(encoder: Encoder, seen: str | None) -> None:
    """Says where scans are seen in other windows than those that the encoder was trained on."""
    known = [(card.get("data") or {}).get("scans") for card in encoder.lineage]
    if seen and known and known[-1] and known[-1] != seen:
        say(f"The encoder was trained on scans seen {known[-1]}; these are seen {seen}. Alike would be better.")


def _adapted(encoder: Encoder, origin: str | None, own_stats: bool, side: int | None) -> str:
    """One line: which encoder, and what was done to the images for it."""
    size = f"{encoder.size} px" if encoder.size else None
    channels = f"{encoder.in_chans} channel{'s' if encoder.in_chans > 1 else ''}"
    facts = ", ".join(str(fact) for fact in (origin, size, channels) if fact)
    color = {1: "grey", 3: "color"}.get(encoder.image_channels, channels)
    color += f" and turned into {encoder.input}" if encoder.input in CHANNELS else ""
    stats = "the encoder's" if own_stats else "their own"
    name = encoder.arch or type(encoder.body).__name__
    resized = f", resized from different sizes to {side} px" if side else ""
    return f"encoder {name} ({facts}): labeled images opened as {color}{resized}, normalized with {stats} statistics"
