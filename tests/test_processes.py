"""Losses over several processes equal those of one process with all images: two gloo processes, fixed embeddings.

Each of the two runs this file as a program.
"""

import atexit
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

from selfsup_fastai.compare.curves import label_curve
from selfsup_fastai.compare.race import compare_pretexts
from selfsup_fastai.downstream.learner import downstream_learner
from selfsup_fastai.encoders.memories import ContrastBank, NoiseTargets
from selfsup_fastai.errors import DataError, SelfsupError
from selfsup_fastai.losses import crop_cross_entropy, nce, nt_xent
from selfsup_fastai.pretext.clustering.swav import sinkhorn
from selfsup_fastai.pretext.joint_embedding.barlow_twins import barlow_loss
from selfsup_fastai.pretext.joint_embedding.mocov3 import MoCoV3
from selfsup_fastai.pretext.joint_embedding.nnclr import nnclr_loss
from selfsup_fastai.pretext.joint_embedding.simclr import SimCLR
from selfsup_fastai.pretext.joint_embedding.vicreg import vicreg_loss
from selfsup_fastai.processes import (
    agreed,
    alone,
    averaged,
    first_here,
    first_row,
    gathered,
    is_first,
    join,
    lengths,
    n_processes,
    n_rows,
    of_all,
    of_unequal,
    own_share,
    rank,
    shared,
    summed,
    totals,
    unequal,
)
from selfsup_fastai.runs.comparing import compare_folders
from selfsup_fastai.runs.finetuning import finetune
from tests.two_processes import of_two as results_of_two
from tests.two_processes import run


def nce_of_bank(z1: Tensor, z2: Tensor) -> Tensor:
    """The normalizing constant is that of all images."""
    torch.manual_seed(0)
    bank = ContrastBank(20, 5, temperature=0.5).double()
    negatives = torch.arange(12).expand(len(z1), 12)
    return nce(bank.logits(normalize(z1, dim=1), normalize(z2, dim=1).detach(), negatives))


def nnclr(z1: Tensor, z2: Tensor) -> Tensor:
    neighbors = normalize(z2.detach(), dim=1)[:, None].expand(-1, 2, -1)
    return nnclr_loss(neighbors, torch.stack([z1, z2], 1))


