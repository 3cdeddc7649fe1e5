"""`pretext_learner`: unlabeled loaders and a task's name -> a fastai `Learner` that trains an encoder."""

from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import fastai.callback.progress
import fastai.callback.schedule  # noqa: F401  (brings fit_one_cycle, lr_find and so on)
import torch
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders, Datasets, TfmdLists
from fastai.learner import Learner, defaults
from fastai.torch_core import to_detach
from fastcore.basics import noop
from fastcore.foundation import L
from torch import Tensor, nn

from selfsup_fastai.callbacks.accumulation import RefuseAccumulation
from selfsup_fastai.callbacks.aside import LooksAside
from selfsup_fastai.callbacks.collapse import CollapseAlarm
from selfsup_fastai.callbacks.consistency import Consistency
from selfsup_fastai.callbacks.count import CountImages
from selfsup_fastai.callbacks.data_parallel import DataParallel, ShareMetrics
from selfsup_fastai.callbacks.log import LossesAsNumbers
from selfsup_fastai.callbacks.speed import sped_up
from selfsup_fastai.callbacks.syncs import LossesThere
from selfsup_fastai.data.blocks import OpenImage
from selfsup_fastai.data.loader import (
    IndexedDL,
    are_scans,
    check_dls,
    derive_loaders,
    measure_stats,
    n_in_of,
    needs_resize,
    seen_as,
    take_parts,
)
from selfsup_fastai.encoders.card import ROUND
from selfsup_fastai.encoders.checkpoint import copied_encoder, get_encoder, is_fresh, save_encoder
from selfsup_fastai.encoders.encoder import Encoder
from selfsup_fastai.encoders.inputs import CHANNELS, ToInput
from selfsup_fastai.encoders.tensor_files import with_suffix
from selfsup_fastai.errors import DataError, TaskError
from selfsup_fastai.messages import say
from selfsup_fastai.optimizers import FusedAdam
from selfsup_fastai.pretext import TASKS, get_task
from selfsup_fastai.pretext.base import PretextLoss, PretextTask
from selfsup_fastai.pretext.loader import PretextDL, PretextTransform
from selfsup_fastai.pretext.multi import SeveralTasks
from selfsup_fastai.processes import alone, is_first, join, n_processes, of_all, rank, shared, told
from selfsup_fastai.seeding import part_seed, preserved_rng

LINE = "\n       "  # Between the answers of several tasks
LEAST_SAID = 0.01  # of a network's parameters: less is a norm, which is not random before it is trained


