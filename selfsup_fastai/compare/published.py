"""Published weights, where they are on this machine already. Nothing is downloaded unasked."""

from pathlib import Path
from typing import Any

import timm
import torch

from selfsup_fastai.encoders.bodies import is_timm_name
from selfsup_fastai.encoders.encoder import Encoder, create_encoder
from selfsup_fastai.errors import SelfsupError
from selfsup_fastai.messages import quiet, say


def published_encoder(
    arch: Any,  # Of the race
    n_in: int,
    size: int | None,
    download: bool | None = None,  # None: only what is on this machine; True: download; False: leave it out
) -> Encoder | None:
    """timm's pretrained net of this architecture; None, and one line that says so, where it is not at hand."""
    if download is False:
        return None
    if not (isinstance(arch, str) and is_timm_name(arch)) or timm.models.get_pretrained_cfg(arch) is None:
        say(f"Published weights are left out: there are none known for {getattr(arch, '__name__', arch)}.")
        return None
    if not download and not at_hand(arch):
        say(
            f"Published weights of {arch} are not on this machine and are left out; pretrained=True (in the "
            "shell --pretrained) downloads them."
        )
        return None
    try:
        with quiet():
            return create_encoder(arch, n_in, pretrained=True, size=size)
    except SelfsupError as error:
        say(f"Published weights of {arch} are left out: {error}")
        return None


def at_hand(arch: str) -> bool:
    """Whether timm's weights for a net lie in the caches of the Hugging Face hub or of torch."""
    cfg = timm.models.get_pretrained_cfg(arch)
    if cfg is None:
        return False
    if cfg.hf_hub_id:
        from huggingface_hub import try_to_load_from_cache

        names = [cfg.hf_hub_filename] if cfg.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
        if any(isinstance(try_to_load_from_cache(cfg.hf_hub_id, name), str) for name in names):
            return True
    name = str(cfg.url or "").rpartition("/")[2]
    return bool(name) and (Path(torch.hub.get_dir()) / "checkpoints" / name).is_file()
