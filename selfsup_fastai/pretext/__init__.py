"""Pretext tasks: questions about unlabeled images whose answers come for free. `TASKS` is the one table of them."""

from importlib import import_module
from typing import TYPE_CHECKING

from selfsup_fastai.errors import TaskError, did_you_mean, unknown

if TYPE_CHECKING:
    from pandas import DataFrame

    from selfsup_fastai.pretext.base import PretextTask

# name -> 'module:class' below this package; imported only when asked for, so that the CLI starts at once
TASKS = {
    "rotation": "predictive.rotation:Rotation",
    "jigsaw": "predictive.jigsaw:Jigsaw",
    "relative_position": "predictive.relative_position:RelativePosition",
    "aet": "predictive.aet:AET",
    "spot_artifacts": "predictive.spot_artifacts:SpotArtifacts",
    "counting": "predictive.counting:Counting",
    "exemplar": "predictive.exemplar:Exemplar",
    "dicom_tags": "predictive.dicom_tags:DicomTags",
    "slice_order": "predictive.slice_order:SliceOrder",
    "autoencoder": "generative.autoencoder:Autoencoder",
    "inpainting": "generative.inpainting:Inpainting",
    "colorization": "generative.colorization:Colorization",
    "split_brain": "generative.split_brain:SplitBrain",
    "models_genesis": "generative.models_genesis:ModelsGenesis",
    "mae": "generative.mae:MAE",
    "simmim": "generative.simmim:SimMIM",
    "npid": "joint_embedding.npid:NPID",
    "pirl": "joint_embedding.pirl:PIRL",
    "moco": "joint_embedding.moco:MoCo",
    "mocov3": "joint_embedding.mocov3:MoCoV3",
    "simclr": "joint_embedding.simclr:SimCLR",
    "micle": "joint_embedding.micle:MICLe",
    "nnclr": "joint_embedding.nnclr:NNCLR",
    "byol": "joint_embedding.byol:BYOL",
    "simsiam": "joint_embedding.simsiam:SimSiam",
    "barlow_twins": "joint_embedding.barlow_twins:BarlowTwins",
    "vicreg": "joint_embedding.vicreg:VICReg",
    "dino": "joint_embedding.dino:DINO",
    "ijepa": "joint_embedding.ijepa:IJEPA",
    "deep_cluster": "clustering.deep_cluster:DeepCluster",
    "nat": "clustering.nat:NAT",
    "swav": "clustering.swav:SwAV",
}


def task_class(name: str) -> "type[PretextTask]":
    """The class of the task called `name`; `UnknownNameError` with the nearest name if there is none."""
    if not isinstance(name, str) or name not in TASKS:
        raise unknown("pretext task", name, TASKS)
    module, cls = TASKS[name].split(":")
    return getattr(import_module(f"{__name__}.{module}"), cls)


def get_task(
    task: "str | PretextTask | type[PretextTask] | list",  # A name in TASKS, 'rotation+jigsaw', a task, several
    **settings,  # Of the task, e.g. turns='one'; of several: weights, and a dict for each, rotation={'turns': 'one'}
) -> "PretextTask":
    """The task, ready to be used. `TaskError` for a setting that the task does not have."""
    from selfsup_fastai.pretext.base import PretextTask

    if isinstance(task, str) and "+" in task:
        task = task.split("+")
    if isinstance(task, (list, tuple)):
        return _several(task, settings)
    if isinstance(task, PretextTask):
        if settings:
            raise TaskError(
                f"The task is already made: give {', '.join(settings)} to {type(task).__name__}(...) itself."
            )
        return task
    cls = task if isinstance(task, type) and issubclass(task, PretextTask) else task_class(task)
    known = cls.setting_names()
    wrong = [name for name in settings if name not in known]
    if wrong:
        hint = did_you_mean(wrong[0], known)
        raise TaskError(f"{cls.name} has no setting {wrong[0]!r}; it has {', '.join(known) or 'none'}.{hint}")
    return cls(**settings)


def _several(tasks: list, settings: dict) -> "PretextTask":
    from selfsup_fastai.pretext.multi import SeveralTasks

    if len(tasks) == 1:
        return get_task(tasks[0], **settings)
    weights = {"weights": settings.pop("weights")} if "weights" in settings else {}
    made = [get_task(task, **_own(task, settings)) for task in tasks]
    if settings:
        name, value = next(iter(settings.items()))
        owner = next((task.name for task in made if name in task.setting_names()), made[0].name)
        known = ", ".join(["weights", *(task.name for task in made)])
        raise TaskError(
            f"Several tasks have no setting {name!r}; they have {known}. A setting of one of them is given as "
            f"{owner}={{{name!r}: {value!r}}}, in the shell as --set {owner}.{name}={value}."
        )
    return SeveralTasks(made, **weights)


def _own(task, settings: dict) -> dict:
    """The settings of one of several tasks, taken out of those of all."""
    own = settings.pop(task if isinstance(task, str) else getattr(task, "name", ""), {})
    if not isinstance(own, dict):
        example = "rotation={'turns': 'one'}"
        raise TaskError(f"The settings of one of several tasks are a dict, such as {example}; got {own!r}.")
    return own


def list_tasks() -> "DataFrame":
    """A table of the tasks: what is asked, kind, channels of the images, paper, and passes through the encoder."""
    import pandas as pd

    classes = [task_class(name) for name in TASKS]
    rows = [(c.name, c.kind(), _images(c()), c.asks(), c.paper, c().passes) for c in classes]
    table = pd.DataFrame(rows, columns=["task", "kind", "images", "what is asked", "paper", "passes"])
    return table.set_index("task")


def _images(task: "PretextTask") -> str:
    return "any" if 1 in task.channels else "color"