def pretext_learner(
    dls: DataLoaders,  # Images: UnlabeledDataLoaders, or any fastai image loaders (labels are not used)
    task: str | PretextTask | list | None = None,  # A name in TASKS, a task, several; None: `dls`' PretextTransform
    arch: str | Callable | nn.Module | None = None,  # timm name, torchvision constructor, or a module; None: the task's
    *,
    encoder: Any = None,  # Instead of `arch`: a saved encoder, an Encoder or a learner to go on from (a further round)
    pretrained: bool = False,  # Start from timm's weights for `arch`
    n_in: int | None = None,  # Channels, 1 or 3; None: what the images need
    consistency: float | Consistency | None = None,  # Beside the task's loss: its weight, or a `Consistency`
    metrics=None,  # None: the task's
    precision: str | None = None,  # 'bf16', 'fp16', 'fp32' or 'auto': what a few timed steps prefer; None: fp32
    channels_last: bool | None = None,  # In memory; None: with precision='auto' where it pays, else not
    compile: bool = False,  # By torch.compile: minutes at first, then faster steps
    checkpointing: bool = False,  # Less memory, slower; for more images in a step also fastai's GradientAccumulation
    opt_func: Callable = FusedAdam,  # fastai's Adam, in one go
    lr: float = defaults.lr,
    wd: float | None = None,
    cbs=None,
    path: str | Path | None = None,  # For fastai's `save` and `export`; None: the current folder
    model_dir: str | Path = "models",
    **settings,  # Of the task, e.g. turns='one'
) -> "PretextLearner":
    """A learner that trains an encoder by a pretext task; every verb of fastai's `Learner` works.

    `dls` stays as it is: loaders of their own are derived, with the labels left out and the images normalized by the
    statistics of at least 1,024 of the training images (or the pretrained encoder's), measured here. Images of
    different sizes that nothing in `dls` resizes are resized to the given encoder's size, or to 128 pixels; one line
    says so. An encoder, learner or module that is given stays as it is, too: a copy is trained.
    What precision='auto' takes depends on how busy the machine is, and results differ by rounding: that is why it is
    not the default. For the same result from the same seed name a precision.
    In several processes (started by `torchrun`, `accelerate launch` or `selfsup pretrain --nproc`) the same call trains
    one model in all of them, each with a part of every batch, `bs` images.
    Raises `TaskError` for settings that the task does not have and for arguments that ask for two nets at once.
    """
    join()
    check_dls(dls)
    task = _task_of(dls, task, settings)
    if isinstance(dls.train_ds, Datasets) and len(dls.train_ds.tls) > dls.train_ds.n_inp:
        say("The labels are not used for pretraining.")
    plain = derive_loaders(dls, dl_type=IndexedDL, inputs_only=True, drop=(PretextTransform,))
    own = task.arch_settings if arch is None and encoder is None and not pretrained else lambda side: {}
    encoder, plain, measured = _prepare(plain, _source(arch, encoder, task), n_in, pretrained, task, own)
    if consistency is not None and not isinstance(consistency, Consistency):
        consistency = Consistency(consistency)
    asked = [PretextTransform(task, consistency)]
    if not task.input and encoder.input in CHANNELS:
        task.check_shape((1, encoder.in_chans, task.min_side, task.min_side))
        asked.insert(0, ToInput(encoder.input))
    pretext = derive_loaders(plain, dl_type=PretextDL, stats=(encoder.mean, encoder.std), add=asked)
    if are_scans(plain):
        _suit_scans(task, settings)
    take_parts(pretext)
    task.setup(pretext, encoder)
    if len(measured[0]) == 1:  # the mean of one channel
        _say_idle(task)
    if task.by_map:
        _say_untrained(task, encoder)
    path = Path.cwd() if path is None else path  # never the folder of images that labeled dls bring
    fastai_args = {"opt_func": opt_func, "lr": lr, "wd": wd, "model_dir": model_dir, "path": path}
    model = task.model(encoder)
    faster = sped_up(model, pretext.device, precision, channels_last, compile, checkpointing)
    fastai_args |= {"metrics": task.metrics if metrics is None else metrics, "cbs": [*faster, *L(cbs)]}
    if consistency is not None:
        consistency.setup(task, model, pretext)
    take_parts(pretext)  # a task may have changed the loaders
    data = _data_print(pretext, measured)
    _meet(model, data)
    return PretextLearner(pretext, task, model, data=data, consistency=consistency, **fastai_args)


def _meet(model: nn.Module, data: dict) -> None:
    """Several processes begin with one model, and draw each its own from now on. Raises `DataError` where they see
    different images."""
    if n_processes() == 1:
        return
    if any(other != data for other in of_all(data)):
        raise DataError("The processes do not see the same images. Give all of them the same folder and settings.")
    shared(model)
    if not is_first():
        torch.manual_seed(part_seed(torch.initial_seed(), rank()))


def _task_of(dls: DataLoaders, task, settings: dict) -> PretextTask:
    if task is not None:
        return deepcopy(get_task(task, **settings))  # a task learns things about its images in `setup`
    if isinstance(dls.train, PretextDL):
        return deepcopy(get_task(dls.train.task, **settings))
    raise TaskError(f"Which task? pretext_learner(dls, 'rotation'), for one. There are: {', '.join(TASKS)}.")


def _source(arch: object, encoder: object, task: PretextTask) -> object:
    if encoder is None:
        return task.arch if arch is None else arch
    if arch is not None:
        given = arch if isinstance(arch, str) else getattr(arch, "__name__", type(arch).__name__)
        raise TaskError(f"arch={given!r} goes with a new net, but encoder= brings one. Leave one of the two out.")
    return encoder


def _prepare(plain: DataLoaders, source: object, n_in: int | None, pretrained: bool, task: PretextTask, own: Callable):
    """An encoder of the learner's own, loaders that suit it, and the statistics (mean, std) of their images.

    `own` gives arguments for a fresh network's constructor, from the side of the images in pixels.
    """
    kept = copied_encoder(source, n_in, pretrained) if _is_kept(source) else None
    if needs_resize(plain):
        resize = (kept.size if kept else None) or 128
        plain = derive_loaders(plain, resize=resize)
        say(f"The images differ in size: resized to {resize} px.")
    with preserved_rng():
        height, width = plain.train.new(shuffle=False, num_workers=0).one_batch()[0].shape[-2:]
    side = min(height, width)
    channels = _channels_for(kept, plain) if kept else n_in or n_in_of(plain)
    if kept:
        _say_fitted(kept, plain, task)
    task.check_shape((1, channels, height, width))  # now, not in the middle of the first epoch
    n_net = CHANNELS.get(task.input, channels)
    encoder = kept or get_encoder(source, n_net, side, pretrained, task.split, **own(side))
    if task.input:
        _feed(encoder, task, fresh=not kept)
    plain = derive_loaders(plain, n_in=channels)
    measured = measure_stats(plain)
    if encoder.mean is None:
        encoder.mean, encoder.std = measured
    if not (encoder.fixed_size and encoder.size):
        encoder.size = side
    return encoder, plain, measured


