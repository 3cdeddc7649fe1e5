"""Nobody is on both sides: patients, studies, groups and duplicates, on tables made by hand and on real headers."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
from fastai.data.block import DataBlock, TransformBlock
from fastai.data.transforms import ColReader

from selfsup_fastai.data.splitters import (
    GroupSplitter,
    PatientSplitter,
    assert_disjoint,
    duplicates_across,
    groups_of,
    nearest_sum,
    pixel_hash,
)
from selfsup_fastai.errors import DataError
from selfsup_fastai.messages import quiet

BUNDLED = Path(pydicom.__file__).parent / "data" / "test_files" / "dicomdirtests"


def made(sizes, **columns) -> pd.DataFrame:
    """A table of as many patients as sizes, with so many images each."""
    patients = np.repeat([f"p{i}" for i in range(len(sizes))], sizes)
    n = len(patients)
    table = pd.DataFrame({"file": [Path(f"/secret/{i}.dcm") for i in range(n)], "patient": patients})
    ids = {"study": "t" + table["patient"], "series": "r" + table["patient"], "instance": [f"i{i}" for i in range(n)]}
    return table.assign(**(ids | columns))


def sides(table, split, column="patient") -> tuple[set, set]:
    return tuple(set(table[column].iloc[list(places)]) for places in split)


def partition(groups: pd.Series) -> set[frozenset]:
    return {frozenset(rows) for rows in groups.groupby(groups).groups.values()}


@pytest.fixture(scope="module")
def bundled() -> pd.DataFrame:
    """Headers of pydicom's own patients; two folders share one of them."""
    rows = []
    for file in sorted(BUNDLED.rglob("*")):
        if file.is_file() and file.name[:6] not in ("DICOMD", "README"):
            dataset = pydicom.dcmread(file, stop_before_pixels=True)
            ids = {"patient": "PatientID", "study": "StudyInstanceUID", "series": "SeriesInstanceUID"}
            row = {name: str(dataset.get(keyword) or "") for name, keyword in ids.items()}
            rows.append({"file": file, "instance": str(dataset.get("SOPInstanceUID")), **row})
    return pd.DataFrame(rows)


# ---- splitting by patient


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sizes", [[1] * 50, [4] * 25, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [50, 1, 1, 1], [3, 2]])
def test_whole_patients_on_each_side(sizes, seed):
    table = made(sizes)
    train, valid = PatientSplitter(0.2, seed)(table)
    assert sorted(train + valid) == list(range(len(table)))
    one, other = sides(table, (train, valid))
    assert one and other and not one & other
    assert_disjoint(table, train, valid)


def test_the_share_is_the_nearest_there_is():
    rng = np.random.default_rng(0)
    for seed in range(60):
        sizes = rng.integers(1, 12, size=rng.integers(2, 9)).tolist()
        with quiet():
            _, valid = PatientSplitter(0.2, seed)(made(sizes))
        target = min(max(1, round(sum(sizes) * 0.2)), sum(sizes) - 1)
        some = [c for n in range(1, len(sizes)) for c in combinations(sizes, n)]
        assert abs(len(valid) - target) == min(abs(sum(c) - target) for c in some)


def test_the_share_is_exact_for_many_patients():
    sizes = np.random.default_rng(1).geometric(0.1, 3_000).tolist()
    assert sum(sizes[i] for i in nearest_sum(sizes, 6_000)) == 6_000
    assert nearest_sum([1] * 5_000, 3_000) == list(range(3_000))
    assert nearest_sum([1] * 1_000 + [100_000], 20_200) == list(range(1_000))  # not the giant


def test_rows_in_any_order_give_the_same_split():
    table = made(np.random.default_rng(2).integers(1, 6, 40).tolist())
    train, valid = PatientSplitter(0.25, 7)(table)
    shuffled = table.sample(frac=1, random_state=5)
    other_train, other_valid = PatientSplitter(0.25, 7)(shuffled)
    assert set(shuffled["file"].iloc[other_valid]) == set(table["file"].iloc[valid])
    assert set(shuffled["file"].iloc[other_train]) == set(table["file"].iloc[train])


def test_seeds_differ_and_every_patient_is_drawn_about_as_often():
    table = made([3] * 20)
    splits = [PatientSplitter(0.2, seed)(table)[1] for seed in range(300)]
    assert len({tuple(valid) for valid in splits}) > 270  # of 4,845 there are
    drawn = np.bincount(np.concatenate(splits), minlength=60)[::3]
    assert drawn.sum() == 300 * 4  # four patients of 20 each time
    assert drawn.min() > 35 and drawn.max() < 85  # 60 expected, s.d. 7


