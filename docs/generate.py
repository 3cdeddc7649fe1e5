"""Writes what the documentation takes from the code: a page for each pretext task, and the table of tasks in README.md.

    make docs

Texts come from `TASKS`, docstrings and the comments behind arguments; tests/test_docs.py fails while a committed page
says something else than the code. Pictures are drawn here too, and are not compared.
"""

import inspect
import io
import re
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from fastai.torch_core import set_seed
from fastcore.docments import docments
from matplotlib import pyplot as plt
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor

from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.pretext import TASKS, task_class
from selfsup_fastai.pretext.base import PretextTask
from selfsup_fastai.pretext.learner import pretext_learner

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- tasks: written by docs/generate.py -->", "<!-- end of tasks -->"
HEADINGS = {"In:": "What goes in, what comes out", "Guards": "Guards against shortcuts", "Suits": "When it suits"}
MODES = {  # Settings that change what an image costs, or which channels suit
    "rotation": [{"turns": "one"}],
    "split_brain": [{"halves": "diagonal"}],
    "mae": [{"mask_ratio": 0.5}],
    "slice_order": [{"ask": "position"}],
}
CREDIT = (
    "Made from [china.jpg](https://www.flickr.com/photos/danielbuechele/6061409035/) by danielbuechele and "
    "[flower.jpg](https://www.flickr.com/photos/vultilion/6056698931/) by vultilion, which come with scikit-learn; "
    "both [CC BY 2.0](https://creativecommons.org/licenses/by/2.0/), cut and changed as the task does."
)
STANDS_FOR = " Squares of one photograph stand for the images of one patient, or the slices of one volume."
PAGE = """# {name}

*{question}?*

![What the network is asked](../img/{name}.png)

{paper}

{sections}

## Settings

{settings}

## Cost and limits

{limits}

## How to use it

```python
from selfsup_fastai.all import *

dls = UnlabeledDataLoaders.from_folder('{folder}', size=128, bs=64)
learn = pretext_learner(dls, '{name}'{example})
learn.show_batch()
learn.fit_one_cycle(20, 3e-3)
learn.save_encoder('{name}')
```

From the shell:

```bash
selfsup pretrain {folder} --task {name}{flag}
```

Code: [`{module}`](../../{file}). All tasks: [README](../../README.md#the-tasks).

---

Picture: {credit}
"""


def pages() -> dict[Path, str]:
    """Every generated text, by the file it belongs in (below the repository's root)."""
    texts = {Path("docs/tasks") / f"{name}.md": task_page(name) for name in TASKS}
    readme = (ROOT / "README.md").read_text("utf-8")
    return {**texts, Path("README.md"): with_table(readme)}


def task_page(name: str) -> str:
    """The page of one task, in Markdown."""
    cls = task_class(name)
    _, paper, *rest = paragraphs(cls)
    setting = next((setting for setting in settings_of(cls) if setting[1] is not None), None)
    return PAGE.format(
        name=name,
        folder="scans" if "facts" in cls.needs else "photos",
        question=cls.asks().rstrip("?"),
        paper=linked(paper),
        sections="\n\n".join(linked(f"## {_heading(p)}\n\n{p}" if _heading(p) else p) for p in rest),
        settings=settings_table(cls),
        limits=limits(cls),
        example=f", {setting[0]}={setting[1]!r}" if setting else "",
        flag=f" --set {setting[0]}={setting[1]}" if setting else "",
        module=cls.__module__,
        file=cls.__module__.replace(".", "/") + ".py",
        credit=CREDIT + (STANDS_FOR if "facts" in cls.needs else ""),
    )


def paragraphs(cls: type[PretextTask]) -> list[str]:
    """The paragraphs of a docstring, each on one line."""
    return [" ".join(p.split()) for p in re.split(r"\n\s*\n", inspect.getdoc(cls))]


def linked(text: str) -> str:
    """arXiv numbers and DOIs become links."""
    text = re.sub(r"doi (10\.\d+/[\w.]*\w)", r"[doi \1](https://doi.org/\1)", text)
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def _heading(paragraph: str) -> str | None:
    return next((heading for start, heading in HEADINGS.items() if paragraph.startswith(start)), None)


def settings_of(cls: type[PretextTask]) -> list[tuple[str, object, str]]:
    """(name, default, comment) of each setting."""
    found = docments(cls.__init__, full=True)
    return [(name, found[name]["default"], found[name]["docment"] or "") for name in cls.setting_names()]


def settings_table(cls: type[PretextTask]) -> str:
    rows = [f"| `{name}` | `{default!r}` | {_cell(comment)} |" for name, default, comment in settings_of(cls)]
    return "\n".join(["| setting | default | |", "|---|---|---|", *rows]) if rows else "None."


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _passes(n: float) -> str:
    return "1 image-sized pass" if n == 1 else f"{n:.2g} image-sized passes"


