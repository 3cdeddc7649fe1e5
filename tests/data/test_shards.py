"""Shards: the images, batches and splits are those of the same files in a folder; order, fetching, damage."""

import io
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import tarfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.torch_core import set_seed

from selfsup_fastai.data import shard_index
from selfsup_fastai.data.fetching import Fetched, check_fetch, command
from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.data.shard_index import read_index
from selfsup_fastai.data.shard_writing import write_shards
from selfsup_fastai.data.shards import ShardImage, Shards, members_of, mixed_order
from selfsup_fastai.errors import DataError
from selfsup_fastai.pretext.learner import pretext_learner
from tests.conftest import write_images
from tests.dicoms import slices
from tests.two_processes import of_two, run

SECRET = "ZQXSECRET"
SMALL = dict(size=32, bs=9, num_workers=0)  # no batch is dropped: 54 of 60 images are trained on


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """60 PNGs of 40x48 pixels whose names are nobody's business, and a file that is no image."""
    folder = write_images(tmp_path_factory.mktemp("photos"), 60, (40, 48))
    for file in sorted(folder.iterdir()):
        file.rename(folder / f"{SECRET}_{file.name}")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def shards(photos, tmp_path_factory) -> Path:
    """The same in nine shards."""
    folder = tmp_path_factory.mktemp("shards") / "made"
    write_shards(photos, folder, 7)
    return folder


@pytest.fixture
def foreign(shards, tmp_path) -> Path:
    """Shards without an index, to be changed."""
    shutil.copytree(shards, tmp_path / "foreign", ignore=shutil.ignore_patterns("*.csv"))
    return tmp_path / "foreign"


def unpacked(shards: Path, folder: Path) -> Path:
    """What is in shards, as files in the same order."""
    folder.mkdir()
    for file in sorted(shards.glob("*.tar")):
        with tarfile.open(file) as tar:
            for member in tar:
                (folder / member.name).write_bytes(tar.extractfile(member).read())
    return folder


def batches(dls, epochs: int = 1) -> torch.Tensor:
    return torch.cat([b[0] for _ in range(epochs) for b in dls.train] + [b[0] for b in dls.valid])


def loaders(path, **kwargs) -> UnlabeledDataLoaders:
    set_seed(3)
    return UnlabeledDataLoaders.from_shards(path, **{**SMALL, **kwargs})


def add(file: Path, name: str, data: bytes) -> None:
    with tarfile.open(file, "a") as tar:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))


# --- writing ----------------------------------------------------------------------------------------------------------


def test_shards_hold_the_files_and_none_of_their_names(photos, shards):
    found = []
    for number, file in enumerate(sorted(shards.glob("*.tar"))):
        with tarfile.open(file) as tar:
            members = tar.getmembers()
            assert [m.name for m in members] == [f"{number * 7 + i:09d}.png" for i in range(len(members))]
            found += [tar.extractfile(m).read() for m in members]
    files = [file.read_bytes() for file in sorted(photos.glob("*.png"))]
    assert found != files and sorted(found) == sorted(files)
    assert not any(SECRET.encode() in file.read_bytes() for file in shards.iterdir())


def test_the_same_folder_and_seed_give_the_same_bytes(photos, shards, tmp_path):
    report = write_shards(photos, tmp_path / "again", 7)
    other = write_shards(photos, tmp_path / "other", 7, seed=1)
    names = sorted(file.name for file in shards.iterdir())
    assert names == sorted(file.name for file in (tmp_path / "again").iterdir()) and len(names) == 10
    assert all((tmp_path / "again" / name).read_bytes() == (shards / name).read_bytes() for name in names)
    assert (tmp_path / "other" / names[1]).read_bytes() != (shards / names[1]).read_bytes()
    assert list(report["code"]) == list(other["code"]) == ["not_an_image"]


