"""Self-supervised pretraining and gradual fine-tuning on top of fastai. Names: `selfsup_fastai.all`."""

__version__ = "0.1.0"