def test_one_giant_patient_stays_whole_and_the_share_is_said(capsys):
    table = made([90, 10])
    train, valid = PatientSplitter(0.5, 0)(table)
    assert sorted([len(train), len(valid)]) == [10, 90]
    assert "of the images are to validate with, not 50%: no patient is divided" in capsys.readouterr().err


def test_one_patient_only_cannot_be_split():
    with pytest.raises(DataError, match=r"All 9 images are of one patient.*random split by name"):
        PatientSplitter()(made([9]))


def test_for_items_by_their_files():
    table = made([2, 3, 4, 1])

    class Frame:
        """What has a path, as an item of a DICOM file has."""

        def __init__(self, file):
            self.file = file

        def __fspath__(self):
            return str(self.file)

    items = [Frame(file) for file in table["file"] for _ in range(3)][::-1]  # three frames of each file
    train, valid = PatientSplitter(0.3, 1, table)(items)
    owner = dict(zip(map(str, table["file"]), table["patient"]))
    owners = [{owner[str(items[i].file)] for i in places} for places in (train, valid)]
    assert not owners[0] & owners[1] and sorted(train + valid) == list(range(30))
    assert len(valid) == 9
    with pytest.raises(DataError, match="1 of 31 items are not in the table") as err:
        PatientSplitter(table=table)([*items, Path("/secret/other.dcm")])
    assert "secret" not in str(err.value)
    with pytest.raises(DataError, match="table="):
        PatientSplitter()(items)


def test_the_folders_of_one_patient_go_to_one_side(bundled):
    """98892001 and 98892003 are two studies of one patient; 77654033 is another, TINY_ALPHA a third."""
    folders = bundled["file"].map(lambda file: file.relative_to(BUNDLED).parts[0])
    groups = groups_of(bundled)
    assert groups.nunique() == bundled["patient"].nunique() == 3
    assert groups[folders == "98892001"].iloc[0] == groups[folders == "98892003"].iloc[0]
    for seed in range(8):
        with quiet():
            train, valid = PatientSplitter(0.2, seed)(bundled)
        assert not set(bundled["patient"].iloc[train]) & set(bundled["patient"].iloc[valid])
    by_folder = [np.flatnonzero(folders == name) for name in ("98892001", "98892003")]
    with pytest.raises(DataError, match=r"validation: 1 patient\(s\)\. Split"):
        assert_disjoint(bundled, *by_folder)


# ---- who belongs together


def test_the_nameless_are_not_one_patient(capsys):
    table = made([1] * 6)
    table["patient"] = ["p", "", None, " ", np.nan, ""]
    table["study"] = ["a", "b", "b", "", "", ""]
    table["series"] = ["1", "2", "3", "4", "4", ""]
    assert partition(groups_of(table)) == {frozenset(g) for g in ([0], [1, 2], [3, 4], [5])}
    said = capsys.readouterr().err
    assert said == (
        "5 of 6 files have no patient id. Kept together instead: 2 by study, 2 by series, 1 each file on its own.\n"
    )


def test_a_nameless_image_goes_with_the_patient_of_its_study():
    table = made([2, 2, 1])
    table.loc[[1, 4], "patient"] = ""
    table.loc[4, ["study", "series"]] = table.loc[2, ["study", "series"]]
    with quiet():
        assert partition(groups_of(table)) == {frozenset([0, 1]), frozenset([2, 3, 4])}


def test_patients_that_are_tied_are_counted(capsys):
    groups_of(made([1, 2, 3, 4], study=["x"] * 3 + ["y"] * 7))  # 0 with 1, 2 with 3
    assert "4 patients share a study, a series or a picture with another one" in capsys.readouterr().err


def test_frames_of_one_file_stay_together():
    table = made([1, 1], patient="", study="", series="").loc[[0, 0, 1, 1, 1]]
    table = table.drop(columns="instance").reset_index(drop=True)
    with quiet():
        assert partition(groups_of(table)) == {frozenset([0, 1]), frozenset([2, 3, 4])}