def test_the_index_says_where_tarfile_finds_the_images(shards):
    index = shard_index.read_index(shards / "index.csv")
    for name, rows in index.groupby("shard"):
        with tarfile.open(shards / name) as tar:
            assert [(m.offset_data, m.size) for m in tar] == list(zip(rows["offset"], rows["size"]))
        assert set(rows["bytes"]) == {(shards / name).stat().st_size}
    assert set(index["width"]) == {48} and set(index["height"]) == {40} and set(index["channels"]) == {3}


def test_the_webdataset_package_reads_them(photos, shards):
    """In a process of its own, as it leaves files open."""
    pytest.importorskip("webdataset")
    code = """
import sys, json, hashlib, webdataset
samples = webdataset.WebDataset(sys.argv[1:], shardshuffle=False)
sys.stdout.write(json.dumps([[s["__key__"], hashlib.sha256(s["png"]).hexdigest()] for s in samples]))
"""
    files = [str(file) for file in sorted(shards.glob("*.tar"))]
    child = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, check=True, timeout=60)
    keys, found = zip(*json.loads(child.stdout))
    assert list(keys) == [f"{i:09d}" for i in range(60)]
    assert sorted(found) == sorted(sha256(file.read_bytes()).hexdigest() for file in photos.glob("*.png"))


def test_nothing_is_overwritten_unless_asked_for(photos, shards, tmp_path):
    shutil.copytree(shards, tmp_path / "there")
    with pytest.raises(DataError, match="already"):
        write_shards(photos, tmp_path / "there")
    write_shards(photos, tmp_path / "there", 50, overwrite=True)
    assert sorted(file.name for file in (tmp_path / "there").iterdir()) == [
        "index.csv",
        "shard-000000.tar",
        "shard-000001.tar",
    ]


def test_dicom_files_are_left_out_of_shards(photos, tmp_path):
    mixed = tmp_path / "mixed"
    shutil.copytree(photos, mixed)
    slices(mixed / "scans", 2, "P1", seed=0)
    report = write_shards(mixed, tmp_path / "out")
    assert sorted(report["code"]) == ["dicom", "dicom", "not_an_image"]
    assert len(shard_index.read_index(tmp_path / "out" / "index.csv")) == 60


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(images_per_shard=0), "from 1 up; got 0"),
        (dict(out="photos/shards"), "lies in the folder of images"),
        (dict(folder="texts"), "None of the 1 files"),
    ],
)
def test_what_cannot_be_written(change, words, tmp_path):
    write_images(tmp_path / "photos", 3)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no image")
    with pytest.raises(DataError, match=words):
        write_shards(**{"folder": "photos", "out": "out", **change})


# --- as any folder ----------------------------------------------------------------------------------------------------


def test_images_and_split_are_those_of_the_files(shards, tmp_path):
    dls = loaders(shards)
    set_seed(3)
    files = UnlabeledDataLoaders.from_folder(unpacked(shards, tmp_path / "files"), cache=False, **SMALL)
    for ours, theirs in ((dls.train_ds, files.train_ds), (dls.valid_ds, files.valid_ds)):
        assert len(ours) == len(theirs)
        assert all(np.array_equal(np.asarray(a[0]), np.asarray(b[0])) for a, b in zip(ours, theirs))
    assert torch.equal(torch.cat([b[0] for b in dls.valid]), torch.cat([b[0] for b in files.valid]))
    assert list(dls.items_df["is_valid"]) == list(files.items_df["is_valid"])


def test_workers_index_and_the_pixel_cache_change_nothing(shards, foreign):
    wanted = batches(loaders(shards), 2)
    assert len(wanted) == 54 + 54 + 6
    assert torch.equal(batches(loaders(shards, num_workers=2), 2), wanted)
    assert torch.equal(batches(loaders(foreign), 2), wanted)
    kept = loaders(shards, cache=True)
    assert kept.train.is_fast and torch.equal(batches(kept, 2), wanted)
    set_seed(3)
    assert torch.equal(batches(UnlabeledDataLoaders.from_folder(shards, **SMALL), 2), wanted)
    files = sorted(foreign.glob("*.tar"))
    assert torch.equal(batches(loaders(files), 2), wanted)


