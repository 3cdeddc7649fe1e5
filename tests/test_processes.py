"""Losses over several processes equal those of one process with all images: two gloo processes, fixed embeddings."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from selfsup_fastai.losses import crop_cross_entropy, nt_xent
from selfsup_fastai.pretext.clustering.swav import sinkhorn
from selfsup_fastai.processes import first_row, gathered, n_processes, own_share, summed

TWO = """
import sys, torch, torch.distributed as dist
from datetime import timedelta
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(60))
from selfsup_fastai.losses import crop_cross_entropy, nt_xent
from selfsup_fastai.pretext.clustering.swav import sinkhorn
from selfsup_fastai.processes import gathered, own_share, summed
def swav(z1, z2):
    codes = [sinkhorn(torch.cat([z, own_share(QUEUE)]) / 5, 0.05, 3)[: len(z)] for z in (z1, z2)]
    return crop_cross_entropy(torch.stack(codes, 1), torch.stack([z1, z2], 1))
QUEUE = torch.load(f"{folder}/queue.pt", weights_only=True)
LOSSES = {
    "swav": swav,
    "nt_xent": lambda z1, z2: nt_xent(z1, z2, 0.5),
    "sum": lambda z1, z2: summed((z1 * z2).sum(0)).square().sum(),
    "gather": lambda z1, z2: (gathered(z1) @ z2.T).square().mean(),
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
    torch.save(queue(), folder / "queue.pt")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    runs = [subprocess.Popen([sys.executable, "-c", TWO, str(rank), str(folder), loss], env=env) for rank in range(2)]
    assert [run.wait(120) for run in runs] == [0, 0]
    found = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
    return sum(f["loss"] for f in found) / 2, torch.cat([f["grad"] for f in found], 1) / 2  # as DDP averages


def pairs() -> torch.Tensor:
    return torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def queue() -> torch.Tensor:
    """Cosines of earlier embeddings, of which the processes have shares of different sizes."""
    return torch.randn(7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def swav(z1, z2):
    codes = [sinkhorn(torch.cat([z, queue()]) / 5, 0.05, 3)[: len(z)] for z in (z1, z2)]
    return crop_cross_entropy(torch.stack(codes, 1), torch.stack([z1, z2], 1))


ONE = {
    "swav": swav,
    "nt_xent": lambda z1, z2: nt_xent(z1, z2, 0.5),
    "sum": lambda z1, z2: (z1 * z2).sum(0).square().sum(),
    "gather": lambda z1, z2: (z1 @ z2.T).square().mean(),
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
    assert gathered(x) is x and summed(x) is x and own_share(x) is x