def limits(cls: type[PretextTask]) -> str:
    """What an image costs and which images suit, with the settings that change one of these."""
    task = cls()
    lines = [
        f"For each image of the data, {_passes(task.passes)} through the encoder.",
        f"Images of {_channels(task)} channels, at least {task.min_side} pixels a side.",
    ]
    for settings in MODES.get(cls.name, []):
        other = cls(**settings)
        said = ", ".join(f"`{name}={value!r}`" for name, value in settings.items())
        lines.append(f"With {said}: {_passes(other.passes)}, images of {_channels(other)} channels.")
    return "\n".join(lines)


def _channels(task: PretextTask) -> str:
    return " or ".join(map(str, task.channels))


def task_table() -> str:
    """The table of all tasks, in Markdown."""
    rows = ["| task | what the network is asked | images | paper | passes per image |", "|---|---|---|---|---|"]
    for name in TASKS:
        cls = task_class(name)
        link = f"[{name}](docs/tasks/{name}.md)"
        rows.append(f"| {link} | {_cell(cls.asks())} | {_images(cls)} | {cls.paper} | {cls().passes:.2g} |")
    return "\n".join(rows)


def _images(cls: type[PretextTask]) -> str:
    """Which images suit: color, or any; with the settings that let others in."""
    if 1 in cls().channels:
        return "any"
    modes = [settings for settings in MODES.get(cls.name, []) if 1 in cls(**settings).channels]
    return "; ".join(["color", *(f"any with `{k}={v!r}`" for settings in modes for k, v in settings.items())])


def with_table(readme: str) -> str:
    """README.md with the table between the two marks brought up to date."""
    before, mark, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (mark and end):
        raise SystemExit(f"README.md has lost the marks of its task table: {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{task_table()}\n{END}{after}"


def photos(side: int = 160, n: int = 3) -> Tensor:
    """Squares of scikit-learn's two photographs, `n` of each from left to right, (2 n, 3, side, side) in [0, 1]."""
    squares = []
    for name in ("china.jpg", "flower.jpg"):
        photo = Image.fromarray(load_sample_image(name))
        room = photo.width - photo.height
        for left in (room * i // (n - 1) for i in range(n)):
            square = photo.crop((left, 0, left + photo.height, photo.height))
            squares.append(torch.frombuffer(bytearray(square.resize((side, side)).tobytes()), dtype=torch.uint8))
    return torch.stack(squares).view(-1, side, side, 3).permute(0, 3, 1, 2).float() / 255


def draw_picture(name: str, file: Path) -> None:
    """What the task asks about six squares, as a PNG of 256 colors."""
    task = task_class(name)()
    if "facts" in task.needs:
        _show_with_facts(name)
    else:
        index = torch.arange(6) if "index" in task.needs else None
        batch = task.batch(photos(), generator=torch.Generator().manual_seed(0), train=True, idx=index)
        batch = [t.as_subclass(Tensor) for t in batch]
        task.show(batch[: task.n_inp], batch[task.n_inp :], max_n=6)
    buffer = io.BytesIO()
    plt.savefig(buffer, dpi=80, bbox_inches="tight")
    plt.close()
    Image.open(buffer).convert("RGB").quantize(256).save(file, optimize=True)


def _show_with_facts(name: str) -> None:
    """What a task asks that knows of which photograph a square is, and where in it."""
    set_seed(0)
    squares = (photos(n=9).permute(0, 2, 3, 1) * 255).byte().numpy()
    photo, place = np.arange(18) // 9, np.arange(18) % 9
    facts = pd.DataFrame({"patient": photo, "volume": photo, "place": place})
    facts["photograph"] = np.array(["china", "flower"])[photo]
    dls = UnlabeledDataLoaders.from_array(squares, size=160, bs=6, valid_pct=0.05, num_workers=0, device="cpu")
    for dl, valid in zip(dls.loaders, (False, True)):
        dl.facts = facts[dls.items_df["is_valid"] == valid]
    settings = {"tags": ["photograph"]} if name == "dicom_tags" else {}
    train = pretext_learner(dls, name, "resnet10t", **settings).dls.train
    train.new(get_idxs=lambda: [1, 3, 5, 10, 12, 14], bs=6).show_batch(max_n=6)


def main() -> None:
    for folder in ("docs/tasks", "docs/img"):
        (ROOT / folder).mkdir(parents=True, exist_ok=True)
    for file, text in pages().items():
        (ROOT / file).write_text(text, "utf-8")
    for name in TASKS:
        draw_picture(name, ROOT / "docs/img" / f"{name}.png")


if __name__ == "__main__":
    main()