def test_every_image_comes_once_an_epoch(shards):
    dls = loaders(shards)
    dls.train.with_index = True
    for _ in range(2):
        assert sorted(i for b in dls.train for i in b[1].tolist()) == list(range(54))


def test_deep_grey_images_keep_their_depth(tmp_path):
    from PIL import Image

    (tmp_path / "deep").mkdir()
    for i in range(4):
        Image.fromarray(np.full((20, 20), 1000 * i + 300, np.uint16)).save(tmp_path / "deep" / f"{i}.png")
    write_shards(tmp_path / "deep", tmp_path / "out")
    dls = loaders(tmp_path / "out", bs=2, size=16)
    values = sorted(round(float(x.mean()) * 65535) for b in (*dls.train, *dls.valid) for x in b[0])
    assert dls.train.one_batch()[0].shape[1] == 1 and set(values) <= {300, 1300, 2300, 3300}


def test_whole_shards_to_validate_with(shards):
    df = loaders(shards, split_by="shard", valid_pct=0.2).items_df
    assert df.groupby("shard")["is_valid"].nunique().eq(1).all()
    assert 0.1 < df["is_valid"].mean() < 0.35


def test_a_loader_survives_pickling(shards):
    dls = loaders(shards)
    again = pickle.loads(pickle.dumps(dls.train))
    assert torch.equal(torch.cat([b[0] for b in again]), torch.cat([b[0] for b in dls.train]))


# --- order ------------------------------------------------------------------------------------------------------------


def fake_items(n_shards: int, each: int, mixed: int) -> list[ShardImage]:
    shards = Shards([str(i) for i in range(n_shards)], [0] * n_shards, place=None, mixed=mixed)
    return [ShardImage(shards, s, 0, 0) for s in range(n_shards) for _ in range(each)]


@pytest.mark.parametrize(("n_shards", "mixed"), [(30, 1), (30, 4), (5, 5), (3, 8)])
def test_at_most_so_many_shards_are_in_use_at_a_time(n_shards, mixed):
    items = fake_items(n_shards, 50, mixed)
    order = mixed_order(items, range(len(items)), random.Random(1))
    assert sorted(order) == list(range(len(items)))
    shard = np.array([items[i].shard for i in order])
    places = [np.flatnonzero(shard == s) for s in range(n_shards)]
    in_use = sum(((np.arange(len(items)) >= p[0]) & (np.arange(len(items)) <= p[-1])).astype(int) for p in places)
    assert in_use.max() <= min(mixed, n_shards)
    assert np.median(in_use) == min(mixed, n_shards)


