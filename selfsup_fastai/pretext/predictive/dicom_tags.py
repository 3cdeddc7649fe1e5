"""Tags of DICOM files."""

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from selfsup_fastai.checks import check_flag, check_number
from selfsup_fastai.data.recipes import Recipe
from selfsup_fastai.data.views import square_view
from selfsup_fastai.encoders.heads import Classifier, linear_head
from selfsup_fastai.errors import TaskError
from selfsup_fastai.messages import say
from selfsup_fastai.metrics import OfSums, share
from selfsup_fastai.pictures import draw, grid_axes
from selfsup_fastai.pretext.base import PretextTask, per_image
from selfsup_fastai.pretext.facts import WHERE, texts

TAGS = ("modality", "body_part", "view", "plane")
UNKNOWN = -1  # In targets
OPTED = {"patient_age": "age", "patient_sex": "sex"}  # columns of a person, and the settings that ask for them
_WORDS = """
    CR CT DX ES MG MR NM OT PT PX RF RG SC US XA XC GM SM OP IO EPS BMD TG
    AP PA LL RL RLD LLD RLO LLO LATERAL LAT OBLIQUE CC MLO ML LM XCCL XCCM FB SIO ISO AXIAL SAGITTAL CORONAL
    ABDOMEN ABDOMENPELVIS ADRENAL ANKLE AORTA ARM AXILLA BACK BLADDER BRAIN BREAST BRONCHUS CALCANEUS CAROTID
    CEREBELLUM CERVIX CHEST CHESTABDOMEN CHESTABDPELVIS CLAVICLE COCCYX COLON CSPINE ELBOW ESOPHAGUS EXTREMITY EYE FACE
    FEMUR FINGER FOOT FOREARM HAND HEAD HEADNECK HEART HIP HUMERUS JAW KIDNEY KNEE LEG LIVER LSPINE LUNG MAXILLA
    MEDIASTINUM NECK NOSE ORBIT PANCREAS PELVIS PROSTATE RADIUS RIB SACRUM SCAPULA SHOULDER SKULL SPINE SPLEEN SSPINE
    STERNUM STOMACH THIGH THORAX THUMB THYROID TIBIA TOE TSPINE UTERUS WHOLEBODY WRIST
    L R B U M F O
"""
TERMS = frozenset(_WORDS.split())
"""Words of the standard for modality, view, plane, body part, side and sex. What else stands in a header may be a name.
"""
OF_HEADER = (*TAGS, "laterality", "kind", "intent", "image_type", "photometric", *OPTED)  # columns that files fill


class _Right:
    """How many of the known tags of one head are named, and how many there are. A class, to be exported."""

    def __init__(self, head: int, first: int, n: int):
        self.head, self.first, self.n = head, first, n

    def __call__(self, pred: Tensor, tags: Tensor) -> tuple[Tensor, Tensor]:
        asked = tags[:, self.head] != UNKNOWN
        named = pred[:, self.first : self.first + self.n].argmax(1)
        return (named == tags[:, self.head])[asked].sum(), asked.sum()


