"""No name, id, UID, header value or path of a DICOM file gets out: marks stand in all of them, and are looked for."""

import logging
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from fastai.metrics import accuracy
from matplotlib import pyplot as plt
from pydicom import dcmread
from pydicom.datadict import keyword_for_tag

from selfsup_fastai.data.dicom_loaders import DicomDataLoaders
from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.data.scanning import scan_dicoms
from selfsup_fastai.downstream.learner import downstream_learner
from selfsup_fastai.errors import SelfsupError
from selfsup_fastai.pretext.learner import pretext_learner
from tests.dicoms import slices

MARK = "ZQXSECRET"
UID = "1.2.840.98765432198765"
NEEDED = {  # Elements that pixels depend on: their values are no secrets, and others make no image
    "SOPClassUID", "PhotometricInterpretation", "Modality",
}  # fmt: skip
TEXTS = {"AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UT"}
MORE = [
    "PatientName", "PatientAddress", "OtherPatientNames", "ReferringPhysicianName", "InstitutionName", "StudyID",
    "AccessionNumber", "StudyDescription", "SeriesDescription", "BodyPartExamined", "ViewPosition", "StationName",
    "OperatorsName", "ImageComments", "ProtocolName", "DeviceSerialNumber", "PatientComments", "ManufacturerModelName",
]  # fmt: skip


def marked(file: Path) -> None:
    """The mark in every text element, the secret UID in the others; a value that makes no sense beside it."""
    ds = dcmread(file)
    for name in MORE:
        setattr(ds, name, MARK)
    ds.PatientID = f"{MARK}{ds.PatientID}"
    for element in ds:
        if element.VR in TEXTS and keyword_for_tag(element.tag) not in {*NEEDED, "PatientID"}:
            element.value = MARK
    for name in ("StudyInstanceUID", "SeriesInstanceUID"):
        ds[name].value = f"{UID}.{ds[name].value}"
    ds.add_new(0x00091001, "LO", MARK)
    ds.save_as(file)


@pytest.fixture
def export(tmp_path):
    """Two classes of patients, marked; broken files among them."""
    folder = tmp_path / f"export_{MARK}"
    for i in range(8):
        for file in slices(folder / f"{'ab'[i % 2]}" / f"{MARK}_{i}", 2, f"P{i}", seed=i):
            marked(file)
            file.rename(file.with_name(f"{MARK}_{file.name}"))
    whole = next(folder.rglob(f"{MARK}_CT000"))
    (folder / "a" / f"{MARK}_half").write_bytes(whole.read_bytes()[:-300])
    ds = dcmread(whole)
    ds.Rows = None
    ds.save_as(folder / "a" / f"{MARK}_no_rows")
    ds = dcmread(whole)
    ds["PixelRepresentation"].VR = "LO"
    ds["PixelRepresentation"]._value = MARK
    ds.save_as(folder / "a" / f"{MARK}_odd")
    (folder / "b" / f"{MARK}_text.dcm").write_text(MARK * 100)
    return folder


def leaks(*where: Path) -> list[str]:
    """Files below some folders in whose bytes or names the marks are; also in what is compressed in PNGs."""
    found = []
    for folder in where:
        for file in (f for f in folder.rglob("*") if f.is_file()):
            data = file.read_bytes()
            if file.suffix == ".png":
                data += b"".join(_unpacked(data))
            if any(mark in data or mark in os.fsencode(file.relative_to(folder)) for mark in marks()):
                found.append(str(file.relative_to(folder)))
    return found


def marks() -> list[bytes]:
    return [MARK.encode(), MARK.lower().encode(), UID.encode(), MARK.encode("utf-16-le")]


def _unpacked(png: bytes):
    for part in png.split(b"zTXt")[1:]:
        try:
            yield zlib.decompress(part[part.index(b"\0") + 2 :])
        except (zlib.error, ValueError):
            continue


def test_the_search_finds_what_it_looks_for(export, tmp_path):
    assert len(leaks(export)) >= 16
    (tmp_path / "clean").mkdir()
    assert leaks(tmp_path / "clean") == []


