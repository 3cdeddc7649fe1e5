"""Options that several commands have, and what their texts stand for."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Cache(str, Enum):
    """Words for `UnlabeledDataLoaders`' argument `cache`."""

    disk = "disk"
    ram = "ram"
    device = "device"
    none = "none"

    @property
    def argument(self) -> bool | str:
        return {"disk": True, "none": False}.get(self.value, self.value)


class Schedule(str, Enum):
    """`downstream.schedule.SCHEDULES`."""

    gradual = "gradual"
    two_stage = "two_stage"
    all = "all"
    lp_ft = "lp_ft"


class Consistency(str, Enum):
    """The kinds of `ConsistencyLoss`."""

    fixmatch = "fixmatch"
    uda = "uda"
    mean_teacher = "mean_teacher"
    pi = "pi"


class Precision(str, Enum):
    """The kinds of `AutoPrecision`."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"
    auto = "auto"


class Target(str, Enum):
    """Programs that an encoder is exported to."""

    timm = "timm"
    torchvision = "torchvision"
    onnx = "onnx"


PrecisionOption = Annotated[
    Precision,
    typer.Option(
        help="auto: bf16, channels last in memory, or both, where timed steps are faster; then the same seed may give "
        "another result on a busier machine. fp16 needs a GPU."
    ),
]
CacheOption = Annotated[
    Cache, typer.Option(help="Where decoded pixels are kept: on disk for later runs, in memory, on the GPU, nowhere.")
]
MaxGbOption = Annotated[float, typer.Option(min=0.001, help="Size of all pixels that are kept on disk.")]
SplitOption = Annotated[
    str | None,
    typer.Option(
        help="patient: all images of one on one side; random: image by image.",
        show_default="patient where files are DICOM",
    ),
]
PathsOption = Annotated[
    bool, typer.Option("--paths", help="Write names of DICOM files into tables, too: they may identify patients.")
]
WorkersOption = Annotated[
    int | None, typer.Option(help="Processes that open images where no pixels are kept.", show_default="by the work")
]

FolderArgument = Annotated[
    Path, typer.Argument(help="Folder of images, at any depth: photographs or DICOM files.", show_default=False)
]
LabeledArgument = Annotated[
    Path,
    typer.Argument(
        help="A folder of images for each class; or train/ and valid/ with such folders.", show_default=False
    ),
]
EncoderOption = Annotated[
    Path, typer.Option(help="A saved encoder: encoder.safetensors of a run's folder.", show_default=False)
]
LayerOption = Annotated[
    str | None, typer.Option(help="Features of this layer, averaged over the image.", show_default="the last")
]
SeedOption = Annotated[int, typer.Option(help="Same seed, same result.")]
SizeOption = Annotated[
    int | None, typer.Option(min=8, help="Side of the images in pixels.", show_default="the encoder's")
]
BatchOption = Annotated[int, typer.Option(min=1, help="Images in a batch: fewer take less memory.")]


def first_free(folder: Path) -> Path:
    """`folder`, or folder-2, folder-3 and so on: the first that is not there yet."""
    free, n = folder, 1
    while free.exists():
        n += 1
        free = folder.with_name(f"{folder.name}-{n}")
    return free


def parsed_settings(texts: list[str]) -> dict:
    """'turns=one' -> {'turns': 'one'}, 'rotation.turns=one' -> {'rotation': {'turns': 'one'}}, at any depth."""
    settings: dict = {}
    for name, value in map(_setting, texts):
        *above, name = name.split(".")
        place = settings
        for part in above:
            place = place.setdefault(part, {})
        place[name] = value
    return settings


def parsed_window(text: str | None) -> str | list | None:
    """A name, or width and center: '1500,-600' -> [1500, -600]."""
    parts = [_number(part) for part in (text or "").split(",")]
    return text if any(isinstance(part, str) for part in parts) else parts


def parsed_amounts(text: str) -> list[int | float]:
    """'5,0.2,1.0' -> [5, 0.2, 1.0]: whole numbers are labels a class, others shares."""
    amounts = [_number(part.strip()) for part in text.split(",")]
    if any(isinstance(amount, str) or not amount > 0 for amount in amounts):
        raise typer.BadParameter(f"--labels takes numbers above 0, such as 5,20 or 0.1,1.0; got {text!r}.")
    return amounts


def _setting(text: str) -> tuple[str, object]:
    """'turns=one' -> ('turns', 'one'); numbers, true, false and none become values, '0.3,1' a pair of numbers."""
    name, eq, value = text.partition("=")
    if not eq:
        raise typer.BadParameter(f"--set takes NAME=VALUE, got {text!r}.")
    words = {"true": True, "false": False, "none": None}
    if value.lower() in words:
        return name, words[value.lower()]
    parts = [_number(part) for part in value.split(",")]
    if any(isinstance(part, str) for part in parts):
        return name, value
    return name, parts if len(parts) > 1 else parts[0]


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
