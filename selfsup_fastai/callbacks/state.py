"""The state of a run: everything that the rest of it depends on, as tensors and facts, and a folder that keeps it.

A state is one safetensors file with the facts as JSON in its header: nothing is pickled, and there are no two files
that could disagree. It is written whole or not at all, and the one before is kept until the next.
"""

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from fastai.learner import Learner
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from selfsup_fastai.errors import ResumeError
from selfsup_fastai.processes import gathered, of_all
from selfsup_fastai.seeding import rng_state, set_rng_state
from selfsup_fastai.writing import write_whole

KEY = "selfsup_fastai run"
ON_LEARNER = ("epochs_done", "images_seen", "last_values")  # what `callbacks.count` keeps there


class State(NamedTuple):
    tensors: dict[str, Tensor]
    facts: dict


# --- of a learner -----------------------------------------------------------------------------------------------------


def captured(learn: Learner) -> State:
    """The learner's state between two steps: weights, buffers, optimizer, what was recorded."""
    tensors = {f"model/{name}": value for name, value in _weights(learn).items()}
    tensors |= {f"further/{name}": module.get_extra_state() for name, module in _with_further_state(learn).items()}
    optimizer = []
    for i, (p, _, state, _) in enumerate(learn.opt.all_params()):
        tensors |= {f"optimizer/{i}/{name}": value for name, value in state.items() if isinstance(value, Tensor)}
        scalars = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
        optimizer.append({"scalars": scalars, "has_grad": p.grad is not None})
    recorder = learn.recorder
    tensors |= {"recorder/smooth_loss": recorder.smooth_loss.val, "recorder/losses": _stacked(recorder.losses)}
    facts = {
        "optimizer": optimizer,
        "hypers": [{name: plain(value) for name, value in hypers.items()} for hypers in learn.opt.hypers],
        "recorder": {
            "lrs": plain(recorder.lrs),
            "iters": plain(recorder.iters),
            "values": plain(recorder.values),
            "steps": recorder.smooth_loss.count,
        },
        "learner": {name: plain(getattr(learn, name)) for name in ON_LEARNER if hasattr(learn, name)},
        "trackers": {type(cb).__name__: _tracked(cb) for cb in learn.cbs if _tracked(cb)},
    }
    scaler = _scaler(learn)
    return State(tensors, facts | ({"scaler": scaler.state_dict()} if scaler else {}))


@torch.no_grad()
def restore(learn: Learner, state: State) -> None:
    """Weights, buffers and optimizer as they were."""
    for name, value in _weights(learn).items():
        value.copy_(state.tensors[f"model/{name}"])
    for name, module in _with_further_state(learn).items():
        module.set_extra_state(state.tensors[f"further/{name}"])
    for i, (p, _, own, _) in enumerate(learn.opt.all_params()):
        saved = state.facts["optimizer"][i]
        mark = f"optimizer/{i}/"
        found = {name.removeprefix(mark): value for name, value in state.tensors.items() if name.startswith(mark)}
        own.clear()
        own.update(saved["scalars"] | {name: value.to(p.device) for name, value in found.items()})
        p.grad = torch.zeros_like(p) if saved["has_grad"] else None  # a step treats zeros and nothing differently
    for name in state.facts["hypers"][0]:
        learn.opt.set_hyper(name, [hypers[name] for hypers in state.facts["hypers"]])
    scaler = _scaler(learn)
    if scaler and "scaler" in state.facts:
        scaler.load_state_dict(state.facts["scaler"])


def restore_records(learn: Learner, state: State) -> None:
    """What was recorded, as it was; not the rows of finished epochs, which are logged again."""
    recorder, saved = learn.recorder, state.facts["recorder"]
    recorder.smooth_loss.val = state.tensors["recorder/smooth_loss"].clone()
    recorder.smooth_loss.count = saved["steps"]
    recorder.losses = list(state.tensors["recorder/losses"].unbind())
    recorder.lrs, recorder.iters = list(saved["lrs"]), list(saved["iters"])
    for name, value in state.facts["learner"].items():
        setattr(learn, name, value)
    for cb in learn.cbs:
        vars(cb).update(state.facts["trackers"].get(type(cb).__name__, {}))


def drawn_state(learn: Learner) -> State:
    """The global generators and those of the learner's loaders."""
    state = rng_state()
    kind, keys, *rest = state["numpy"]
    tensors = {"rng/torch": state["torch"]} | {f"rng/cuda/{i}": value for i, value in enumerate(state["cuda"])}
    loaders = [dl.rng.getstate() if isinstance(getattr(dl, "rng", None), random.Random) else None for dl in learn.dls]
    return State(tensors, {"python": state["python"], "numpy": [kind, keys.tolist(), *rest], "loaders": loaders})


