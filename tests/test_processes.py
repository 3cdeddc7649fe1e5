"""Losses over several processes equal those of one process with all images: two gloo processes, fixed embeddings.

Each of the two runs this file as a program.
"""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed
from torch.nn.functional import normalize

from selfsup_fastai.encoders.memories import ContrastBank, NoiseTargets
from selfsup_fastai.losses import crop_cross_entropy, nce, nt_xent
from selfsup_fastai.pretext.clustering.swav import sinkhorn
from selfsup_fastai.pretext.joint_embedding.barlow_twins import barlow_loss
from selfsup_fastai.pretext.joint_embedding.mocov3 import MoCoV3
from selfsup_fastai.pretext.joint_embedding.nnclr import nnclr_loss
from selfsup_fastai.pretext.joint_embedding.vicreg import vicreg_loss
from selfsup_fastai.processes import first_row, gathered, n_processes, own_share, summed


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


@pytest.fixture(scope="module")
def of_two(tmp_path_factory) -> list[dict[str, tuple[Tensor, Tensor]]]:
    """What each of two processes finds with half of the rows."""
    folder = tmp_path_factory.mktemp("processes")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    runs = [subprocess.Popen([sys.executable, __file__, str(rank), str(folder)], env=env) for rank in range(2)]
    assert [run.wait(240) for run in runs] == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def main(rank: int, folder: Path) -> None:
    meet, minutes = f"file://{folder}/meet", timedelta(minutes=3)
    distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=2, timeout=minutes)
    torch.save(found(slice(rank * 4, rank * 4 + 4)), folder / f"{rank}.pt")
    distributed.destroy_process_group()


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


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