def test_nothing_gets_out_of_a_run(export, tmp_path, monkeypatch, capfd, caplog, recwarn):
    monkeypatch.setenv("SELFSUP_CACHE", str(tmp_path / "kept"))
    out = tmp_path / "out"
    out.mkdir()
    caplog.set_level(logging.DEBUG)
    table, problems = scan_dicoms(export)
    shown = [table.drop(columns="file").to_string(), problems.drop(columns="file").to_string()]
    dls = UnlabeledDataLoaders.from_folder(export, size=24, bs=4, num_workers=0)
    learn = pretext_learner(dls, "rotation", arch="resnet10t", path=out)
    learn.show_batch()
    plt.savefig(out / "batch.png")
    learn.fit(1)
    learn.save("weights")
    encoder = learn.save_encoder(out / "encoder")
    shown += [repr(dls), repr(learn.dls.train_ds.tls[0].tfms), repr(learn.summary())]
    labels = table[["file"]].assign(label=[f.relative_to(export).parts[0] for f in table["file"]])
    labeled = DicomDataLoaders.from_df(labels, label_col="label", size=24, bs=4)
    fine = downstream_learner(labeled, encoder, metrics=accuracy, path=out)
    fine.fine_tune(1)
    fine.export("learner.pkl")
    fine.show_results()
    plt.savefig(out / "results.png")
    for wrong in (dict(split_by="nobody"), dict(window="nothing"), dict(valid_pct=7)):
        with pytest.raises(SelfsupError) as error:
            UnlabeledDataLoaders.from_folder(export, size=24, **wrong)
        shown.append(str(error.value))
    said = capfd.readouterr()
    shown += [said.out, said.err, caplog.text, *(str(w.message) for w in recwarn)]
    assert [text for text in shown if any(mark.decode("latin1") in text for mark in marks()[:3])] == []
    assert leaks(out, tmp_path / "kept") == []


@pytest.mark.slow
def test_nothing_gets_out_of_the_command(export, tmp_path):
    env = {**os.environ, "SELFSUP_CACHE": str(tmp_path / "kept"), "MPLBACKEND": "Agg"}

    def run(*args: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "selfsup_fastai.cli", *args],
            capture_output=True,
            text=True,
            env=env,
            cwd=export.parent,
        )
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    out = tmp_path / "out"
    folder = export.rename(export.parent / "scans")  # the folder that is named in the command is the user's word
    small = ["--size", "24", "--bs", "4", "--epochs", "1"]
    said = run("scan", str(folder), "--out", str(out / "scan"))
    said += run("pretrain", str(folder), "--arch", "resnet10t", "--out", str(out / "pretrain"), *small)
    encoder = str(out / "pretrain" / "encoder.safetensors")
    said += run("finetune", str(folder), "--encoder", encoder, "--out", str(out / "finetune"), *small)
    model = str(out / "finetune" / "model.safetensors")
    said += run("embed", str(folder), "--encoder", encoder, "--out", str(out / "used" / "embedded.npz"))
    said += run("embed", str(folder), "--encoder", encoder, "--out", str(out / "used" / "embedded.parquet"))
    said += run("neighbors", str(folder), "--encoder", encoder, "--out", str(out / "used" / "neighbors.png"))
    said += run("probe", str(folder), "--encoder", encoder, "--out", str(out / "probe"))
    said += run("predict", str(folder), "--model", model, "--out", str(out / "used" / "predictions.csv"), code=3)
    said += run("export", model, "--to", "onnx", "--out", str(out / "used" / "model.onnx"))
    said += run("export", encoder, "--to", "timm", "--out", str(out / "used" / "timm"))
    said += run("cache", "ls")
    assert MARK not in said and UID not in said
    assert leaks(out, tmp_path / "kept") == []
    run("pretrain", str(folder), "--arch", "resnet10t", "--out", str(out / "named"), "--paths", *small)
    assert leaks(out / "named") == ["left_out.csv"]
    named = str(out / "named" / "predictions.csv")
    run("predict", str(folder), "--model", model, "--out", named, "--paths", code=3)
    assert sorted(leaks(out / "named")) == ["left_out.csv", "predictions.csv", "predictions.left_out.csv"]
