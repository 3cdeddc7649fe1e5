"""selfsup_fastai: self-supervised pretraining and gradual fine-tuning on top of fastai (names: `selfsup_fastai.all`)."""

__version__ = "0.1.0"
