"""Groups of images: whitening against plain algebra, k-means on what is evidently in groups, the same seed the same."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from selfsup_fastai.encoders.clusters import Clusters, whitening


def heaps(n: int = 30, groups: int = 3, width: int = 6, apart: float = 9.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points in groups far apart, (n * groups, width), and which they are in, mixed."""
    draws = torch.Generator().manual_seed(seed)
    middle = torch.randn(groups, width, generator=draws) * apart
    truth = torch.arange(groups).repeat(n)
    return middle[truth] + torch.randn(n * groups, width, generator=draws), truth


def pairs(labels: Tensor) -> Tensor:
    """Which are together, whatever the groups are called."""
    return labels[:, None] == labels[None]


@pytest.mark.parametrize("dim", [2, 5, 9])
def test_whitened_is_as_scikit_learn_has_it(dim):
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.tensor([9.0, 4, 2, 1, 0.1]))
    found = (x - x.mean(0)) @ whitening(x, dim)
    expected = PCA(min(dim, 5), whiten=True).fit_transform(x.double().numpy())
    assert found.shape == (40, min(dim, 5))
    np.testing.assert_allclose(np.abs(found.numpy()), np.abs(expected), rtol=1e-3, atol=1e-4)  # up to the sign


def test_directions_without_variance_are_left_out_instead_of_blown_up():
    x = torch.randn(6, 12, generator=torch.Generator().manual_seed(0))  # six images vary in five directions
    x[:, 3] = 7.0
    directions = whitening(x, 12)
    assert torch.isfinite(directions).all() and (directions.norm(dim=0) > 0).sum() == 5
    torch.testing.assert_close(((x - x.mean(0)) @ directions).var(0)[:5], torch.ones(5), atol=1e-3, rtol=0)
    assert (whitening(torch.ones(4, 3), 3) == 0).all()


def test_images_that_are_alike_are_sorted_together():
    x, truth = heaps()
    clusters = Clusters(len(x), 3, 6)
    clusters.seed.fill_(1)
    assert clusters.n_used == 1 and clusters.outlived(0)
    clusters.renew(x, epoch=0)
    assert torch.equal(pairs(clusters.labels), pairs(truth)) and clusters.n_used == 3
    assert clusters.agreement == 0  # with nothing before
    clusters.renew(x, epoch=1)
    assert clusters.agreement == pytest.approx(1)
    other, _ = heaps(seed=5)
    clusters.renew(other[torch.randperm(90, generator=torch.Generator().manual_seed(0))], epoch=2)
    assert clusters.agreement < 0.2


def test_the_scale_of_features_does_not_count():
    x, _ = heaps()
    found = []
    for scale in (1.0, 1e-3, 1e3):
        clusters = Clusters(len(x), 3, 6)
        clusters.seed.fill_(1)
        clusters.renew(x * scale + 5, epoch=0)
        found.append(clusters.labels)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_the_same_seed_gives_the_same_groups():
    x = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))  # no groups in it
    found = []
    for seed in (3, 3, 4):
        clusters = Clusters(300, 12, 8)
        clusters.seed.fill_(seed)
        draws = clusters.renew(x, epoch=0)
        found.append((clusters.labels.clone(), torch.rand(3, generator=draws)))
    (first, drawn), (again, drawn_again), (other, _) = found
    assert torch.equal(first, again) and torch.equal(drawn, drawn_again) and not torch.equal(first, other)
    clusters.renew(x, epoch=1)
    assert not torch.equal(clusters.labels, other)  # another start


def test_fewer_distinct_images_than_groups_are_no_error():
    clusters = Clusters(20, 6, 4)
    clusters.renew(torch.eye(4)[torch.arange(20) % 2], epoch=0)
    assert clusters.n_used == 2


@pytest.mark.parametrize("every", [1, 3])
def test_how_long_they_live(every):
    clusters = Clusters(20, 2, 4, every)
    clusters.renew(torch.randn(20, 4), epoch=3)
    assert [clusters.outlived(epoch) for epoch in range(3, 8)] == [epoch >= 3 + every for epoch in range(3, 8)]
    again = Clusters(20, 2, 4, every)
    again.load_state_dict(clusters.state_dict())
    assert not again.outlived(3) and torch.equal(again.labels, clusters.labels)