def test_names_of_groups_hold_no_path_and_nothing_is_said_where_all_have_ids(capsys):
    assert groups_of(made([2, 1])).tolist() == ["patient p0", "patient p0", "patient p1"]
    assert capsys.readouterr().err == ""
    names = groups_of(pd.DataFrame({"file": [Path("/secret/a"), Path("/secret/b")], "patient": ["", ""]}))
    assert names.nunique() == 2 and not names.str.contains("secret").any()


def test_duplicates_are_merged_before_the_split():
    table = made([2, 2, 2, 2])
    table.loc[2, "instance"] = table.loc[1, "instance"]  # patients 0 and 1
    hashes = pd.Series(["", "", "", "a", "a", "", "", ""])  # patients 1 and 2; blank pictures tie nobody
    assert partition(groups_of(table)) == {frozenset([0, 1, 2, 3]), frozenset([4, 5]), frozenset([6, 7])}
    merged = {frozenset(range(6)), frozenset([6, 7])}
    assert partition(groups_of(table, hashes)) == partition(groups_of(table.assign(pixel_hash=hashes))) == merged
    for seed in range(10):
        with quiet():
            split = PatientSplitter(0.25, seed, pixel_hashes=hashes)(table)
        assert_disjoint(table, *split, hashes)
        assert duplicates_across(table, *split, hashes).empty


def test_groups_agree_with_a_search_of_the_graph():
    """Against breadth-first search over rows that share any value."""
    rng = np.random.default_rng(4)
    for _ in range(20):
        draw = {name: [f"{v}" if v else "" for v in rng.integers(0, 12, 25)] for name in ("patient", "study", "series")}
        table = pd.DataFrame(draw)
        linked = sum(((a := table[c].to_numpy())[:, None] == a) & (a != "") for c in table) > 0
        reach = np.eye(25, dtype=bool) | linked
        for _ in range(25):
            reach = reach @ reach
        with quiet():
            assert partition(groups_of(table)) == {frozenset(np.flatnonzero(row).tolist()) for row in reach}


def test_a_picture_of_many_patients_ties_nobody():
    """A start screen or a test pattern under five names; two names for one picture are one patient."""
    table = pd.DataFrame({"patient": list("abcdefg"), "pixel_hash": ["s"] * 5 + ["t"] * 2, "instance": ["1"] * 7})
    with quiet():
        assert partition(groups_of(table)) == {frozenset([i]) for i in range(5)} | {frozenset([5, 6])}


def test_mistakes_in_tables():
    with pytest.raises(DataError, match="none of the columns patient, study, series"):
        groups_of(pd.DataFrame({"file": ["a"]}))
    with pytest.raises(DataError, match="got list"):
        groups_of([1])
    with pytest.raises(DataError, match="same index"):
        groups_of(made([2]), pd.Series(["a", "b"], index=[0, 0]))


# ---- what is on both sides


def test_counts_of_what_is_shared_and_no_ids():
    table = made([4, 4, 2])
    table.loc[9, "instance"] = table.loc[0, "instance"]
    hashes = pd.Series(["h", "", "", "", "", "", "", "", "h", ""])
    train, valid = [0, 1, 4, 5], [2, 3, 6, 7, 8, 9]
    with pytest.raises(DataError) as err:
        assert_disjoint(table, train, valid, hashes)
    told = "2 patient(s), 2 study(s), 2 series, 1 instance(s), 1 identical image(s)."
    assert str(err.value).startswith(f"On both sides of the split, training and validation: {told}")
    with pytest.raises(DataError, match=r"2 patient\(s\)"):
        assert_disjoint(table.iloc[train], table.iloc[valid])
    assert_disjoint(table.iloc[:4], table.iloc[4:9])
    assert_disjoint(table, [0, 1, 2, 3], [4, 5, 6, 7])


def test_duplicates_across_lists_rows():
    table = made([2, 2, 2]).set_index(pd.Index(list("abcdef")))
    table.loc["e", "instance"] = "i0"
    hashes = pd.Series(["x", "y", "y", "", "", ""], index=list("abcdef"))
    found = duplicates_across(table, [0, 1], [2, 3, 4, 5], hashes)
    assert found.to_dict("records") == [
        {"kind": "instance", "train": ["a"], "valid": ["e"]},
        {"kind": "pixels", "train": ["b"], "valid": ["c"]},
    ]