def test_the_order_depends_on_the_generator_alone():
    items = fake_items(10, 20, 3)
    orders = [mixed_order(items, range(200), random.Random(seed)) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert [items[i].shard for i in orders[0]] != [items[i].shard for i in orders[2]]  # shards, too, take other turns
    assert orders[0] != sorted(orders[0])
    some = mixed_order(items, [5, 6, 150, 7], random.Random(1))
    assert sorted(some) == [5, 6, 7, 150]


def test_with_few_shards_it_is_a_fair_shuffle():
    """Every image is as likely at every place: means over many draws, 4.5 of places 0 to 9, standard error 0.064."""
    items = fake_items(5, 2, 8)
    places = np.array([np.argsort(mixed_order(items, range(10), random.Random(seed))) for seed in range(2000)])
    assert np.abs(places.mean(axis=0) - 4.5).max() < 0.3
    pairs = (np.abs(places[:, 0] - places[:, 1]) == 1).mean()  # neighbors in a shard stay neighbors by chance only
    assert abs(pairs - 2 / 10) < 0.04


def test_other_items_are_shuffled_as_ever(photos):
    assert mixed_order(["a", "b"], [0, 1], random.Random(1)) is None
    assert mixed_order([], [], random.Random(1)) is None


def test_learners_go_from_shard_to_shard_and_validate_in_order(shards):
    dls = loaders(shards, mixed=1)
    learn = pretext_learner(dls, "rotation", arch="resnet10t")
    images = learn.dls.train.dataset.tls[0].items
    learn.dls.train.before_iter()
    shard = [images[i].shard for i in learn.dls.train.get_idxs()]
    assert sum(a != b for a, b in pairwise(shard)) == len(set(shard)) - 1 == 8
    assert learn.dls.valid.get_idxs() == list(range(len(learn.dls.valid_ds)))


# --- fetching ---------------------------------------------------------------------------------------------------------


class Copying:
    """Fetches by copying, and remembers what."""

    def __init__(self, folder: Path):
        self.folder, self.asked, self.broken = folder, [], set()

    def __call__(self, name: str, path: Path) -> None:
        self.asked.append(name)
        if name in self.broken:
            raise ConnectionError(name)
        shutil.copy(self.folder / name, path)


def index_alone(shards: Path, folder: Path) -> Path:
    folder.mkdir()
    return Path(shutil.copy(shards / "index.csv", folder))


@pytest.fixture
def _no_waiting(monkeypatch):
    monkeypatch.setattr("selfsup_fastai.data.fetching._PAUSES", (0, 0, 0))


def test_each_shard_is_fetched_once_an_epoch_and_the_folder_stays_small(shards, tmp_path):
    size = max(file.stat().st_size for file in shards.glob("*.tar"))
    fetch, local = Copying(shards), tmp_path / "local"
    dls = loaders(index_alone(shards, tmp_path / "i"), fetch=fetch, local=local, mixed=2, keep_gb=4 * size / 1e9)
    near = loaders(shards, mixed=2, split_by="shard")
    of_train = set(dls.items_df["shard"][~dls.items_df["is_valid"]])
    fetch.asked.clear()
    for b, same in zip(dls.train, near.train, strict=True):
        assert torch.equal(b[0], same[0])
        assert sum(file.stat().st_size for file in local.glob("*.tar")) <= 4 * size
    assert len(of_train) == 8
    assert len(fetch.asked) == len(set(fetch.asked)) and len(fetch.asked) >= 8 - 4


def test_workers_fetch_with_a_command(shards, tmp_path):
    copied = tmp_path / "a place; with $(odd) names"
    shutil.copytree(shards, copied)
    fetch = f"cp '{copied}/{{name}}' {{path}}"
    dls = loaders(copied / "index.csv", fetch=fetch, local=tmp_path / "local", num_workers=2)
    assert torch.equal(batches(dls), batches(loaders(shards, split_by="shard")))
    left = {file.name for file in (tmp_path / "local").iterdir() if not file.name.startswith(".")}
    assert left == {f"shard-{i:06d}.tar" for i in range(9)}


def test_shards_without_an_index_are_fetched_once_to_make_one(shards, tmp_path):
    fetch, names = Copying(shards), [f"shard-{i:06d}.tar" for i in range(9)]
    dls = loaders(names, fetch=fetch, local=tmp_path / "local")
    assert torch.equal(batches(dls), batches(loaders(shards, split_by="shard")))
    for file in (tmp_path / "local").glob("*.tar"):
        file.unlink()
    fetch.asked.clear()
    loaders(names, fetch=fetch, local=tmp_path / "local")
    assert len(fetch.asked) <= 2  # the first one, to see whether fetching works, and what fastai tries


def test_many_at_once_fetch_a_shard_once(shards, tmp_path):
    fetch = Copying(shards)
    place = Fetched(fetch, tmp_path, ["shard-000001.tar"], 10**9)
    with ThreadPoolExecutor(8) as pool:
        files = list(pool.map(place.file, ["shard-000001.tar"] * 16))
    assert fetch.asked == ["shard-000001.tar"]
    assert {file.read_bytes() for file in files} == {(shards / "shard-000001.tar").read_bytes()}


@pytest.mark.usefixtures("_no_waiting")
def test_the_least_recently_used_gives_way_and_nothing_else(shards, tmp_path):
    (tmp_path / "mine.tar").write_bytes(b"x" * 10**6)
    names = [f"shard-{i:06d}.tar" for i in range(3)]
    place = Fetched(Copying(shards), tmp_path, names, 2 * max((shards / n).stat().st_size for n in names))
    for name, when in zip((names[0], names[1]), (20, 10)):
        os.utime(place.file(name), (when, when))
    place.file(names[2])
    assert [(tmp_path / name).exists() for name in (*names, "mine.tar")] == [True, False, True, True]


@pytest.mark.usefixtures("_no_waiting")
def test_a_shard_that_cannot_be_fetched_costs_its_images_not_the_run(shards, tmp_path):
    fetch = Copying(shards)
    dls = loaders(index_alone(shards, tmp_path / "i"), fetch=fetch, local=tmp_path / "local", split_by="random")
    fetch.broken = {"shard-000004.tar"}
    with pytest.warns(UserWarning, match=r"cannot be read now \(shard\)") as caught:
        x = batches(dls)
    grey = (x == x[:, :1, :1, :1]).all(dim=(1, 2, 3))
    assert grey.sum() == 7 and not any(SECRET in str(w.message) or "shard-0" in str(w.message) for w in caught)
    assert fetch.asked.count("shard-000004.tar") == 3  # three attempts for all seven images


@pytest.mark.usefixtures("_no_waiting")
def test_half_a_file_is_not_taken_for_a_shard(shards, tmp_path):
    def fetch(name, path):
        path.write_bytes((shards / name).read_bytes()[:-512])

    with pytest.raises(DataError, match=r"first 3 shards could not be fetched: .*no file of the size that the index"):
        loaders(shards / "index.csv", fetch=fetch, local=tmp_path / "local")
    assert not [f for f in (tmp_path / "local").iterdir() if f.suffix in (".tar", ".part")]


@pytest.mark.usefixtures("_no_waiting")
def test_a_shard_that_changed_is_fetched_anew_and_a_missing_one_stops_nothing(shards, tmp_path):
    fetch, local = Copying(shards), tmp_path / "local"
    local.mkdir()
    shutil.copy(shards / "shard-000008.tar", local / "shard-000001.tar")  # what was there under this name before
    fetch.broken = {"shard-000000.tar"}
    names = [f"shard-{i:06d}.tar" for i in range(9)]
    index = index_alone(shards, tmp_path / "i")
    with pytest.warns(UserWarning, match="cannot be read now"):
        batches(loaders(index, fetch=fetch, local=local, split_by="random"))
    assert (local / names[1]).read_bytes() == (shards / names[1]).read_bytes()


@pytest.mark.parametrize(("code", "again"), [("timeout", 7), ("truncated", 0)])
def test_what_may_go_better_another_time_is_tried_again(foreign, monkeypatch, code, again):
    tried = []

    def failing(members, **kwargs):
        tried.extend(members)
        ok, report = check_files(members, **kwargs)
        first = {"file": members[0], "code": code, "message": ""}
        return ok.drop(index=ok.index[0]), pd.DataFrame([first, *report.to_dict("records")])

    check_files = shard_index.check_files
    monkeypatch.setattr(shard_index, "check_files", failing)
    assert list(loaders(foreign).report["code"]) == [code]
    tried.clear()
    loaders(foreign)
    assert len(tried) == again


@pytest.mark.usefixtures("_no_waiting")
@pytest.mark.parametrize(
    ("fetch", "said"),
    [
        ("cp nowhere/{name} {path}", r"'?nowhere/shard-000002.tar'?: No such file or directory \(exit code 1\)"),
        (lambda name, path: {}["credentials"], "KeyError: 'credentials'"),
    ],
)
def test_why_nothing_could_be_fetched_is_told(shards, tmp_path, fetch, said):
    with pytest.raises(DataError, match=f"could not be fetched: .*{said}.*the name 'shard-000002.tar'"):
        loaders(shards / "index.csv", fetch=fetch, local=tmp_path / "local")


def test_a_command_that_hangs_is_ended_and_others_do_not_wait_for_it_again(tmp_path, monkeypatch):
    monkeypatch.setattr("selfsup_fastai.data.fetching.FETCH_SECONDS", 2.0)
    hangs = f"sh -c 'echo $$ >> {tmp_path}/{{name}}.pids; exec sleep 600' {{path}}"

    def fetch(_: int) -> str:  # as another process would: what it knows of failures is its own
        with pytest.raises(OSError, match="could not be fetched"):
            Fetched(hangs, tmp_path / "local", ["0.tar"], 10**9).file("0.tar")

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(fetch, range(3)))
    started = (tmp_path / "0.tar.pids").read_text().split()
    assert len(started) == 1 and not is_running(int(started[0]))
    fetch(0)  # one that comes later tries again
    assert len((tmp_path / "0.tar.pids").read_text().split()) == 2
    assert not list((tmp_path / "local").glob(".*.part"))