def everywhere(own: State) -> list[State]:
    """The states of all processes, in their order, where they have tensors of the same names and shapes."""
    tensors = {name: gathered(value.unsqueeze(0)) for name, value in own.tensors.items()}
    return [State({n: rows[k] for n, rows in tensors.items()}, facts) for k, facts in enumerate(of_all(own.facts))]


def restore_drawn(learn: Learner, state: State) -> None:
    """Put back what `drawn_state` gave."""
    kind, keys, *rest = state.facts["numpy"]
    names = sorted((name for name in state.tensors if name.startswith("rng/cuda/")), key=lambda n: int(n.split("/")[2]))
    cuda = [state.tensors[name] for name in names]
    generators = {"python": _tuples(state.facts["python"]), "numpy": (kind, np.array(keys, np.uint32), *rest)}
    set_rng_state({**generators, "torch": state.tensors["rng/torch"], "cuda": cuda})
    for dl, saved in zip(learn.dls, state.facts["loaders"]):
        if saved is not None:
            dl.rng.setstate(_tuples(saved))


def _weights(learn: Learner) -> dict[str, Tensor]:
    """Every parameter and buffer once, under its first name."""
    model = learn.model
    return {name: value.detach() for name, value in (*model.named_parameters(), *model.named_buffers())}


def _with_further_state(learn: Learner) -> dict[str, nn.Module]:
    """Modules that keep something besides parameters and buffers (`get_extra_state`), as a tensor."""
    modules = learn.model.named_modules()
    return {name: m for name, m in modules if type(m).get_extra_state is not nn.Module.get_extra_state}


def _scaler(learn: Learner):
    """That of mixed precision, if losses are scaled."""
    scalers = [cb.scaler for cb in learn.cbs if hasattr(cb, "scaler")]
    return scalers[0] if scalers and scalers[0] is not None else None


def _tracked(cb) -> dict:
    """What fastai's callbacks that watch a metric know of the epochs so far, and what `AutoPrecision` chose."""
    return {name: plain(vars(cb)[name]) for name in ("best", "wait", "chosen", "laid_out") if name in vars(cb)}


def _stacked(losses: list) -> Tensor:
    return torch.stack([torch.as_tensor(loss, device="cpu") for loss in losses]) if losses else torch.zeros(0)


def plain(value):
    """Numbers, and what is made of them, as JSON has them."""
    if isinstance(value, dict):
        return {name: plain(v) for name, v in value.items()}
    if isinstance(value, (str, bool, type(None))):
        return value
    if isinstance(value, (Tensor, np.generic, np.ndarray)):
        return value.tolist()
    return [plain(v) for v in value] if hasattr(value, "__iter__") else value


def _tuples(value):
    """JSON makes lists of the tuples that generators want back."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


# --- in a folder ------------------------------------------------------------------------------------------------------


class StateFolder:
    """Keeps the last state of a run, and the one before in case the last is damaged."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.last, self.before = self.folder / "state.safetensors", self.folder / "state-before.safetensors"

    @property
    def is_there(self) -> bool:
        """Whether there is a state, whole or not."""
        return self.last.exists() or self.before.exists()

    def write(self, state: State) -> None:
        """Raises `OSError` where the disk does not take it; the states that were there stay."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in state.tensors.items()}
        fresh = self.folder / "state-fresh.safetensors"
        write_whole(fresh, to_bytes(tensors, {KEY: json.dumps(state.facts)}))
        if self.last.exists():
            os.replace(self.last, self.before)
        os.replace(fresh, self.last)

    def read(self) -> State | None:
        """The last state that is whole; None where there is none. Raises `ResumeError` if all of them are damaged."""
        files = [file for file in (self.last, self.before) if file.exists()]
        for state in filter(None, map(_read, files)):
            return state
        if files:
            raise ResumeError(
                f"The state of the run in {str(self.folder)!r} is damaged. Remove the folder to begin the run anew."
            )
        return None

    def clear(self) -> None:
        """Remove what was kept, and the folder if nothing else is in it."""
        for file in self._files():
            file.unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _files(self) -> Iterator[Path]:
        yield from (self.last, self.before)
        if self.folder.is_dir():
            yield from self.folder.glob("*state-fresh.safetensors*")  # of a run killed while it wrote


def _read(file: Path) -> State | None:
    """None for a file that is damaged."""
    try:
        with safe_open(file, "pt") as saved:
            facts = json.loads((saved.metadata() or {})[KEY])
            return State({name: saved.get_tensor(name) for name in saved.keys()}, facts)  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError):
        return None