def test_pixel_hashes_tell_values_shapes_and_types():
    array = np.arange(12, dtype=np.int16).reshape(3, 4)
    same = [array.copy(), array.astype(">i2"), np.asfortranarray(array), np.repeat(array, 2, 1)[:, ::2]]
    assert {pixel_hash(one) for one in same} == {pixel_hash(array)}
    others = [array.reshape(4, 3), array.astype(np.uint16), array.astype(np.float32), array[::-1], array + 1]
    assert len({pixel_hash(one) for one in [array, *others]}) == 6
    assert pixel_hash(np.zeros((4, 4))) == pixel_hash(np.full((2, 2), 7)) == pixel_hash(np.zeros((0, 3))) == ""


def test_eight_encodings_of_one_slice_are_duplicates():
    """pydicom's MR_small in several syntaxes: one picture."""
    folder = BUNDLED.parent
    names = ["MR_small", "MR_small_RLE", "MR_small_implicit", "MR_small_expb", "MR_small_bigendian"]
    hashes = {pixel_hash(pydicom.dcmread(folder / f"{name}.dcm").pixel_array) for name in names}
    assert len(hashes) == 1 and hashes != {pixel_hash(pydicom.dcmread(folder / "CT_small.dcm").pixel_array)}


# ---- any other group


def test_groups_of_a_column_in_fastai():
    df = pd.DataFrame({"name": [f"{i}.png" for i in range(40)], "slide": np.repeat(range(10), 4)}).sample(
        frac=1, random_state=0
    )
    block = DataBlock([TransformBlock, TransformBlock], get_x=ColReader("name"), get_y=ColReader("slide"))
    block.splitter = GroupSplitter("slide", 0.3, seed=3)
    datasets = block.datasets(df)
    slides = [{y for _, y in part} for part in (datasets.train, datasets.valid)]
    assert len(datasets.valid) == 12 and not slides[0] & slides[1] and len(slides[0] | slides[1]) == 10


def test_patients_in_fastai():
    table = made([3, 3, 3, 3, 3])
    block = DataBlock([TransformBlock], get_x=ColReader("patient"), splitter=PatientSplitter(0.4, 1))
    datasets = block.datasets(table)
    assert len(datasets.valid) == 6 and not {x for (x,) in datasets.train} & {x for (x,) in datasets.valid}


def test_missing_groups_are_one_each(capsys):
    df = pd.DataFrame({"person": ["a", None, "a", np.nan, " ", "b"]})
    counts = [len(GroupSplitter("person", 1 / 6, seed)(df)[1]) for seed in range(20)]
    assert counts == [1] * 20  # always one of the four that are alone
    assert "3 of 6 images have no group: each is one of its own." in capsys.readouterr().err
    whole = GroupSplitter(pd.Series([1, 1, 2, 2, 3, 3]), 0.3, 5)(range(6))
    assert GroupSplitter([1.0, 1.0, 2.0, 2.0, 3.0, 3.0], 0.3, 5)(range(6)) == whole  # as a column with a gap has them


def test_groups_by_a_function_or_a_list():
    files = [Path(f"/photos/{person}/{i}.jpg") for person in "abcde" for i in range(4)]
    train, valid = GroupSplitter(lambda file: file.parent.name, 0.2, 0)(files)
    assert len(valid) == 4 and len({files[i].parent for i in valid}) == 1
    assert GroupSplitter([file.parent.name for file in files], 0.2, 0)(files) == (train, valid)
    df = pd.DataFrame({"person": [file.parent.name for file in files]})
    assert GroupSplitter("person", 0.2, 0)(df) == GroupSplitter(lambda row: row["person"], 0.2, 0)(df) == (train, valid)


def test_mistakes_in_groups():
    df = pd.DataFrame({"person": list("aabb")})
    with pytest.raises(DataError, match="no column 'persons'; its columns: person"):
        GroupSplitter("persons")(df)
    with pytest.raises(DataError, match="needs a DataFrame; got list"):
        GroupSplitter("person")([1, 2])
    with pytest.raises(DataError, match="each of the 4 items; got 3 groups"):
        GroupSplitter([1, 2, 3])(df)
    with pytest.raises(DataError, match="All 4 images are of one group"):
        GroupSplitter([1] * 4)(df)
    for splitter, groups in ((PatientSplitter, []), (GroupSplitter, ["person"])):
        for wrong in (1, -0.1, True, "0.2", None):
            with pytest.raises(DataError, match="valid_pct is the share"):
                splitter(*groups, valid_pct=wrong)
        for wrong in (-1, 1.5, None):
            with pytest.raises(DataError, match="seed is an integer"):
                splitter(*groups, seed=wrong)
