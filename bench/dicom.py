"""How fast DICOM files are read: ours beside pydicom alone with the fastest decoder, syntax by syntax, in one run.

Medians over rounds in which every case has its turn, after one round that does not count. Needs the extra `dicom` and
the data sets dicom_mixed, ct_series_ge and mr_series_t1 (SELFSUP_DATA names the folder they are looked for in).

    python bench/dicom.py                       # all parts
    python bench/dicom.py read --rounds 20 --out results.md
"""

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from measure import Absent, data_set, machine, markdown, tell, timed
from pydicom.pixels import pixel_array

from selfsup_fastai.data.dicom import quiet_pydicom
from selfsup_fastai.data.dicom_decoders import plugins
from selfsup_fastai.data.dicom_decoding import pixel_file
from selfsup_fastai.data.dicom_pixels import read_dicom, values_of

CORPUS = {  # What is read: files of dicom_mixed; series are read whole
    "native, 64 x 64": "pydicom/MR_small.dcm",
    "RLE, 64 x 64": "pydicom/MR_small_RLE.dcm",
    "JPEG-LS, 64 x 64": "pydicom/MR_small_jpeg_ls_lossless.dcm",
    "RGB native, 240 x 320": "pydicom/examples_rgb_color.dcm",
    "RGB JPEG, 240 x 320": "pydicom/examples_ybr_color.dcm",
    "JPEG 2000, 512 x 512": "pydicom/693_J2KI.dcm",
    "RGB JPEG 2000, 480 x 640": "pydicom/examples_jpeg2k.dcm",
    "JPEG lossless, 512 x 512": "dicom-test-files/MR1_JPLL",
    "JPEG-LS, 512 x 512": "dicom-test-files/MR1_JLSN",
    "JPEG-LS, 1760 x 1760": "dicom-test-files/RG3_JLSN",
    "JPEG 2000, 1760 x 1760": "pydicom-data/RG3_J2KI.dcm",
    "RLE palette, 600 x 800": "pydicom-data/OBXXXX1A_rle.dcm",
}
SERIES = {"CT series, native, 512 x 512": "ct_series_ge", "MR series, native, 384 x 274": "mr_series_t1"}
REPEATS = 5  # of a single file in a round: one reading is too short to be timed


def files(work: Path) -> dict[str, list[Path]]:
    """The files of each case."""
    folder = next(data_set("dicom_mixed", work).rglob("index.csv")).parent
    found = {name: [folder / file] * REPEATS for name, file in CORPUS.items() if (folder / file).exists()}
    for name, series in SERIES.items():
        found[name] = [file for file in sorted(data_set(series, work).rglob("*")) if file.is_file()][:30]
    return found


def bare(paths: list[Path]) -> int:
    """pydicom's own reading, with the decoder that is tried first here, and nothing else."""
    for path in paths:
        pixel_array(path, index=0, decoding_plugin=FASTEST[path])
    return len(paths)


FASTEST: dict[Path, str] = {}


def fastest(path: Path) -> str:
    """The name of the fastest decoder for a file; '' where it needs none."""
    with pixel_file(path) as file:
        return plugins(file.syntax)[0] if file.encapsulated else ""


def decoding(paths: list[Path]) -> int:
    """Our reading as far as the stored pixels."""
    for path in paths:
        with quiet_pydicom(), pixel_file(path) as file:
            file.read(0)
    return len(paths)


def values(paths: list[Path]) -> int:
    """Our reading to real-world values, with padding masked."""
    for path in paths:
        values_of(path)
    return len(paths)


def reading(paths: list[Path]) -> int:
    """All of `read_dicom`, one channel."""
    for path in paths:
        read_dicom(path, 0, n_in=1)
    return len(paths)


def default(paths: list[Path]) -> int:
    """`read_dicom` as it is called without settings: of CT three windows."""
    for path in paths:
        read_dicom(path, 0)
    return len(paths)


READERS: dict[str, Callable[[list[Path]], int]] = {
    "pydicom": bare,
    "decoded": decoding,
    "values_of": values,
    "n_in=1": reading,
    "read_dicom": default,
}


def read(work: Path, rounds: int) -> str:
    """Single frames, from the file to an array."""
    kinds = files(work)
    FASTEST.update({path: fastest(path) for paths in kinds.values() for path in set(paths)})
    cases = {(kind, name): lambda p=p, f=f: f(p) for kind, p in kinds.items() for name, f in READERS.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's, of files that are odd on purpose
        medians = timed(cases, rounds).median()
    rows = {}
    for kind in kinds:
        alone = medians[(kind, "pydicom")]
        ratios = {name: f"{alone / medians[(kind, name)]:.2f}" for name in list(READERS)[1:]}
        rows[kind] = {"pydicom, ms": f"{alone * 1e3:.2f}", **ratios}
    about = "Throughput in multiples of pydicom's `pixel_array` with the same decoder: 1 is as fast. Each includes"
    about += (
        " the one before: stored pixels, real-world values, one channel in [0, 1]; then as called without settings."
    )
    return f"{about}\n\n{markdown(pd.DataFrame(rows).T, 'file')}"


PARTS: dict[str, Callable[[Path, int], str]] = {"read": read}


def main() -> None:
    """The parts that are asked for, as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=[], help=f"which of {', '.join(PARTS)}; none: all")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="file for the results; else they are printed")
    asked = parser.parse_args()
    texts = [machine()]
    with tempfile.TemporaryDirectory() as work:
        for name in asked.parts or PARTS:
            try:
                texts.append(f"## {name}\n\n{PARTS[name](Path(work), asked.rounds)}")
            except Absent as absent:
                tell(f"{name} is left out: {absent}")
    (asked.out.write_text if asked.out else sys.stdout.write)("\n\n".join(texts) + "\n")


if __name__ == "__main__":
    main()
