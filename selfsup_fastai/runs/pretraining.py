"""A pretraining run, from a folder of images to a run folder (`runs.folder`)."""

from pathlib import Path

from fastai.torch_core import default_device, set_seed

from selfsup_fastai.callbacks.log import MetricsFile
from selfsup_fastai.callbacks.precision import check_precision
from selfsup_fastai.callbacks.resume import Resume
from selfsup_fastai.data.files import listed_in
from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.downstream.interpret import nearest_neighbors
from selfsup_fastai.downstream.schedule import check_count, check_positive
from selfsup_fastai.encoders.checkpoint import get_encoder
from selfsup_fastai.pictures import save_picture
from selfsup_fastai.pretext import get_task
from selfsup_fastai.pretext.learner import PretextLearner, pretext_learner
from selfsup_fastai.pretext.multi import SeveralTasks
from selfsup_fastai.processes import agreed, is_first, join, n_processes
from selfsup_fastai.runs.folder import LEFT_OUT, STATE, check_out, finished, is_unfinished, run_folder


def check_start(
    folder: str | Path,
    out: str | Path,
    overwrite: bool,
    resume: bool,
    precision: str | None,
) -> bool:
    """Whether the run goes on with one that was stopped. Raises what need not wait for images to be read."""
    goes_on = resume and is_unfinished(out)
    check_out(out, folder, overwrite or goes_on, resume)
    check_precision(precision, default_device().type)
    return goes_on


def pretrain(
    folder: str | Path,  # Of images, at any depth
    out: str | Path,  # The run's folder; made if missing
    task: str = "rotation",
    epochs: int = 20,
    lr: float = 3e-3,
    arch: str | None = None,  # None: the task's
    encoder: str | Path | None = None,  # Go on from a saved encoder
    pretrained: bool = False,
    seed: int = 42,
    settings: dict | None = None,  # Of the task
    overwrite: bool = False,  # Replace what an earlier run left in `out`
    resume: bool = False,  # Go on with the run of these arguments that was stopped or killed in `out`
    paths: bool = False,  # Write names of DICOM files, too: they may identify patients
    precision: str | None = None,  # As in `pretext_learner`; settings.json says what was chosen
    **data,  # Arguments of `UnlabeledDataLoaders.from_folder`
) -> PretextLearner:
    """Pretrains an encoder on a folder of images and leaves a run folder; returns the learner.

    While it trains its state is kept (`callbacks.resume`). With `resume` and no state it begins at the beginning.
    Several processes (torchrun, accelerate, `selfsup pretrain --nproc`) train one encoder; the first one writes.
    """
    join()
    out = agreed(str(out))
    check_count("epochs", epochs, 1)
    check_positive("lr", lr)
    goes_on = check_start(folder, out, overwrite, resume, precision)
    task = get_task(task, **(settings or {}))  # names and settings first: checking the images may take minutes
    run = dict(task=task.name, settings=task.settings(), epochs=epochs, lr=lr, arch=arch, pretrained=pretrained)
    run |= {name: value for name, value in data.items() if name not in ("num_workers", "cache", "max_gb")}
    run |= {"precision asked for": precision}
    state = Resume(Path(out) / STATE, about={**run, "seed": seed})
    if goes_on:
        state.check_about()
    source = get_encoder(encoder or arch or task.arch)  # a new net is made again later, to suit the images
    set_seed(seed, reproducible=True)
    with listed_in(str(Path(out) / LEFT_OUT)):
        dls = UnlabeledDataLoaders.from_folder(folder, seed=seed, **data)
    given = {} if encoder is None else {"encoder": source}
    learn = pretext_learner(dls, task, arch, pretrained=pretrained, precision=precision, **given)
    args = dict(task=learn.task.name, settings=learn.task.settings(), epochs=epochs, lr=lr, pretrained=pretrained)
    if not goes_on:
        state.clear()
    out = Path(out)
    if is_first():
        run_folder(out, [folder], learn, dls.report, {**args, "seed": seed, "processes": n_processes(), **data}, paths)
    learn.show_batch()
    if is_first():
        save_picture(out / "batch.png")
    chance = learn.task.levels() if isinstance(learn.task, SeveralTasks) else learn.task.chance()
    with finished(learn, out, chance):
        learn.fit_one_cycle(epochs, lr, cbs=[MetricsFile(out / "metrics.csv"), state])
    state.clear()
    if is_first():
        _pictures(learn, dls, out)
    return learn


def _pictures(learn: PretextLearner, dls: UnlabeledDataLoaders, out: Path) -> None:
    """What the network answers, and which images it finds alike."""
    with learn.no_bar(), learn.no_logging():
        learn.show_results()
    save_picture(out / "results.png")
    nearest_neighbors(learn.encoder, dls.valid)
    save_picture(out / "neighbors.png")
