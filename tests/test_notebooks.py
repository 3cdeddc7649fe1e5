"""The notebooks run from top to bottom, and what they print is sane. Committed outputs are complete and small."""

import json
import math
import os
import re
from pathlib import Path

import pytest

from selfsup_fastai.pretext import TASKS

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOKS = Path(__file__).parents[1] / "nbs"
QUICKSTART, DICOM, EVIDENCE, TOUR = (
    NOTEBOOKS / f"{name}.ipynb" for name in ("01_quickstart", "02_dicom", "03_did_it_help", "04_tasks_tour")
)


TRACES = r"Traceback|Warning|(?<![\w<.])/\w[\w.-]*/\w"  # Of the machine that a notebook was executed on


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(outputs: list) -> list[str]:
    """What can be read in the outputs of cells."""
    kinds = ("text/plain", "text/html")
    return [out.get("text", "") + "".join(out.get("data", {}).get(kind, "") for kind in kinds) for out in outputs]


def results(notebook) -> dict:
    """The JSON that the last cell prints."""
    lines = [out.text for out in code_cells(notebook)[-1].outputs if out.output_type == "stream"]
    return json.loads(lines[-1])


def executed(file: Path, folder: Path):
    """A notebook with few epochs, in a kernel of its own."""
    notebook = nbformat.read(file, as_version=4)
    for cell in code_cells(notebook):
        cell.outputs = []
    inline = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    environment = {**os.environ, **inline, "QUICK": "1", "OMP_NUM_THREADS": "1"}
    where = {"metadata": {"path": folder}}
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where)
    client.execute(env=environment)
    return notebook


@pytest.mark.slow
def test_quickstart_runs(tmp_path):
    found = results(executed(QUICKSTART, tmp_path))
    assert found["left_out"] == ["not_an_image", "truncated"]
    assert found["images"] == found["confusion"] + 797 == 1297
    assert found["card_epochs"] == 1 and found["card_images"] == 2 * 128 * (1167 // 128)
    assert all(math.isfinite(loss) for loss in found["loss"])
    assert 1 < found["rank"]["simclr"] <= 512
    assert 0.5 < found["knn"]["random weights"] < 1  # digits are easy for any features: far above the 0.1 of guessing
    assert 0.5 < found["knn"]["simclr"] < 1
    assert found["tuned_epochs"] == 2
    assert set(found["accuracy"]) == {"scratch", "simclr"}
    assert all(0 <= value <= 1 for value in [found["fifty_labels"], *found["accuracy"].values()])


@pytest.mark.slow
def test_tour_asks_every_task(tmp_path):
    notebook = executed(TOUR, tmp_path)
    asked = [re.match(r"ask\('(\w+)'", cell.source) for cell in code_cells(notebook)]
    shown = {
        match[1]
        for match, cell in zip(asked, code_cells(notebook))
        if match and any("image/png" in out.get("data", {}) for out in cell.outputs)
    }
    assert shown == set(TASKS)
    assert "[('rotation+relative_position', 1), ('simclr', 1)]" in texts(code_cells(notebook)[-1].outputs)[-1]


def test_committed_run_is_a_real_one():
    """What the reader sees is the whole training, in which pretraining learned something."""
    found = results(nbformat.read(QUICKSTART, as_version=4))
    assert found["card_epochs"] == 30 and found["tuned_epochs"] == 21
    assert found["loss"][1] < found["loss"][0] - 0.3
    assert found["knn"]["simclr"] > found["knn"]["random weights"]
    assert found["rank"]["simclr"] > found["rank"]["random weights"]
    assert found["fifty_labels"] > 0.7


@pytest.mark.parametrize("file", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda f: f.name)
def test_outputs_are_committed_clean_and_small(file):
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))  # top to bottom, in one go
    assert file.stat().st_size < 700_000
    outputs = [out for cell in cells for out in cell.outputs]
    assert sum("image/png" in out.get("data", {}) for out in outputs) >= 6
    assert [text for text in texts(outputs) if re.search(TRACES, text)] == []


def test_traces_are_found():
    """A warning, or the path of whoever ran it, would be caught; HTML and fractions would not."""
    assert [bool(re.search(TRACES, text)) for text in ("see /a/b.py", "UserWarning: x", "<td>1/2</td><br/>")] == [
        1,
        1,
        0,
    ]


@pytest.mark.slow
def test_evidence_runs(tmp_path):
    found = results(executed(EVIDENCE, tmp_path))
    _check_evidence(found, seeds=2, n_test=100, epochs=2)
    assert found["verdict"].endswith("With two seeds only very large differences can show; take more of them.")


def test_committed_run_of_evidence_is_a_real_one():
    found = results(nbformat.read(EVIDENCE, as_version=4))
    _check_evidence(found, seeds=3, n_test=500, epochs=10)
    assert min(found["scores"].values()) > 0.3 and found["scores"]["scratch 200"] > found["scores"]["scratch 50"]
    assert min(found["tuned"].values()) > 0.7


def _check_evidence(found: dict, seeds: int, n_test: int, epochs: int) -> None:
    """Two tasks beside scratch, with 50 labels and with 200, and no test image among those to pretrain on."""
    assert found["leaks"]["test images seen in pretraining"] == 0
    assert (found["leaks"]["pretraining images"], found["leaks"]["test images"]) == (1167, n_test)
    assert found["tasks"] == ["rotation", "simclr"] and found["n_labels"] == [50, 200]
    assert found["runs"] == 3 * 2 * seeds
    for name, (gain, low, high) in found["gains"].items():
        scratch = found["scores"][f"scratch {name.split()[1]}"]
        assert math.isclose(gain, found["scores"][name] - scratch, abs_tol=1e-6) and -1 <= low <= gain <= high <= 1
    sure = [name for name, (_, low, high) in found["gains"].items() if low > 0 or high < 0]
    assert sure or "distinguishable" in found["verdict"]
    assert set(found["layers"]) == {"scratch", "rotation", "simclr"} and min(found["layers"].values()) > 0.6
    assert found["tuned_epochs"] == epochs + 1 and found["report"] > 100_000


@pytest.mark.slow
def test_dicom_runs(tmp_path):
    notebook = executed(DICOM, tmp_path)
    _check_dicom(results(notebook))


def test_committed_run_of_dicom_is_a_real_one():
    found = results(nbformat.read(DICOM, as_version=4))
    _check_dicom(found)
    assert found["loss"][1] < found["loss"][0]


def _check_dicom(found: dict) -> None:
    """pydicom's files: so many are images; the others are left out for reasons."""
    assert found["files"] == 83 and found["images"] == 114  # frames
    assert found["problems"]["no_pixels"] == found["left_out"]["no_pixels"] == 54
    assert {"excluded", "dicomdir", "truncated"} < set(found["problems"])
    assert found["ct_range"] == [0, 1] and found["inverted"] < -0.99
    assert 0 <= found["accuracy"] <= 1
