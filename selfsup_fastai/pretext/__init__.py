"""Pretext tasks: questions about unlabeled images whose answers come for free. `TASKS` is the one table of them."""

from importlib import import_module
from typing import TYPE_CHECKING

from selfsup_fastai.errors import TaskError, unknown

if TYPE_CHECKING:
    from pandas import DataFrame

    from selfsup_fastai.pretext.base import PretextTask

# name -> 'module:class' below this package; imported only when asked for, so that the CLI starts at once
TASKS = {
    "rotation": "predictive.rotation:Rotation",
    "jigsaw": "predictive.jigsaw:Jigsaw",
    "autoencoder": "generative.autoencoder:Autoencoder",
    "inpainting": "generative.inpainting:Inpainting",
    "models_genesis": "generative.models_genesis:ModelsGenesis",
    "simclr": "joint_embedding.simclr:SimCLR",
}


def task_class(name: str) -> "type[PretextTask]":
    """The class of the task called `name`; `UnknownNameError` with the nearest name if there is none."""
    if not isinstance(name, str) or name not in TASKS:
        raise unknown("pretext task", name, TASKS)
    module, cls = TASKS[name].split(":")
    return getattr(import_module(f"{__name__}.{module}"), cls)


def get_task(
    task: "str | PretextTask | type[PretextTask]",  # A name in TASKS, or a task (class or instance) of your own
    **settings,  # Of the task, e.g. turns='one' for rotation
) -> "PretextTask":
    """The task, ready to be used. `TaskError` for a setting that the task does not have."""
    from selfsup_fastai.pretext.base import PretextTask

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
        raise TaskError(f"{cls.name} has no setting {wrong[0]!r}; it has {', '.join(known) or 'none'}.")
    return cls(**settings)


def list_tasks() -> "DataFrame":
    """A table of the tasks: name, paper, what is asked, kind, and images through the encoder for each image."""
    import pandas as pd

    classes = [task_class(name) for name in TASKS]
    rows = [(c.name, c.kind(), c.asks(), c.paper, c().passes) for c in classes]
    table = pd.DataFrame(rows, columns=["task", "kind", "what is asked", "paper", "passes"])
    return table.set_index("task")