def swav(z1: Tensor, z2: Tensor) -> Tensor:
    """With cosines of 7 earlier embeddings, of which two processes have shares of different sizes."""
    queue = torch.randn(7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    codes = [sinkhorn(torch.cat([z, own_share(queue)]) / 5, 0.05, 3)[: len(z)] for z in (z1, z2)]
    return crop_cross_entropy(torch.stack(codes, 1), torch.stack([z1, z2], 1))


def nat(z1: Tensor, _: Tensor) -> Tensor:
    """Codes are dealt out among the images of both, and each process keeps who has which."""
    torch.manual_seed(0)
    noise, z = NoiseTargets(8, 5).double(), normalize(z1, dim=1)
    distance = (z - noise.exchanged(z, first_row(z) + torch.arange(len(z)))).square().sum(1).mean()
    noise.commit()
    return distance + (noise.places * torch.arange(8)).sum()


LOSSES = {
    "swav": swav,
    "nat": nat,
    "nt_xent": lambda z1, z2: nt_xent(z1, z2, 0.5),
    "nnclr": nnclr,
    "barlow_twins": barlow_loss,
    "vicreg": vicreg_loss,
    "nce": nce_of_bank,
    "sum": lambda z1, z2: summed((z1 * z2).sum(0)).square().sum(),
    "gather": lambda z1, z2: (gathered(z1) @ z2.T).square().mean(),
    "mocov3": lambda z1, z2: MoCoV3().loss((torch.stack([z1, z2], 1), torch.stack([z1 + z2, z1 - z2], 1)), None),
}


def found(rows: slice = slice(None)) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each loss of these rows of the same 8 pairs its value and its gradients."""
    z = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[:, rows]
    of = {}
    for name, loss in LOSSES.items():
        own = z.clone().requires_grad_()
        value = loss(*own)
        value.backward()
        of[name] = value.detach(), own.grad
    return of


def half(folder: Path) -> dict:
    """What this process finds with its half of the rows."""
    join()
    return found(slice(rank() * 4, rank() * 4 + 4))


@pytest.fixture(scope="module")
def of_two(tmp_path_factory) -> list[dict[str, tuple[Tensor, Tensor]]]:
    """What each of two processes finds with half of the rows."""
    return results_of_two(__file__, "half", tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def of_one() -> dict[str, tuple[Tensor, Tensor]]:
    return found()


@pytest.mark.parametrize("loss", LOSSES)
def test_two_processes_equal_one_with_all_images(loss, of_one, of_two):
    value, grad = of_one[loss]
    torch.testing.assert_close(sum(f[loss][0] for f in of_two) / 2, value)
    torch.testing.assert_close(torch.cat([f[loss][1] for f in of_two], 1) / 2, grad)  # as DDP averages


def test_one_process_has_all_there_is():
    x = torch.randn(3, 2)
    assert n_processes() == 1 and first_row(x) == 0
    assert gathered(x) is x and summed(x) is x and own_share(x) is x


def exchanged(folder: Path) -> dict:
    """Each exchange between two processes, of which the second has one row more."""
    joined = folder / f"joined-{os.environ['RANK']}"
    atexit.register(lambda: joined.write_text(str(dist.is_initialized())))  # what is registered first comes last
    join()
    own = torch.arange(2.0 + rank()) + 10 * rank()  # 0 1; 10 11 12
    net = torch.nn.BatchNorm1d(2)
    torch.nn.init.constant_(net.weight, rank() + 1)
    net.num_batches_tracked += rank() + 5
    shared(net)
    mean = [torch.full((2, 3), float(rank())), torch.tensor(4.0 + rank()), torch.ones(3, dtype=torch.float64)]
    averaged(mean)
    found = {
        "agreed": torch.tensor(agreed({"a": [rank(), 1.5]})["a"]),
        "of all": torch.tensor(of_all([rank()] * (1 + rank() * 200))[1]),
        "totals": torch.tensor(totals([1 + rank(), 0.5])),
        "of unequal": of_unequal(own),
        "equal rows": torch.tensor(lengths(own[:2])),
        "shared": torch.cat([net.weight.detach(), net.num_batches_tracked[None]]),
        "averaged": torch.cat([x.flatten().double() for x in mean]),
    }
    unequal(True)
    found |= {"rows": torch.tensor([n_rows(own), first_row(own)]), "gathered": gathered(own)}
    with torch.no_grad():  # 3 images, of which the first process has one
        z = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(2))
        own = z[:1] if is_first() else z[1:]
        found["of one and two"] = SimCLR().loss(own, None) * len(own) / 3
        with alone():
            found["of three"] = SimCLR().loss(z, None)
    with alone():
        own = torch.arange(2 + rank())
        found["alone"] = torch.tensor([n_processes(), n_rows(own), len(gathered(own)), agreed(rank())])
    with first_here():
        found["first here"] = torch.tensor((folder / "made").exists())
        (folder / "made").touch()
    found["speaks"] = torch.tensor(is_first())
    return found


def test_exchanges(tmp_path):
    first, second = results_of_two(__file__, "exchanged", tmp_path)
    for found in (first, second):
        assert found["agreed"].tolist() == [0, 1.5]
        assert found["of all"].tolist() == [1] * 201
        assert found["totals"].tolist() == [3, 1]
        assert found["of unequal"].tolist() == found["gathered"].tolist() == [0, 1, 10, 11, 12]
        assert found["equal rows"].tolist() == [2, 2]
        assert found["shared"].tolist() == [1, 1, 5]
        assert found["averaged"].tolist() == [0.5] * 6 + [4.5] + [1] * 3
    torch.testing.assert_close(first["of one and two"] + second["of one and two"], first["of three"])
    assert first["rows"].tolist() == [5, 0] and second["rows"].tolist() == [5, 2]
    assert first["alone"].tolist() == [1, 2, 2, 0] and second["alone"].tolist() == [1, 3, 3, 1]
    assert (first["first here"], second["first here"]) == (False, True)
    assert (first["speaks"], second["speaks"]) == (True, False)
    for k in range(2):  # they part before they end: else torch aborts one that ends beside others, now and then
        assert (tmp_path / f"joined-{k}").read_text() == "False"


def test_a_start_that_is_not_whole_is_named(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    missing = "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"
    with pytest.raises(SelfsupError, match=f"several processes train, but {missing} is not set"):
        join()


def test_a_meeting_on_gpus_alone_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend_config", lambda: "cuda:nccl")
    with pytest.raises(SelfsupError, match=r"have met with 'cuda:nccl' alone.*init_process_group"):
        join()


def test_what_one_process_does_is_refused_in_several(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for start in (
        lambda: finetune(tmp_path, tmp_path / "out"),
        lambda: compare_folders(tmp_path, None, tmp_path / "out"),
        lambda: compare_pretexts(None),
        lambda: label_curve({}, None),
        lambda: downstream_learner(None, "resnet10t"),
    ):
        with pytest.raises(SelfsupError, match="takes place in one process, and this one was started as one of 2"):
            start()
    with alone(), pytest.raises(DataError):  # it goes on, and finds that there are no images
        downstream_learner(None, "resnet10t")


if __name__ == "__main__":
    run(globals())
