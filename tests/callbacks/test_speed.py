"""Checkpointing and compiling: the same numbers, in less memory or less time."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from fastai.torch_core import set_seed
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from selfsup_fastai.callbacks import speed
from selfsup_fastai.callbacks.resume import Resume
from selfsup_fastai.callbacks.speed import set_checkpointing
from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.encoders.checkpoint import load_encoder
from selfsup_fastai.encoders.encoder import create_encoder
from selfsup_fastai.errors import TaskError
from selfsup_fastai.pretext.learner import pretext_learner


def learner(task="rotation", arch="resnet10t", **kwargs):
    set_seed(0, reproducible=True)
    array = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
    dls = UnlabeledDataLoaders.from_array(array, size=32, bs=4, valid_pct=0.25, num_workers=0, seed=1)
    return pretext_learner(dls, task, arch, **kwargs)


def fitted(learn, epochs: int = 1, **kwargs):
    with learn.no_bar(), learn.no_logging():
        learn.fit(epochs, 1e-3, **kwargs)
    return learn


def kept_for_backward(compute) -> int:
    """Bytes that autograd keeps between a forward and a backward pass, besides parameters."""
    total = []
    with saved_tensors_hooks(lambda t: total.append(t.nbytes * (not isinstance(t, nn.Parameter))) or t, lambda t: t):
        compute().sum().backward()
    return sum(total)


@pytest.mark.parametrize("arch", ["resnet18", "convnext_atto", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("way", ["forward", "feature_map"])
def test_less_is_kept_and_gradients_are_the_same(arch, way):
    torch.manual_seed(0)
    encoder, x = create_encoder(arch, size=64).train(), torch.randn(4, 3, 64, 64)
    kept, grads = [], []
    for on in (False, True):
        set_checkpointing(encoder, on)
        encoder.zero_grad()
        kept.append(kept_for_backward(lambda: getattr(encoder, way)(x)))
        grads.append([p.grad for p in encoder.parameters() if p.grad is not None])
    assert kept[1] < kept[0] / 2
    assert len(grads[0]) == len(grads[1]) > 10
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("task", "arch"), [("rotation", "resnet10t"), ("mae", None), ("byol", "resnet10t")])
def test_a_run_is_the_same_and_batch_norms_count_a_batch_once(task, arch):
    plain, sparing = (fitted(learner(task, arch, checkpointing=on)) for on in (False, True))
    for (name, one), other in zip(plain.model.state_dict().items(), sparing.model.state_dict().values()):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5, msg=name)
        if name.endswith("num_batches_tracked"):
            assert one == other > 0
    bodies = [m for m in sparing.model.modules() if hasattr(m, "grad_checkpointing")]
    assert bodies and not any(body.grad_checkpointing for body in bodies)  # after the fit it is off again


def test_patches_are_checkpointed_too():
    """Networks that are shown some patches only do without timm's own forward pass."""
    learn = learner("mae", None)
    *inputs, _ = learn.dls.one_batch()[: learn.dls.n_inp + 1]
    kept = []
    for on in (False, True):
        set_checkpointing(learn.model.encoder, on)
        kept.append(kept_for_backward(lambda: learn.model.train()(*inputs)))
    assert kept[1] < kept[0]


def test_a_net_without_checkpointing_is_refused():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 16, 3, 2))
    with pytest.raises(TaskError, match="has no gradient checkpointing"):
        learner(arch=net, checkpointing=True)
    with pytest.raises(TaskError, match="checkpointing is True or False, got 'yes'"):
        learner(checkpointing="yes")


def test_without_a_compiler_a_line_says_so_and_the_run_goes_on(monkeypatch, capsys):
    def missing(*_):
        raise OSError("no compiler")

    monkeypatch.setattr(speed.torch, "compile", lambda f: missing)
    learn = fitted(learner(compile=True))
    assert len(learn.recorder.losses) == 3
    assert "Not compiled: torch.compile finds nothing to compile with (OSError)." in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler gives hints about this machine
def test_compiled_it_trains_alike_and_is_saved_copied_and_resumed(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2))
    plain = fitted(learner(arch=net), 2)
    compiled = learner(arch=net, compile=True)
    assert torch.compiler.is_compiling() is False and compiled.model._compiled_call_impl is not None
    fitted(compiled, 2, cbs=Resume(tmp_path / "state"))
    assert compiled.model.state_dict().keys() == plain.model.state_dict().keys()
    for one, other in zip(plain.model.parameters(), compiled.model.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-4)
    x = torch.rand(2, 3, 32, 32)
    kept = load_encoder(compiled.save_encoder(tmp_path / "encoder"), net)
    torch.testing.assert_close(kept.eval()(x), compiled.encoder.eval()(x))
    torch.testing.assert_close(deepcopy(compiled.model).encoder.eval()(x), compiled.encoder(x))
    compiled.path = tmp_path
    compiled.export("learner.pkl")
    again = fitted(learner(arch=net, compile=True), 2, cbs=Resume(tmp_path / "state"))  # all was done already
    for one, other in zip(again.model.parameters(), compiled.model.parameters()):
        assert torch.equal(one, other)


SMALL = {
    "resnet10t": {"channels": (8, 8, 16, 16), "stem_width": 8},
    "vit_tiny_patch16_224": {"depth": 2, "embed_dim": 32, "num_heads": 2},
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler gives hints about this machine
@pytest.mark.parametrize("arch", SMALL)
def test_compiled_and_checkpointed_it_trains_alike(arch):
    torch.manual_seed(1)
    net, states = create_encoder(arch, size=32, **SMALL[arch]), []
    for on in (False, True):
        learn = fitted(learner(arch=None, encoder=net, compile=on, checkpointing=on), 2)
        states.append(learn.model.state_dict())
    torch.testing.assert_close(*states, rtol=1e-3, atol=1e-4)
    assert any((states[0][f"encoder.{name}"] != value).any() for name, value in net.state_dict().items())
