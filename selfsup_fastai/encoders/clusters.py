"""Groups of images whose features are alike."""

import warnings

import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import normalized_mutual_info_score
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.nn import functional as F

ROUNDS = 20  # Of k-means
LEAST_VARIANCE = 1e-8  # Of a direction, as a share of the largest: what lies below is rounding


class Clusters(nn.Module):
    """Which of `n` groups each training image is in (DeepCluster, Caron et al. 2018): k-means on features that were
    centered, turned to their principal directions, whitened and brought to length 1.

    Buffers: saved, resumed and moved with the model. Before the first `renew` all images are in group 0.
    """

    def __init__(
        self,
        images: int,  # That are trained on
        n: int,
        dim: int,  # Principal directions kept, at most
        every: int = 1,  # Epochs that they are to live
    ):
        super().__init__()
        self.n, self.dim, self.every = n, dim, every
        self.register_buffer("labels", torch.zeros(images, dtype=torch.long))
        self.register_buffer("made_at", torch.tensor(-1))  # the epoch they were made for; -1: not yet
        self.register_buffer("seed", torch.randint(2**31, ()))
        self.register_buffer("agreement", torch.tensor(0.0))  # with those before; 0 at first

    @torch.no_grad()
    def renew(
        self,
        x: Tensor,  # (images, C), row i of training image i
        epoch: int,  # That they are made for
    ) -> torch.Generator:  # What else is new for them is drawn from this
        """Sort the training images anew. The same numbers, seed and epoch give the same groups: one thread does it."""
        draws = torch.Generator().manual_seed(int(self.seed) + epoch)
        seed = int(torch.randint(2**31, (), generator=draws))
        x = F.normalize((x - x.mean(0)) @ whitening(x, self.dim), dim=1)
        means = KMeans(self.n, init="random", n_init=1, max_iter=ROUNDS, tol=0.0, random_state=seed)
        with threadpool_limits(1), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct images than groups: some stay empty
            labels = means.fit_predict(x.cpu().numpy())
        self.agreement.fill_(normalized_mutual_info_score(self.labels.cpu().numpy(), labels))
        self.labels.copy_(torch.as_tensor(labels))
        self.made_at.fill_(epoch)
        return draws

    def outlived(self, epoch: int) -> bool:
        """Whether there are none yet that are good for this epoch."""
        return bool(self.made_at < 0 or epoch >= self.made_at + self.every)

    @property
    def n_used(self) -> int:
        """Groups with images in them."""
        return len(self.labels.unique())


def whitening(
    x: Tensor,  # (N, C)
    dim: int,  # At most
) -> Tensor:  # (C, dim or C if that is less), of the type of x
    """The principal directions of the largest variances, each divided by the deviation along it; 0 where there is none:
    few images, or features that are the same for all.
    """
    centered = (x - x.mean(0)).double()
    variances, directions = torch.linalg.eigh(centered.T @ centered / max(1, len(x) - 1))
    variances, directions = variances.flip(0)[:dim], directions.flip(1)[:, :dim]
    kept = variances > variances[0].clamp(min=1e-30) * LEAST_VARIANCE
    return torch.where(kept, directions * variances.clamp(min=1e-30).rsqrt(), 0.0).to(x)
