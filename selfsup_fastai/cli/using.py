"""Commands that use what was trained: `selfsup embed`, `neighbors`, `predict` and `export`."""

from pathlib import Path
from typing import Annotated

import typer

from selfsup_fastai.cli.options import (
    BatchOption,
    Cache,
    CacheOption,
    EncoderOption,
    FolderArgument,
    LayerOption,
    MaxGbOption,
    PathsOption,
    SizeOption,
    Target,
    WorkersOption,
)

UNREADABLE = 3
"""Exit code of a command that did what it could, and could not read some of its inputs."""


def embed(
    folder: FolderArgument,
    encoder: EncoderOption,
    out: Annotated[
        Path, typer.Option(help="File to write: .npz (NumPy) or .parquet (pandas, R, ...).", show_default=False)
    ],
    layer: LayerOption = None,
    size: SizeOption = None,
    bs: BatchOption = 64,
    cache: CacheOption = Cache.disk,
    max_gb: MaxGbOption = 20,
    workers: WorkersOption = None,
    paths: PathsOption = False,
) -> None:
    """Write each image's features to a file.

    Features are the numbers that an encoder makes of an image. Images that look alike to it have similar numbers: for a
    search, a map, groups, or a classifier of your own. Each row says which file it is of; of DICOM files a number and
    pseudonyms, unless you ask for names. Files that cannot be read are listed beside the result.

    \b
    selfsup embed photos --encoder runs/rotation/encoder.safetensors --out features.npz
    selfsup embed scans --encoder runs/simclr/encoder.safetensors --out features.parquet --paths

    \b
    In Python:  np.load("features.npz")["embeddings"]
    """
    from selfsup_fastai.runs.embedding import embed_folder

    data = dict(bs=bs, num_workers=workers, cache=cache.argument, max_gb=max_gb)
    typer.echo(embed_folder(folder, out, encoder, layer, size, paths, **data))


def neighbors(
    folder: FolderArgument,
    encoder: EncoderOption,
    out: Annotated[
        Path, typer.Option(help="Picture to write (.png); a table of the same name (.csv) goes beside it.")
    ] = Path("neighbors.png"),
    query: Annotated[
        list[Path] | None,
        typer.Option(help="Image to find neighbors of, may be given again.", show_default="six of the folder"),
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Neighbors of each.")] = 6,
    layer: LayerOption = None,
    size: SizeOption = None,
    bs: BatchOption = 64,
    cache: CacheOption = Cache.disk,
    max_gb: MaxGbOption = 20,
    workers: WorkersOption = None,
    paths: PathsOption = False,
) -> None:
    """Draw images beside those that an encoder finds like them.

    Look for rows that show the same kind of thing. Rows that share brightness or background alone say that the encoder
    has learned little.

    \b
    selfsup neighbors photos --encoder runs/rotation/encoder.safetensors
    selfsup neighbors photos --encoder runs/rotation/encoder.safetensors --query photos/cat.jpg -k 10
    """
    from selfsup_fastai.runs.nearest import neighbors_of_folder

    data = dict(bs=bs, num_workers=workers, cache=cache.argument, max_gb=max_gb)
    typer.echo(neighbors_of_folder(folder, out, encoder, query or (), k, layer, size, paths, **data))


def predict(
    images: Annotated[
        list[Path], typer.Argument(help="Folder of images, at any depth, or image files.", show_default=False)
    ],
    model: Annotated[
        Path, typer.Option(help="A fine-tuned model: model.safetensors of a run's folder.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Table to write (.csv).")] = Path("predictions.csv"),
    bs: BatchOption = 64,
    cache: CacheOption = Cache.disk,
    max_gb: MaxGbOption = 20,
    workers: WorkersOption = None,
    paths: PathsOption = False,
) -> None:
    """Say for new images what a fine-tuned model takes them for.

    The table has a row for each image: which it is, the class, and the probability of each class. Of DICOM files it
    says a number and pseudonyms, unless you ask for names. Files that cannot be read are listed beside it, the others
    are predicted, and the exit code is 3. Not for clinical use.

    \b
    selfsup predict new_images --model runs/finetune/model.safetensors
    selfsup predict a.png b.png --model runs/finetune/model.safetensors --out ab.csv
    """
    from selfsup_fastai.runs.predicting import predict_images

    done = predict_images(images, out, model, paths, bs=bs, num_workers=workers, cache=cache.argument, max_gb=max_gb)
    typer.echo(done.out)
    if done.n_unreadable:
        files = "1 file" if done.n_unreadable == 1 else f"{done.n_unreadable:,} files"
        typer.echo(f"selfsup: {files} could not be read; {done.listed} says which and why.", err=True)
        raise typer.Exit(UNREADABLE)


def export(
    encoder: Annotated[
        Path, typer.Argument(help="A saved encoder, or a fine-tuned model (model.safetensors).", show_default=False)
    ],
    to: Annotated[Target, typer.Option(help="For which program.", show_default=False)],
    out: Annotated[
        Path,
        typer.Option(help="timm: a folder; torchvision: a .safetensors file; onnx: an .onnx file.", show_default=False),
    ],
) -> None:
    """Hand an encoder or a model to another program.

    It is loaded again as that program would, and answers for random images are compared with ours: if they differ,
    nothing is written. The lines of Python that load it are shown. Only ONNX takes the head of a fine-tuned model, too,
    and what is done to the images' values before.

    \b
    selfsup export runs/rotation/encoder.safetensors --to timm --out rotation_timm
    selfsup export runs/finetune/model.safetensors --to onnx --out model.onnx
    """
    from selfsup_fastai.runs.exporting import export as exported

    typer.echo(exported(encoder, to.value, out))