class DicomTags(PretextTask):
    """Which modality, body part, view and plane does the image show?

    After Takaya & Inamori, ModAn-MulSupCon: Modality- and Anatomy-Aware Multi-Label Supervised Contrastive Pretraining
    for Medical Imaging, 2025 (arXiv 2508.18613). The labels come with the file: what a DICOM header says of an image
    and what can be seen in it. The paper learns from modality and anatomy by contrast; here a tag is a classification.

    In: a crop of each image, in training with its window changed a little, else the center square, (B, C, S, S).
    Target: the number of each tag's value among those of the training images, (B, tags); -1 where a file does not say,
    or says what no training image does, which weighs nothing. Prediction: the logits of all tags side by side,
    (B, classes). Loss: the mean of the tags' cross-entropies. A tag with less than two values in the training images is
    left out, and that is said. Each tag's column has its accuracy, where it is known.

    The tags are columns of the facts, which DICOM files bring along; for photographs name others with `tags`. Age (a
    class for each decade) and sex are asked for only with `age=True` and `sex=True`, and only if the columns
    `patient_age` and `patient_sex` are there, as they are not unless somebody wanted them. Pictures show the terms of
    the standard; other words of a header, in which a name may hide, become numbers: 'body_part 3'.

    Guards: the crop, of half the area or more, against captions and borders, and the changed window. No mirror images,
    which would turn views and sides around. Text that is burned in, collimation and the size of the matrix may give an
    answer away all the same.

    Suits folders of mixed origin. Cheap, and a good neighbor of other tasks: 'dicom_tags+rotation'. Does not suit one
    kind of image (chest X-rays of one view): there is nothing to tell apart. In the paper features were better than
    SimCLR's once fine-tuned, and worse as they are.
    """

    name = "dicom_tags"
    paper = "Takaya & Inamori 2025"
    needs = ("facts",)

    def __init__(
        self,
        tags: Sequence[str] | None = None,  # Columns to ask for; None: modality, body_part, view, plane
        age: bool = False,  # The decade of the patient's age, too
        sex: bool = False,  # The patient's sex, too
        min_area: float = 0.5,  # Least share of the image in a crop, in training; 1: the center square
        window: float = 0.2,  # In training black is drawn from the lowest tenth of the values, white from the highest
    ):
        columns = TAGS if tags is None else tags
        if isinstance(columns, str) or not columns or not all(isinstance(tag, str) for tag in columns):
            raise TaskError(f"tags is a list of columns, such as ['modality', 'view']; got {tags!r}.")
        for column, setting in OPTED.items():
            if column in columns:
                raise TaskError(f"{column} is about a person: it is asked for with {setting}=True, not in tags.")
        check_flag("age", age)
        check_flag("sex", sex)
        check_number("min_area", min_area, above=0, most=1)
        check_number("window", window, 0, 0.9)
        self.tags, self.age, self.sex, self.min_area, self.window = tags, age, sex, min_area, window
        self.names: dict[str, list[str]] = {}  # of each tag the classes as they are shown; known after setup
        self._values: dict[str, list[str]] = {}  # the same as headers have them
        self._shares: list[float] = []  # of each tag's most frequent value

    # --- what headers say ---------------------------------------------------------------------------------------------

    def setup(self, dls, encoder):
        facts = dls.train.facts
        if facts is None:
            raise TaskError(f"dicom_tags needs facts about the images, such as their modality. {WHERE}")
        for column, setting in OPTED.items():
            if getattr(self, setting) and any(dl.facts is None or column not in dl.facts for dl in dls.loaders):
                fix = "It is read from headers only where that was asked for."
                raise TaskError(f"{setting}=True needs the column {column!r}, which is not there. {fix}")
        found = {tag: np.unique(values[values != ""], return_counts=True) for tag, values in self._said(facts).items()}
        kept = {tag: (values, counts) for tag, (values, counts) in found.items() if len(values) > 1}
        left_out = ", ".join(tag for tag in found if tag not in kept)
        if not kept:
            what = f"{left_out} have less than two values each in the training images"
            raise TaskError(f"dicom_tags has nothing to ask: {what}. {WHERE}")
        if left_out:
            say(f"dicom_tags: {left_out} left out: less than two values in the training images.")
        self._values = {tag: values.tolist() for tag, (values, _) in kept.items()}
        self.names = {tag: [_shown(tag, v, i) for i, v in enumerate(vs)] for tag, vs in self._values.items()}
        self._shares = [float(counts.max() / counts.sum()) for _, counts in kept.values()]
        self.n_known = len(kept)

    def _said(self, facts: pd.DataFrame) -> dict[str, np.ndarray]:
        """The values of each tag, (N,) of str, '' where there is none."""
        columns = [*(TAGS if self.tags is None else self.tags), *(c for c, s in OPTED.items() if getattr(self, s))]
        nothing = np.full(len(facts), "", object)
        said = {column: texts(facts[column]) if column in facts else nothing for column in columns}
        if "patient_age" in said:
            said["patient_age"] = np.array([_decade(age) for age in said["patient_age"]], object)
        return said

    def known(self, facts):
        said = self._said(facts)
        columns = [
            pd.Series(said[tag]).map({value: i for i, value in enumerate(values)}).to_numpy(np.float32)
            for tag, values in self._values.items()
        ]
        return torch.from_numpy(np.stack(columns, 1) if columns else np.empty((len(facts), 0), np.float32))

    @property
    def n_classes(self) -> list[int]:
        """Of each tag."""
        return [len(names) for names in self.names.values()]

    @property
    def metrics(self) -> list[OfSums]:
        """The accuracy of each tag."""
        firsts = np.cumsum([0, *self.n_classes]).tolist()
        return [share(tag, _Right(i, firsts[i], self.n_classes[i])) for i, tag in enumerate(self.names)]

    # --- the question -------------------------------------------------------------------------------------------------

    def make_batch(self, x, *, generator, train, idx=None, known=None):
        recipe = Recipe(scale=(self.min_area, 1.0), flip=0, window=self.window, jitter_p=0, grey_p=0)
        view = square_view(x, min(x.shape[-2:]), recipe if train else None, generator)
        known = x.new_full((len(x), len(self.names)), torch.nan) if known is None else known
        return (view,), (torch.where(known.isnan(), UNKNOWN, known).long(),)

    def model(self, encoder):
        return Classifier(encoder, linear_head(encoder.num_features, sum(self.n_classes)))

    def loss(self, pred, tags, reduction="mean"):
        heads = zip(pred.split(self.n_classes, 1), tags.unbind(1))
        each = [F.cross_entropy(logits, tag, reduction="none", ignore_index=UNKNOWN) for logits, tag in heads]
        return per_image(torch.stack(each, 1), reduction)

    def activation(self, pred):
        """Probabilities of the classes of each tag."""
        return torch.cat([logits.softmax(1) for logits in pred.split(self.n_classes, 1)], 1)

    def decode(self, pred):
        """The likeliest class of each tag, (B, tags)."""
        return torch.stack([logits.argmax(1) for logits in pred.split(self.n_classes, 1)], 1)

    def chance(self):
        return self._shares[0] if self._shares else None  # of always naming the most frequent value

    def show(self, inputs, targets, pred=None, ctxs=None, max_n=9, figsize=None):
        """Each image with its tags and, after training, those that the network named."""
        axes = grid_axes(min(max_n, len(inputs[0])), ctxs, figsize)
        for i, ax in enumerate(axes):
            title, right = self.words(targets[0][i]), None
            if pred is not None:
                asked = targets[0][i] != UNKNOWN
                named = torch.where(asked, pred[i], UNKNOWN) if asked.any() else pred[i]  # of what can be compared
                title = f"{title}\n→ {self.words(named)}"
                right = bool((pred[i] == targets[0][i])[asked].all()) if asked.any() else None
            draw(ax, inputs[0][i], title, right)
        return axes

    def words(self, tags: Tensor) -> str:
        """The names of the classes of one image, as far as they are known."""
        known = [names[i] for names, i in zip(self.names.values(), tags.tolist()) if i != UNKNOWN]
        return ", ".join(known) or "no tags"

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_values": {}}  # words of headers do not travel


def _shown(tag: str, value: str, number: int) -> str:
    """A value as people may see it."""
    fixed = tag == "patient_age" or tag not in OF_HEADER or value.upper() in TERMS
    return value if fixed else f"{tag} {number}"


def _decade(age: str) -> str:
    """'034Y' (as DICOM has it) or '34' -> '30-39'; '' for what is no age."""
    found = re.fullmatch(r"(\d{1,3}(?:\.\d+)?)([YMWD]?)", age.upper())
    if not found:
        return ""
    years = float(found[1]) / {"M": 12, "W": 52, "D": 365}.get(found[2], 1)
    return f"{int(years // 10) * 10}-{int(years // 10) * 10 + 9}"