def is_running(pid: int) -> bool:
    """Whether there is such a process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_what_a_killed_run_still_fetches_does_not_mix_with_what_is_fetched(shards, tmp_path):
    whole = (shards / "shard-000001.tar").read_bytes()
    (tmp_path / ".shard-000001.tar.7-1.part").write_bytes(b"half")
    left = open(tmp_path / ".shard-000001.tar.7-1.part", "ab")  # noqa: SIM115

    def fetch(name: str, path: Path) -> None:
        left.write(b"more")
        left.flush()
        path.write_bytes(whole)
        left.write(b"more")

    place = Fetched(fetch, tmp_path, ["shard-000001.tar"], 10**9)
    assert place.file("shard-000001.tar", len(whole)).read_bytes() == whole
    left.close()
    assert not list(tmp_path.glob(".*.part"))


def test_a_command_goes_past_no_shell():
    words = command("tool -q s3://b/{name} {path}", "a b;$(rm).tar", Path("/x y"))
    assert words == ["tool", "-q", "s3://b/a b;$(rm).tar", "/x y"]


# --- damage -----------------------------------------------------------------------------------------------------------


def test_bad_members_are_listed_and_others_left_alone(foreign, tmp_path, caplog):
    file = foreign / "shard-000000.tar"
    dicom = slices(tmp_path / "scans", 1, "P1", seed=0)[0].read_bytes()
    png = png_of(foreign)
    add(file, f"{SECRET}.png", png[: len(png) // 2])
    add(file, f"{SECRET}.jpg", b"no image at all")
    add(file, f"{SECRET}.dcm", dicom)
    add(file, "tiny.png", tiny())
    add(file, "000.json", b"{}")
    add(file, "000.pickle", Trap(tmp_path).dumped())
    with caplog.at_level("INFO", "selfsup_fastai"):
        dls = loaders(foreign)
    batches(dls)
    assert len(dls.items_df) == 60 and not (tmp_path / "sprung").exists()
    assert list(dls.report["code"]) == ["truncated", "not_an_image", "dicom", "too_small"]
    assert set(dls.report["file"]) == {file} and "image 8 of the shard" in dls.report["message"][0]
    assert "1 json, 1 pickle" in caplog.text
    assert SECRET not in caplog.text + dls.report.to_string()
    again = loaders(foreign).report  # remembered
    assert again.equals(dls.report)


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return (Path.touch, (self.folder / "sprung",))

    def dumped(self) -> bytes:
        return pickle.dumps(self)


def tiny() -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (1, 20)).save(out, "PNG")
    return out.getvalue()


def test_damaged_shards_give_what_comes_before_the_damage(foreign):
    whole = [file.read_bytes() for file in sorted(foreign.glob("*.tar"))]
    with tarfile.open(foreign / "shard-000000.tar") as tar:
        third, sixth = (tar.getmembers()[i] for i in (2, 5))
    (foreign / "shard-000000.tar").write_bytes(whole[0][: third.offset_data + 10])  # in the middle of an image
    (foreign / "shard-000001.tar").write_bytes(b"\x01garbage" * 1000)
    (foreign / "shard-000002.tar").write_bytes(b"")
    broken = bytearray(whole[3])
    with tarfile.open(foreign / "shard-000003.tar") as tar:
        sixth = tar.getmembers()[5]
    broken[sixth.offset : sixth.offset + 512] = b"\xff" * 512  # a header
    (foreign / "shard-000003.tar").write_bytes(broken)
    with tarfile.open(foreign / "shard-000004.tar", "w:gz") as tar:
        tar.add(foreign / "shard-000005.tar", "inner.png")
    with tarfile.open(foreign / "shard-000006.tar", "w"):
        pass  # empty, and in order
    dls = loaders(foreign)
    batches(dls)
    assert dls.items_df["shard"].value_counts().to_dict() == {0: 2, 3: 5, 5: 7, 7: 7, 8: 4}
    assert list(dls.report["code"]) == ["shard"] * 5
    assert [file.name for file in dls.report["file"]] == [f"shard-{i:06d}.tar" for i in range(5)]


def test_a_shard_that_breaks_later_costs_its_images(foreign):
    dls = loaders(foreign)
    (foreign / "shard-000001.tar").unlink()
    os.truncate(foreign / "shard-000002.tar", 600)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        x = batches(dls)
    assert (x == x[:, :1, :1, :1]).all(dim=(1, 2, 3)).sum() == 14
    assert {w.category for w in caught} == {UserWarning} and SECRET not in str([w.message for w in caught])


def test_what_was_found_is_remembered_until_a_shard_changes(foreign, monkeypatch):
    first = loaders(foreign).items_df
    tried = []

    def counting(members, **kwargs):
        tried.extend(members)
        return check_files(members, **kwargs)

    check_files = shard_index.check_files
    monkeypatch.setattr(shard_index, "check_files", counting)
    assert loaders(foreign).items_df.equals(first) and tried == []
    add(foreign / "shard-000008.tar", "new.png", png_of(foreign))
    assert len(loaders(foreign).items_df) == 61 and len(tried) == 5


def scanned(folder: Path) -> dict[str, torch.Tensor]:
    """Which of the members were tried by this process."""
    tried, check_files = [], shard_index.check_files
    shard_index.check_files = lambda members, **kwargs: tried.extend(members) or check_files(members, **kwargs)
    loaders(folder / "foreign")
    return {"tried": torch.tensor(len(tried))}


def test_of_several_processes_one_looks_through_shards(foreign):
    first, second = of_two(__file__, "scanned", foreign.parent)
    assert (first["tried"], second["tried"]) == (60, 0)


def png_of(folder: Path) -> bytes:
    with tarfile.open(folder / "shard-000000.tar") as tar:
        return tar.extractfile(tar.getmembers()[0]).read()


def test_an_index_of_other_shards_is_not_believed(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "mixed")
    os.replace(tmp_path / "mixed" / "shard-000008.tar", tmp_path / "mixed" / "shard-000002.tar")
    dls = loaders(tmp_path / "mixed")
    batches(dls)  # no warning of images that cannot be read
    assert dls.items_df["shard"].value_counts()[2] == 4
    assert list(dls.report["code"]) == ["shard"] and dls.report["file"][0].name == "shard-000008.tar"


def test_notes_name_nothing(foreign, monkeypatch, tmp_path):
    monkeypatch.setenv("SELFSUP_CACHE", str(tmp_path / "cache"))
    named = foreign.rename(tmp_path / SECRET)
    (named / "shard-000000.tar").rename(named / f"{SECRET}.tar")
    loaders(named)
    notes = list((tmp_path / "cache" / "shards-1").iterdir())
    assert len(notes) == 9
    assert not any(SECRET.lower() in (note.name + note.read_text()).lower() for note in notes)


def test_members_are_told_by_headers_alone(shards):
    file = shards / "shard-000000.tar"
    with tarfile.open(file) as tar:
        wanted = [(m.offset_data, m.size) for m in tar]
    assert members_of(file).images == wanted and members_of(file).whole


@pytest.mark.parametrize(
    ("path", "settings", "words"),
    [
        ("nowhere", {}, "no folder"),
        ("photos", {}, "no shard"),
        (3, {}, "got int"),
        ([], {}, "empty"),
        ("photos/0000.png", {}, "no index of shards"),
        ("outside.csv", {}, "outside of its folder"),
        ("shards", dict(mixed=0), "from 1 up; got 0"),
        ("shards", dict(local="x"), "nothing says how"),
        ("shards", dict(fetch="cp {name}", local="x"), "with {name} and {path}"),
        ("shards", dict(fetch="no-such-command {name} {path}", local="x"), "no command 'no-such-command'"),
        ("shards", dict(fetch="cp shards/{name} {path}"), "local="),
        ("shards", dict(fetch="cp shards/{name} {path}", local="x", keep_gb=0), "above 0; got 0"),
        ("shards", dict(fetch="cp shards/{name} {path}", local="x", keep_gb=1e-5), "keep_gb=1e-05 is too little"),
        ("photos", dict(fetch="cp shards/{name} {path}", local="x"), "no index in the folder"),
        ("shards", dict(bs=0), "bs is the batch size"),
    ],
)
def test_mistakes(path, settings, words, shards, tmp_path):
    write_images(tmp_path / "photos", 3)
    shutil.copytree(shards, tmp_path / "shards")
    text = (shards / "index.csv").read_text()
    (tmp_path / "outside.csv").write_text(text.replace("shard-000000.tar", "../shard-000000.tar"))
    with pytest.raises(DataError, match=words):
        loaders(path, **settings)


@pytest.mark.parametrize("size", [-512, -2048, -1])
def test_a_forged_size_ends_a_shard(tmp_path, size):
    """A negative one leads tarfile back to where it was, for ever."""
    header = bytearray(tarfile.TarInfo("a.png").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (size % 256**12).to_bytes(12, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    file = tmp_path / "forged.tar"
    with tarfile.open(file, "w") as tar:
        info = tarfile.TarInfo("b.png")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    file.write_bytes(file.read_bytes()[:1024] + bytes(header) + bytes(4096))
    found = members_of(file)
    assert found.images == [(512, 3)] and not found.whole


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": -1}, "outside of their shards"),
        ({"size": 10**9}, "outside of their shards"),
        ({"offset": -1}, "outside of their shards"),
        ({"shard": "--rsh=sh -c id.tar"}, "begin with a hyphen"),
    ],
)
def test_an_index_that_was_forged(shards, tmp_path, change, words):
    index = pd.read_csv(shards / "index.csv", keep_default_na=False)
    row = index.index[index["code"] == ""][0]
    for name, value in change.items():
        index.loc[row, name] = value
    index.to_csv(tmp_path / "index.csv", index=False)
    with pytest.raises(DataError, match=words):
        read_index(tmp_path / "index.csv")


def test_a_command_with_open_quotes():
    with pytest.raises(DataError, match="fetch is no command: no closing quotation"):
        check_fetch("cp 'shards/{name} {path}", "local", 1)


if __name__ == "__main__":
    run(globals())
