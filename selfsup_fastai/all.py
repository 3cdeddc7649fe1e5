"""Everything at once, for notebooks: `from selfsup_fastai.all import *` brings these names and fastai.vision.all's."""

# ruff: noqa: F401  (everything here is imported to be passed on; ruff cannot read the `__all__` below)

import warnings as _warnings

with _warnings.catch_warnings():  # fastai compiles an activation while it is imported; nobody here can mend that
    _warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
    import fastai.vision.all as _fastai
from fastai.vision.all import *

from selfsup_fastai import __version__
from selfsup_fastai.callbacks.collapse import CollapseAlarm, Signals
from selfsup_fastai.callbacks.consistency import Consistency
from selfsup_fastai.callbacks.consistency_loss import ConsistencyLoss
from selfsup_fastai.callbacks.keep_best import KeepBest
from selfsup_fastai.callbacks.log import EpochLines, MetricsFile, SkipValidation
from selfsup_fastai.callbacks.precision import AutoPrecision
from selfsup_fastai.callbacks.probe import OnlineKNN
from selfsup_fastai.callbacks.resume import Resume
from selfsup_fastai.compare.comparison import Comparison
from selfsup_fastai.compare.curves import label_curve
from selfsup_fastai.compare.leaks import check_unseen
from selfsup_fastai.compare.race import compare_pretexts
from selfsup_fastai.compare.report import write_report
from selfsup_fastai.compare.sentence import whole_verdict
from selfsup_fastai.compare.summary import summarize
from selfsup_fastai.data.albumentations import AlbumentationsTransform
from selfsup_fastai.data.blocks import OpenImage, UnlabeledBlock
from selfsup_fastai.data.cache import PixelCache
from selfsup_fastai.data.dicom_loaders import DicomBlock, DicomDataLoaders
from selfsup_fastai.data.dicom_pixels import DicomImage, DicomInfo, read_dicom
from selfsup_fastai.data.draws import Views, draw_views
from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.data.labeled import labeled_files
from selfsup_fastai.data.opening import open_image
from selfsup_fastai.data.recipes import (
    BYOL_1,
    BYOL_2,
    DINO_GLOBAL_1,
    DINO_GLOBAL_2,
    DINO_LOCAL,
    GREY_SCAN,
    MOCO,
    SIMCLR,
    STRONG,
    SWAV_GLOBAL,
    SWAV_LOCAL,
    Recipe,
    simclr_recipe,
)
from selfsup_fastai.data.scanning import scan_dicoms
from selfsup_fastai.data.shard_writing import write_shards
from selfsup_fastai.data.showing import show_views
from selfsup_fastai.data.splitters import GroupSplitter, PatientSplitter, assert_disjoint, duplicates_across
from selfsup_fastai.data.views import apply_views, multi_crop, random_view
from selfsup_fastai.data.volumes import volume_report, volumes_of
from selfsup_fastai.data.windows import WINDOWS
from selfsup_fastai.downstream.detection import detection_backbone, detector_kwargs
from selfsup_fastai.downstream.embedding import embedding_map
from selfsup_fastai.downstream.interpret import attention_map, nearest_neighbors
from selfsup_fastai.downstream.learner import DownstreamLearner, downstream_learner
from selfsup_fastai.downstream.probes import knn_probe, linear_probe, svm_probe
from selfsup_fastai.downstream.saving import load_trained
from selfsup_fastai.downstream.trained import TrainedModel
from selfsup_fastai.encoders.checkpoint import load_encoder, read_card, save_encoder
from selfsup_fastai.encoders.encoder import Encoder, create_encoder
from selfsup_fastai.errors import SelfsupError
from selfsup_fastai.features import (
    alignment,
    effective_rank,
    embed,
    embed_layers,
    feature_std,
    knn_accuracy,
    knn_predict,
    uniformity,
)
from selfsup_fastai.losses import nt_xent
from selfsup_fastai.optimizers import FusedAdam
from selfsup_fastai.plots import ShownFrame, plot_label_curve, plot_probe
from selfsup_fastai.pretext import TASKS, get_task, list_tasks
from selfsup_fastai.pretext.base import PretextTask
from selfsup_fastai.pretext.learner import PretextLearner, pretext_learner
from selfsup_fastai.pretext.loader import PretextDL, PretextTransform
from selfsup_fastai.processes import is_first
from selfsup_fastai.scan import contact_sheet, scan_folder

OURS = [
    "BYOL_1",
    "BYOL_2",
    "DINO_GLOBAL_1",
    "DINO_GLOBAL_2",
    "DINO_LOCAL",
    "GREY_SCAN",
    "MOCO",
    "SIMCLR",
    "STRONG",
    "SWAV_GLOBAL",
    "SWAV_LOCAL",
    "TASKS",
    "WINDOWS",
    "AlbumentationsTransform",
    "AutoPrecision",
    "CollapseAlarm",
    "Comparison",
    "Consistency",
    "ConsistencyLoss",
    "DicomBlock",
    "DicomDataLoaders",
    "DicomImage",
    "DicomInfo",
    "DownstreamLearner",
    "Encoder",
    "EpochLines",
    "FusedAdam",
    "GroupSplitter",
    "KeepBest",
    "MetricsFile",
    "OnlineKNN",
    "OpenImage",
    "PatientSplitter",
    "PixelCache",
    "PretextDL",
    "PretextLearner",
    "PretextTask",
    "PretextTransform",
    "Recipe",
    "Resume",
    "SelfsupError",
    "ShownFrame",
    "Signals",
    "SkipValidation",
    "TrainedModel",
    "UnlabeledBlock",
    "UnlabeledDataLoaders",
    "Views",
    "__version__",
    "alignment",
    "apply_views",
    "assert_disjoint",
    "attention_map",
    "check_unseen",
    "compare_pretexts",
    "contact_sheet",
    "create_encoder",
    "detection_backbone",
    "detector_kwargs",
    "downstream_learner",
    "draw_views",
    "duplicates_across",
    "effective_rank",
    "embed",
    "embed_layers",
    "embedding_map",
    "feature_std",
    "get_task",
    "is_first",
    "knn_accuracy",
    "knn_predict",
    "knn_probe",
    "label_curve",
    "labeled_files",
    "linear_probe",
    "list_tasks",
    "load_encoder",
    "load_trained",
    "multi_crop",
    "nearest_neighbors",
    "nt_xent",
    "open_image",
    "plot_label_curve",
    "plot_probe",
    "pretext_learner",
    "random_view",
    "read_card",
    "read_dicom",
    "save_encoder",
    "scan_dicoms",
    "scan_folder",
    "show_views",
    "simclr_recipe",
    "summarize",
    "svm_probe",
    "uniformity",
    "volume_report",
    "volumes_of",
    "whole_verdict",
    "write_report",
    "write_shards",
]
__all__ = [*OURS, *(name for name in dir(_fastai) if not name.startswith("_"))]