def _channels_for(encoder: Encoder, plain: DataLoaders) -> int:
    """Of images as they are opened for an encoder that exists. Edges are made of grey and color images alike."""
    return n_in_of(plain) if encoder.input == "sobel" else encoder.image_channels


def _say_fitted(encoder: Encoder, plain: DataLoaders, task: PretextTask) -> None:
    """Says how images are changed for an encoder that exists. Raises `TaskError` where the task suits them, not it."""
    has, takes = n_in_of(plain), _channels_for(encoder, plain)
    kind = "grey" if takes == 1 else "color"
    if takes not in task.channels and has in task.channels:
        fix = "Start with a new net (arch=), or choose another task."
        raise TaskError(f"The given encoder takes {kind} images, with which {task.name} cannot work. {fix}")
    if has != takes:
        say(f"The encoder takes {kind} images: {'these are made grey' if takes == 1 else 'grey ones are repeated'}.")


def _feed(encoder: Encoder, task: PretextTask, fresh: bool) -> None:
    """See to it that the encoder eats what the task makes of images."""
    if fresh:
        encoder.eat(task.input)
    elif task.split and not encoder.split:
        fix = "Start it with a new net (arch=), or go on from an encoder that it has trained before."
        raise TaskError(f"{task.name} needs an encoder of two halves, this one ({encoder.arch}) is one net. {fix}")
    elif encoder.input != task.input:
        fix = "Start it with a new net (arch=), or go on from an encoder of the same kind."
        raise TaskError(f"{task.name} feeds its encoder with {task.input}, this one eats {encoder.input}. {fix}")


def _suit_scans(task: PretextTask, settings: dict) -> None:
    """Nothing is mirrored unless asked for: left and right differ in a body. Raises `TaskError` for tasks of color."""
    for part in getattr(task, "tasks", [task]):
        if 1 not in part.channels:
            raise TaskError(f"{part.name} asks about colors, and these are scans: three channels are windows of one.")
        asked = {**part.given(), **settings, **(settings.get(part.name) or {})}
        if "flip" in part.setting_names() and "flip" not in asked and part.flip:
            part.flip = type(part.flip)(0)
            say(f"{part.name}: scans are not mirrored, as left and right differ in a body; flip=0.5 mirrors them.")


def _say_idle(task: PretextTask) -> None:
    """Settings that were given and do nothing, as the images are grey."""
    for part in getattr(task, "tasks", [task]):
        given = [f"{name}={value!r}" for name, value in part.given().items() if name in part.of_color]
        if given:
            say(f"{part.name}: these images are grey, so {' and '.join(given)} will change nothing.")


def _say_untrained(task: PretextTask, encoder: Encoder) -> None:
    """How much of the network lies behind its last map, if that is more than a norm."""
    behind, sizes = encoder.behind_map(), {name: p.numel() for name, p in encoder.named_parameters()}
    share = sum(sizes[name] for name in behind) / sum(sizes.values())
    if share >= LEAST_SAID:
        say(
            f"{share:.0%} of {encoder.arch} lies behind its last map, where {task.name} does not train it: the "
            "encoder's features pass through layers that stay as they are. ResNets and ViTs have none there."
        )


def _is_kept(source: object) -> bool:
    """Whether the encoder exists already; else one is made for these images, as from a module given as `arch`."""
    return isinstance(source, Encoder) or not (isinstance(source, nn.Module) or is_fresh(source))


def _data_print(dls: DataLoaders, stats: tuple[tuple[float, ...], tuple[float, ...]]) -> dict:
    """Enough to tell two data sets apart, nothing that leads back to a person or a file."""
    counts = [len(dl.dataset) for dl in dls.loaders]
    rounded = [round(v, 6) for values in stats for v in values]
    seen = seen_as(dls)
    scans = {"scans": seen} if seen else {}
    return {"images": counts, "print": sha256(repr((counts, rounded)).encode()).hexdigest()[:16], **scans}


