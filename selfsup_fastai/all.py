"""Everything at once, for notebooks: `from selfsup_fastai.all import *` brings these names and those of fastai.vision.all."""

import fastai.vision.all as _fastai
from fastai.vision.all import *

OURS = [
    "TASKS",
    "AlbumentationsTransform",
    "DownstreamLearner",
    "Encoder",
    "EpochLines",
    "MetricsFile",
    "OpenImage",
    "PretextDL",
    "PretextLearner",
    "PretextTask",
    "PretextTransform",
    "SelfsupError",
    "SkipValidation",
    "UnlabeledBlock",
    "UnlabeledDataLoaders",
    "__version__",
    "compare_encoders",
    "create_encoder",
    "downstream_learner",
    "effective_rank",
    "embed",
    "embed_layers",
    "get_task",
    "knn_accuracy",
    "knn_predict",
    "linear_probe",
    "list_tasks",
    "load_encoder",
    "nearest_neighbors",
    "nt_xent",
    "open_image",
    "pretext_learner",
    "read_card",
    "save_encoder",
    "summarize",
]
__all__ = [*OURS, *(name for name in dir(_fastai) if not name.startswith("_"))]
