"""Slices in order: beside SimpleITK's and highdicom's, and on tables made by hand."""

from pathlib import Path

import highdicom
import numpy as np
import pandas as pd
import pydicom
import pytest
import SimpleITK

from selfsup_fastai.data.volumes import PROBLEMS, neighbors, slices_of, volume_report, volumes_of
from selfsup_fastai.errors import DataError

BUNDLED = Path(pydicom.__file__).parent / "data" / "test_files" / "dicomdirtests"
AXIAL, CORONAL, SAGITTAL = (1, 0, 0, 0, 1, 0), (1, 0, 0, 0, 0, -1), (0, 1, 0, 0, 0, -1)


def scan(folder: Path) -> pd.DataFrame:
    """What volumes depend on, of each file in a folder, the files shuffled."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name[:6] not in ("DICOMD", "README"))
    files = [files[i] for i in np.random.default_rng(0).permutation(len(files))]
    return pd.DataFrame([header(file) for file in files]).set_index("file", drop=False)


def header(file: Path) -> dict:
    dataset = pydicom.dcmread(file, stop_before_pixels=True)
    names = {"series": "SeriesInstanceUID", "instance": "SOPInstanceUID", "height": "Rows", "width": "Columns"}
    names |= {"number": "InstanceNumber", "echo_time": "EchoTime", "acquisition": "AcquisitionNumber"}
    row = {"file": file, "frames": 1} | {name: dataset.get(keyword) for name, keyword in names.items()}
    for name in ("Position", "Orientation"):
        values = dataset.get(f"Image{name}Patient")
        row[name.lower()] = tuple(map(float, values)) if values else None
    return row


def made(positions, orientation=AXIAL, **columns) -> pd.DataFrame:
    """A table of one series: z alone or all three coordinates of each slice."""
    points = [(0.0, 0.0, float(p)) if np.isscalar(p) else tuple(p) for p in positions]
    n = len(points)
    plain = {"series": "s", "instance": [f"i{i}" for i in range(n)], "number": range(1, n + 1)}
    table = pd.DataFrame({**plain, "height": 8, "width": 8, "frames": 1})
    table["position"], table["orientation"] = pd.Series(points, dtype=object), [orientation] * n
    return table.assign(**columns)


def gdcm_order(folder: Path) -> list[Path]:
    return [Path(name) for name in SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))]


# ---- real series, as other readers see them


def test_the_order_is_that_of_simpleitk(shared_data):
    folders = [shared_data("ct_series_ge") / "ct_ge", shared_data("mr_series_t1") / "mr_t1"]
    folders += [BUNDLED / "98892001" / "CT5N", BUNDLED / "77654033" / "CT2"]
    for folder, n in zip(folders, (28, 70, 5, 4)):
        (volume,) = volumes_of(scan(folder))
        assert volume.is_volume and len(volume.rows) == n
        assert volume.rows == gdcm_order(folder)


def test_places_and_spacing_are_those_of_highdicom(shared_data):
    for folder in (shared_data("mr_series_t1") / "mr_t1", BUNDLED / "98892001" / "CT5N"):
        (volume,) = volumes_of(scan(folder))
        assert volume.is_even and volume.problems == {}
        theirs = highdicom.get_volume_from_series([pydicom.dcmread(file) for file in volume.rows])
        assert volume.spacing == pytest.approx(theirs.spacing_between_slices, abs=1e-4)
        places = np.array([theirs.map_indices_to_reference(np.array([[i, 0, 0]]))[0] for i in range(len(volume.rows))])
        ours = np.array([header(file)["position"] for file in volume.rows])
        assert places == pytest.approx(ours, abs=1e-2) or places[::-1] == pytest.approx(ours, abs=1e-2)


def test_a_tilted_series_with_two_slice_distances_is_said_to_be_one(shared_data):
    (volume,) = volumes_of(scan(shared_data("ct_series_ge")))
    assert volume.problems["tilt"] in (18, 19)  # GantryDetectorTilt is 18.5
    steps = np.diff(volume.positions)
    assert steps[:12] == pytest.approx(np.full(12, 4.0), abs=0.01)  # SliceThickness 4, then 7
    assert steps[-12:] == pytest.approx(np.full(12, 7.0), abs=0.01)
    assert volume.problems["gaps"] >= 12 and not volume.is_even
    with pytest.raises(Exception, match=r"regularly|volume"):  # highdicom takes it for none
        highdicom.get_volume_from_series([pydicom.dcmread(file) for file in volume.rows])


def test_fmri_is_ten_volumes_in_time_not_one_with_duplicates(shared_data):
    table = scan(shared_data("mr_series_fmri"))
    volumes = volumes_of(table)
    assert [len(volume.rows) for volume in volumes] == [15] * 10
    assert all(volume.is_even and volume.problems == {} for volume in volumes)
    assert [volume.part for volume in volumes] == list(range(10))
    for time, volume in enumerate(volumes):  # files are numbered place by place, then time by time
        assert sorted(table.loc[volume.rows, "number"]) == list(range(15 * time + 1, 15 * time + 16))
        assert volume.spacing == pytest.approx(5.0, abs=1e-3)


def test_seven_orientations_are_no_volume_and_a_gap_is_reported():
    rotating = volumes_of(scan(BUNDLED / "98892003" / "MR700"))
    assert len(rotating) == 7
    assert not any(volume.is_volume for volume in rotating)
    assert all(volume.problems == {"orientations": 7, "few": 1} for volume in rotating)
    (gapped,) = volumes_of(scan(BUNDLED / "77654033" / "CT2"))
    assert gapped.problems == {"gaps": 1} and gapped.is_volume and not gapped.is_even
    with pytest.raises(Exception, match="regularly"):
        highdicom.get_volume_from_series([pydicom.dcmread(file) for file in gapped.rows])
    runs = neighbors([gapped])
    assert list(runs["rows"]) == [tuple(gapped.rows[1:])]


def test_every_file_is_in_one_stack():
    table = scan(BUNDLED)
    table = table[table["series"].notna()]
    volumes = volumes_of(table)
    assert sorted(row for volume in volumes for row in volume.rows + volume.left_out) == sorted(table.index)
    assert {tuple(sorted(v.rows)) for v in volumes if v.is_volume} == {
        tuple(sorted((BUNDLED / "98892001" / "CT5N").iterdir())),
        tuple(sorted((BUNDLED / "77654033" / "CT2").iterdir())),
    }
    xray = next(volume for volume in volumes if "CR1" in str(volume.rows[0]))
    assert xray.problems == {"unordered": 1, "few": 1} and xray.positions == ()


# ---- order


def test_the_order_is_by_position_whatever_numbers_and_rows_say():
    table = made([30, 0, 20, 10], number=[1, 2, 3, 4])
    (volume,) = volumes_of(table)
    assert volume.rows == [1, 3, 2, 0]
    assert volume.positions == (0, 10, 20, 30)
    assert volume.spacing == 10
    (again,) = volumes_of(table.sample(frac=1, random_state=3))
    assert again == volume


def test_along_an_oblique_normal():
    row, column = np.array([0.6, 0.8, 0.0]), np.array([0.0, 0.0, -1.0])
    normal = np.array([-0.8, 0.6, 0.0])  # row x column, by hand
    points = [np.array([5.0, 6.0, 7.0]) + step * normal for step in (2.0, -1.0, 0.5, 3.5)]
    (volume,) = volumes_of(made(points, (*row, *column)))
    assert volume.rows == [1, 2, 0, 3]
    start = np.dot([5.0, 6.0, 7.0], normal)
    assert volume.positions == pytest.approx(start + np.array([-1.0, 0.5, 2.0, 3.5]))
    assert volume.spacing == pytest.approx(1.5) and volume.problems == {}
    assert not volume.forward  # most of the normal points to the right


@pytest.mark.parametrize(
    "orientation, axis, forward",
    [(AXIAL, 2, True), (CORONAL, 1, True), (SAGITTAL, 0, False), ((1, 0, 0, 0, -1, 0), 2, False)],
)
def test_positions_have_one_direction_in_the_body(orientation, axis, forward):
    """The last: a patient on the belly; the normal points to the feet, position 1 is at the head all the same."""
    points = np.zeros((5, 3))
    points[:, axis] = [0, 2, 4, 6, 8]
    table = made(points, orientation)
    (volume,) = volumes_of(table)
    assert volume.forward == forward
    assert volume.rows == ([0, 1, 2, 3, 4] if forward else [4, 3, 2, 1, 0])
    slices = slices_of(table).set_index("row")
    assert slices["position"].sort_index().tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert slices.loc[volume.rows, "place"].tolist() == [0, 1, 2, 3, 4]


def test_without_positions_by_number_and_no_volume():
    table = made([0] * 4, position=None, number=[3, 1, np.nan, 2])
    (volume,) = volumes_of(table)
    assert volume.rows == [2, 1, 3, 0]
    assert volume.problems == {"unordered": 4} and not volume.is_volume
    assert len(slices_of(table)) == len(neighbors(table)) == 0


@pytest.mark.parametrize(
    "wrong", [None, (1, 0, 0, 1, 0, 0), (2, 0, 0, 0, 1, 0), (0,) * 6, (1, 0, 0), "AXIAL", (np.nan,) * 6]
)
def test_an_orientation_that_is_none_is_not_used(wrong):
    table = made([0, 1, 2])
    table["orientation"] = pd.Series([wrong] * 3, dtype=object)
    (volume,) = volumes_of(table)
    assert volume.problems == {"unordered": 3}


# ---- what is one stack


def test_size_echo_and_orientation_part_a_series():
    table = pd.concat([made(range(4)), made(range(4)), made(range(4)), made([(0, y, 0) for y in range(4)], CORONAL)])
    table = table.assign(instance=[f"i{i}" for i in range(16)], echo_time=np.repeat([np.nan, 10.0, 20.0, 10.0], 4))
    table = table.assign(width=np.repeat([8, 8, 8, 9], 4)).reset_index(drop=True)
    volumes = volumes_of(table)
    assert [volume.rows for volume in volumes] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert all(volume.is_volume and volume.problems == {"orientations": 2} for volume in volumes)
    assert [volume.part for volume in volumes] == [0, 1, 2, 3]


def test_directions_that_differ_by_rounding_are_one_orientation():
    table = made(range(6))
    tiny = [(1.0, 0.0, e, 0.0, 1.0, 0.0) for e in (0.0, 4e-4, 5e-4, 6e-4, 0.0, 5.00001e-4)]
    table["orientation"] = pd.Series(tiny, dtype=object)
    assert [volume.rows for volume in volumes_of(table)] == [[0, 1, 2, 3, 4, 5]]


def test_blank_series_are_not_one():
    volumes = volumes_of(made(range(3), series=["", None, " "]))
    assert [volume.rows for volume in volumes] == [[0], [1], [2]]


def test_acquisitions_do_not_part_what_is_even_together():
    (volume,) = volumes_of(made(range(6), acquisition=[1, 1, 2, 2, 3, 3]))
    assert volume.rows == [0, 1, 2, 3, 4, 5] and volume.problems == {}


def test_acquisitions_part_what_is_even_only_by_itself():
    table = made([0, 5, 10, 15, 1, 6, 11, 16], acquisition=[1, 1, 1, 1, 2, 2, 2, 2])
    volumes = volumes_of(table)
    assert [volume.rows for volume in volumes] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert all(volume.is_even for volume in volumes)


def test_repeated_places_by_acquisition_by_image_type_or_by_time():
    places = [0, 0, 1, 1, 2, 2, 3, 3]
    by_turns = [[0, 2, 4, 6], [1, 3, 5, 7]]
    columns = [{}, {"acquisition": [7, 8] * 4}, {"image_type": ["M", "P"] * 4}]
    for given in columns:
        volumes = volumes_of(made(places, **given))
        assert [volume.rows for volume in volumes] == by_turns
        assert all(volume.is_even and volume.problems == {} for volume in volumes)
    both = made(places * 2, image_type=["M"] * 8 + ["P"] * 8, acquisition=[1, 2] * 8)
    assert [volume.rows[:2] for volume in volumes_of(both)] == [[0, 2], [1, 3], [8, 10], [9, 11]]


def test_a_last_time_point_that_was_broken_off():
    volumes = volumes_of(made([*range(6), *range(6), 0, 1, 2]))
    assert [volume.rows for volume in volumes] == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11], [12, 13, 14]]


# ---- what is wrong with it


def test_few_duplicates_are_left_out_and_counted():
    table = made([0, 1, 2, 2, 3, 4], number=[1, 2, 9, 3, 4, 5])
    (volume,) = volumes_of(table)
    assert volume.rows == [0, 1, 3, 4, 5] and volume.left_out == [2]  # the first by number stays
    assert volume.problems == {"duplicates": 1} and volume.is_even


def test_the_same_files_twice_are_duplicates_and_no_time_points():
    table = pd.concat([made(range(5)), made(range(5))], ignore_index=True)
    (volume,) = volumes_of(table)
    assert volume.rows == [0, 1, 2, 3, 4] and sorted(volume.left_out) == [5, 6, 7, 8, 9]
    assert volume.problems == {"duplicates": 5}
    (unordered,) = volumes_of(table.assign(position=None))
    assert unordered.problems == {"unordered": 5, "duplicates": 5}


def test_gaps_are_counted_and_no_run_reaches_over_one():
    table = made([0, 1, 2, 3, 6, 7, 8])
    (volume,) = volumes_of(table)
    assert volume.problems == {"gaps": 1} and volume.is_volume and not volume.is_even
    runs = neighbors(table)
    assert runs["rows"].tolist() == [(0, 1, 2), (1, 2, 3), (4, 5, 6)]
    assert runs["row"].tolist() == [1, 2, 5] and runs["place"].tolist() == [1, 2, 5]
    assert runs["position"].tolist() == pytest.approx([1 / 8, 2 / 8, 7 / 8])  # of the way, not of the count
    assert neighbors(table, 4)["rows"].tolist() == [(0, 1, 2, 3)]
    assert neighbors(table, 4)["row"].tolist() == [2]


def test_of_two_steps_the_shorter_one_is_usual():
    (volume,) = volumes_of(made([0, 1, 5]))
    assert volume.problems == {"gaps": 1} and volume.spacing == 1.0


def test_steps_within_the_tolerance_are_no_gaps():
    assert volumes_of(made([0, 5, 10.3, 15, 20, 25]))[0].problems == {}  # 5.3 and 4.7 of 5: 0.1 + 5 %
    assert volumes_of(made([0, 5, 10.4, 15, 20, 25]))[0].problems == {"gaps": 2}


def test_tilt_in_degrees():
    step = np.array([0, np.sin(np.radians(20)), np.cos(np.radians(20))])
    (volume,) = volumes_of(made([i * 5 * step for i in range(6)]))
    assert volume.problems == {"tilt": 20} and volume.is_volume and not volume.is_even
    assert volume.spacing == pytest.approx(5 * np.cos(np.radians(20)))


def test_slices_beside_the_line_make_no_volume():
    points = [(0, 0, 0), (0, 0, 1), (50, 0, 2), (0, 0, 3), (0, 0, 4)]
    (volume,) = volumes_of(made(points))
    assert volume.problems == {"shifted": 1} and not volume.is_volume
    stations = made([(x, 0, z) for x in (0, 300) for z in range(4)])  # two stations along a spine
    assert [volume.rows for volume in volumes_of(stations)] == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize("places, few", [([0], 1), ([0, 1], 2), ([4, 4, 4, 4], 1), ([0, 0, 1, 1], 2)])
def test_fewer_than_three_places_are_no_volume(places, few):
    (volume,) = volumes_of(made(places))
    assert volume.problems == {"few": few} and not volume.is_volume
    assert sorted(volume.rows) == list(range(len(places)))


def test_a_file_of_many_frames_is_for_itself():
    volumes = volumes_of(made([0, 1, 2, 3], frames=[1, 1, 1, 30]))
    assert [volume.rows for volume in volumes] == [[0, 1, 2], [3]]
    assert volumes[1].problems == {"frames": 30, "few": 1}


def test_the_report_and_its_words():
    table = pd.concat([made([0, 1, 2, 3, 6]), made(range(2), series="t")], ignore_index=True)
    table["plane"] = "axial"
    told = volume_report(table)
    assert told.to_dict("list") == {
        "series": ["s", "t"],
        "part": [0, 0],
        "plane": ["axial", "axial"],
        "slices": [5, 2],
        "spacing": [1.0, 1.0],
        "volume": [True, False],
        "problems": ["gaps: 1", "few: 2"],
    }
    assert {name for volume in volumes_of(table) for name in volume.problems} <= set(PROBLEMS)
    assert volume_report(table[:0]).empty and slices_of(table[:0]).empty and neighbors(table[:0]).empty


def test_mistakes():
    with pytest.raises(DataError, match="got list"):
        volumes_of([1])
    with pytest.raises(DataError, match="lacks position, orientation"):
        volumes_of(pd.DataFrame({"series": ["s"]}))
    for n in (2, 3.0, True):
        with pytest.raises(DataError, match="from 3 up"):
            neighbors(made(range(4)), n)
