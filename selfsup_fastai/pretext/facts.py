"""What tasks read out of the facts about images: columns of a DataFrame in which much may be missing."""

import numpy as np
import pandas as pd
from fastai.data.core import DataLoaders

from selfsup_fastai.errors import TaskError

WHERE = (
    "DICOM files bring such columns along; for other images hand a table that has them to "
    "UnlabeledDataLoaders.from_df, or set `dls.train.facts` and `dls.valid.facts`."
)


def need_facts(
    task: str,  # Its name
    dls: DataLoaders,
    columns: tuple[str, ...],  # All that are needed
    why: str,  # '... it needs {why}: columns ...'
) -> None:
    """Raises `TaskError` where the loaders do not know these columns."""
    for dl in dls.loaders:
        facts = dl.facts
        missing = columns if facts is None else [name for name in columns if name not in facts]
        if len(missing):
            said = " and ".join(map(repr, columns))
            have = "no facts are known of these images" if facts is None else f"{' and '.join(missing)} missing here"
            raise TaskError(f"{task} needs {why}, the facts {said}; {have}. {WHERE}")


def texts(column: pd.Series) -> np.ndarray:
    """(N,) of str, '' where there is none: absent, NaN or blank."""
    return np.array(["" if _is_none(value) else str(value).strip() for value in column], dtype=object)


def numbers(column: pd.Series) -> np.ndarray:
    """(N,) float64, NaN where there is none."""
    return pd.to_numeric(column, errors="coerce").to_numpy(np.float64, na_value=np.nan)


def groups(column: pd.Series) -> np.ndarray:
    """(N,) int64: the same number for the same value, and one of its own for an image that has none."""
    values = texts(column)
    known = values != ""
    codes = np.zeros(len(values), np.int64)
    codes[known] = pd.factorize(values[known])[0]
    codes[~known] = codes.max(initial=-1) + 1 + np.arange((~known).sum())
    return codes


def _is_none(value: object) -> bool:
    return value is None or (isinstance(value, float) and np.isnan(value)) or value is pd.NA or value is pd.NaT
