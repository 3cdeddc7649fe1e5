"""Losses over several processes equal those of one process with all images: two gloo processes, fixed embeddings."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from selfsup_fastai.encoders.memories import ContrastBank
from selfsup_fastai.losses import nce, nt_xent
from selfsup_fastai.pretext.joint_embedding.barlow_twins import barlow_loss
from selfsup_fastai.pretext.joint_embedding.mocov3 import MoCoV3
from selfsup_fastai.pretext.joint_embedding.nnclr import nnclr_loss
from selfsup_fastai.pretext.joint_embedding.vicreg import vicreg_loss
from selfsup_fastai.processes import first_row, gathered, n_processes, summed

TWO = """
import sys, torch, torch.distributed as dist
from datetime import timedelta
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(60))
from torch.nn.functional import normalize
from selfsup_fastai.encoders.memories import ContrastBank
from selfsup_fastai.losses import nce, nt_xent
from selfsup_fastai.processes import gathered, summed
def mocov3(z1, z2):  # predictions, and keys of both views
    from selfsup_fastai.pretext.joint_embedding.mocov3 import MoCoV3
    return MoCoV3().loss((torch.stack([z1, z2], 1), torch.stack([z1 + z2, z1 - z2], 1)), None)
def of_task(name, loss, *args):
    return getattr(__import__(f"selfsup_fastai.pretext.joint_embedding.{name}", fromlist=[loss]), loss)(*args)
def nce_of_bank(z1, z2):
    torch.manual_seed(0)
    bank = ContrastBank(20, 5, temperature=0.5).double()
    negatives = torch.arange(12).expand(len(z1), 12)
    return nce(bank.logits(normalize(z1, dim=1), normalize(z2, dim=1).detach(), negatives))
def nnclr(z1, z2):
    neighbors = normalize(z2.detach(), dim=1)[:, None].expand(-1, 2, -1)
    return of_task("nnclr", "nnclr_loss", neighbors, torch.stack([z1, z2], 1))
LOSSES = {
    "nt_xent": lambda z1, z2: nt_xent(z1, z2, 0.5),
    "nnclr": nnclr,
    "barlow_twins": lambda z1, z2: of_task("barlow_twins", "barlow_loss", z1, z2),
    "vicreg": lambda z1, z2: of_task("vicreg", "vicreg_loss", z1, z2),
    "nce": nce_of_bank,
    "sum": lambda z1, z2: summed((z1 * z2).sum(0)).square().sum(),
    "gather": lambda z1, z2: (gathered(z1) @ z2.T).square().mean(),
    "mocov3": mocov3,
}
z = torch.load(f"{folder}/z.pt", weights_only=True)[:, rank * 4 : rank * 4 + 4].requires_grad_()
loss = LOSSES[sys.argv[3]](*z)
loss.backward()
torch.save({"loss": loss.detach(), "grad": z.grad}, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


def two_processes(loss: str, z: torch.Tensor, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean loss of two processes with half of the rows (axis 1) each, and the gradients of that mean."""
    torch.save(z, folder / "z.pt")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    runs = [subprocess.Popen([sys.executable, "-c", TWO, str(rank), str(folder), loss], env=env) for rank in range(2)]
    assert [run.wait(120) for run in runs] == [0, 0]
    found = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
    return sum(f["loss"] for f in found) / 2, torch.cat([f["grad"] for f in found], 1) / 2  # as DDP averages


def pairs() -> torch.Tensor:
    return torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def nce_of_bank(z1, z2):
    """The normalizing constant is that of all images."""
    torch.manual_seed(0)
    bank = ContrastBank(20, 5, temperature=0.5).double()
    negatives = torch.arange(12).expand(len(z1), 12)
    return nce(bank.logits(normalize(z1, dim=1), normalize(z2, dim=1).detach(), negatives))


def nnclr(z1, z2):
    neighbors = normalize(z2.detach(), dim=1)[:, None].expand(-1, 2, -1)
    return nnclr_loss(neighbors, torch.stack([z1, z2], 1))


ONE = {
    "nt_xent": lambda z1, z2: nt_xent(z1, z2, 0.5),
    "nnclr": nnclr,
    "barlow_twins": barlow_loss,
    "vicreg": vicreg_loss,
    "nce": nce_of_bank,
    "sum": lambda z1, z2: (z1 * z2).sum(0).square().sum(),
    "gather": lambda z1, z2: (z1 @ z2.T).square().mean(),
    "mocov3": lambda z1, z2: MoCoV3().loss((torch.stack([z1, z2], 1), torch.stack([z1 + z2, z1 - z2], 1)), None),
}


@pytest.mark.parametrize("loss", ONE)
def test_two_processes_equal_one_with_all_images(loss, tmp_path):
    z = pairs()
    alone = z.clone().requires_grad_()
    expected = ONE[loss](*alone)
    expected.backward()
    found, grad = two_processes(loss, z, tmp_path)
    torch.testing.assert_close(found, expected.detach())
    torch.testing.assert_close(grad, alone.grad)


def test_one_process_has_all_there_is():
    x = torch.randn(3, 2)
    assert n_processes() == 1 and first_row(x) == 0
    assert gathered(x) is x and summed(x) is x