class Answer(NamedTuple):
    """The question a task asked about one image, and what the network answered; a batch of one each."""

    task: PretextTask
    inputs: tuple
    targets: tuple
    pred: Any  # As `get_preds` returns it: probabilities, for a task that classifies
    decoded: Any  # As a person reads it

    def __repr__(self) -> str:
        parts = [(self.task, self.inputs, self.targets, self.decoded)]
        if isinstance(self.task, SeveralTasks):
            parts = self.task.parts(self.inputs, self.targets, self.decoded)
        lines = [f"{task.name}: asked {_said(known[0])}, answered {_said(named)}" for task, _, known, named in parts]
        return f"Answer({LINE.join(lines)}; show() draws it)"

    def show(self, **kwargs):
        """Question and answer as a picture."""
        return self.task.show(self.inputs, self.targets, pred=self.decoded, **kwargs)


def _said(values: Tensor | tuple) -> str:
    """A few numbers as they are, of a picture its shape."""
    if not isinstance(values, Tensor):
        return ", ".join(map(_said, values))
    return str(values.tolist()) if values.numel() <= 64 else f"an array of shape {tuple(values.shape)}"


class PretextLearner(LooksAside, Learner):
    """A fastai `Learner` of a pretext task. `learn.encoder` is what it is all about."""

    consistency: Consistency | None = None  # fastai puts the callback here, if there is one

    def __init__(
        self,
        dls: DataLoaders,  # Of `PretextDL`s
        task: PretextTask,
        model: nn.Module,  # The task's, with `.encoder`
        data: dict | None = None,  # What the card says of the images: their counts and a print
        consistency: Consistency | None = None,  # The one that the loaders carry, set up
        metrics=None,
        cbs=None,
        **kwargs,  # Of `Learner`
    ):
        self.data, self.epochs_done, self.images_seen, self.last_values = data or {}, 0, 0, {}
        passes, own = task.passes, task.callbacks()
        if consistency is not None:
            passes, own, metrics = passes + 1, own + consistency.callbacks(), [*L(metrics), consistency.metric()]
        always = [DataParallel(), ShareMetrics()]
        always += [RefuseAccumulation(), CountImages(passes), LossesAsNumbers(), LossesThere(), CollapseAlarm()]
        cbs = [*always, *own, *L(cbs)]
        super().__init__(dls, model, loss_func=PretextLoss(task), metrics=metrics, cbs=cbs, **kwargs)
        self.task = task
        if not is_first():  # who speaks
            self.remove_cb(ProgressCallback)
            self.logger = noop

    def fit(self, *args, **kwargs) -> None:
        """fastai's; where another process has ended, a `LostProcessError`."""
        with told():
            super().fit(*args, **kwargs)

    def get_preds(self, *args, dl=None, **kwargs):
        """fastai's, of all images, in one process by itself."""
        dl = dl.new() if getattr(dl, "part", None) else dl
        with alone():
            return super().get_preds(*args, dl=dl, **kwargs)

    def to_detach(self, b, cpu=True, gather=False):
        """fastai's, of the images of this process: `ShareMetrics` adds up what it comes to."""
        return to_detach(b, cpu, gather=False)

    @property
    def encoder(self) -> Encoder:
        """The network that is kept."""
        return self.task.product(self.model)

    def show_batch(self, **kwargs):
        """What the network is asked in training; of several tasks, what each asks about the same images."""
        task = self.dls.train.task
        with task.all_asked() if isinstance(task, SeveralTasks) else nullcontext():
            return self.dls.train.show_batch(**kwargs)

    def predict(self, item, **_) -> Answer:
        """The question for one image (path, array or PIL image), drawn as in validation, and the network's answer."""
        source = TfmdLists([item], OpenImage(n_in_of(self.dls)), split_idx=1, do_setup=False)
        dl = self.dls.valid.new(Datasets(tls=L([source])), bs=1, n=1, shuffle=False, drop_last=False, num_workers=0)
        b = dl.one_batch()
        pred, _, decoded = self.get_preds(dl=[b], with_decoded=True)
        return Answer(self.task, *dl.question(b), pred, decoded)

    def save_encoder(self, file: str | Path) -> Path:
        """The encoder and its card (`read_card(file)`) in a .safetensors file; returns its path.

        Of several processes the first one writes.
        """
        return save_encoder(self.encoder, file, **self._card()) if is_first() else with_suffix(file)

    def this_round(self) -> dict:
        """What the lineage of an encoder tells of its training by this learner."""
        card = self._card()
        return {key: card[key] for key in ROUND}

    def _consistency_settings(self) -> dict:
        return {"consistency": self.consistency.settings()} if self.consistency else {}

    def _card(self) -> dict:
        return {
            "task": self.task.name,
            "settings": self.task.settings() | self._consistency_settings(),
            "epochs": self.epochs_done,
            "images": round(self.images_seen),
            "data": self.data,
            "metrics": {name: float(value) for name, value in self.last_values.items() if value is not None},
        }
