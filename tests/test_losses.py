"""nt_xent against a transcription of the paper's formula, against numbers worked out by hand, and in closed form."""

import math

import pytest
import torch
from torch import Tensor

from selfsup_fastai.errors import TaskError, UnknownNameError
from selfsup_fastai.losses import crop_cross_entropy, nt_xent


def pair(b: int, d: int = 5, seed: int = 0, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(2, b, d, generator=torch.Generator().manual_seed(seed), dtype=dtype))


def transcription(z1: Tensor, z2: Tensor, temperature: float) -> list[Tensor]:
    """The paper's algorithm 1, interleaved rows and plain loops: l(2k-1, 2k) and l(2k, 2k-1) for every image."""
    rows = [row for both in zip(z1, z2) for row in both]

    def s(i: int, j: int) -> Tensor:
        return (rows[i] @ rows[j]) / (rows[i].norm() * rows[j].norm())

    def term(i: int, j: int) -> Tensor:
        others = sum(torch.exp(s(i, k) / temperature) for k in range(len(rows)) if k != i)
        return -torch.log(torch.exp(s(i, j) / temperature) / others)

    return [(term(2 * k, 2 * k + 1) + term(2 * k + 1, 2 * k)) / 2 for k in range(len(z1))]


@pytest.mark.parametrize("b", [2, 3, 7])
@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
def test_equals_the_papers_formula(b, temperature):
    z1, z2 = pair(b)
    terms = torch.stack(transcription(z1, z2, temperature))
    torch.testing.assert_close(nt_xent(z1, z2, temperature, reduction="none"), terms)
    torch.testing.assert_close(nt_xent(z1, z2, temperature), terms.mean())


def test_three_images_by_hand():
    # unit vectors on the axes and their negatives: every cosine is 1, 0 or -1
    z1 = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    z2 = torch.tensor([[0.0, 1.0], [0.0, 0.5], [1.0, 0.0]])
    e = math.e
    # view:  a1 = +x  b1 = +y  c1 = -x  a2 = +y  b2 = +y  c2 = +x      temperature 1
    # a1: b1 0, c1 -1, a2 0, b2 0, c2 1; partner a2 at 0        a2: a1 0, b1 1, c1 0, b2 1, c2 0; partner a1 at 0
    # b1: a1 0, c1 0, a2 1, b2 1, c2 0; partner b2 at 1         b2: a1 0, b1 1, c1 0, a2 1, c2 0; partner b1 at 1
    # c1: a1 -1, b1 0, a2 0, b2 0, c2 -1; partner c2 at -1      c2: a1 1, b1 0, c1 -1, a2 0, b2 0; partner c1 at -1
    a = (math.log(3 + 1 / e + e) + math.log(3 + 2 * e)) / 2
    b = math.log(3 + 2 * e) - 1
    c = (math.log(3 + 2 / e) + 1 + math.log(3 + 1 / e + e) + 1) / 2
    expected = torch.tensor([a, b, c])
    torch.testing.assert_close(nt_xent(z1, z2, temperature=1.0, reduction="none"), expected)
    torch.testing.assert_close(nt_xent(z1, z2, temperature=1.0), expected.mean())
    assert nt_xent(z1, z2, temperature=1.0).item() == pytest.approx(1.887952, abs=2e-6)


def test_gradient_equals_that_of_the_formula():
    ours = [z.clone().requires_grad_() for z in pair(4, seed=2)]
    theirs = [z.clone().requires_grad_() for z in pair(4, seed=2)]
    nt_xent(*ours, 0.2).backward()
    torch.stack(transcription(*theirs, 0.2)).mean().backward()
    for a, b in zip(ours, theirs):
        assert a.grad.dtype == torch.float64 and a.grad.abs().max() > 1e-3
        torch.testing.assert_close(a.grad, b.grad)


def test_scale_of_the_embeddings_does_not_matter():
    z1, z2 = pair(5)
    torch.testing.assert_close(nt_xent(1e3 * z1, 1e-3 * z2), nt_xent(z1, z2))


def test_order_of_images_and_of_views_does_not_matter():
    z1, z2 = pair(6)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    terms = nt_xent(z1, z2, reduction="none")
    torch.testing.assert_close(nt_xent(z1[order], z2[order], reduction="none"), terms[order])
    torch.testing.assert_close(nt_xent(z2, z1, reduction="none"), terms)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_closed_forms(temperature):
    same = torch.ones(4, 3)
    assert nt_xent(same, same, temperature).item() == pytest.approx(math.log(7), abs=1e-5)  # all alike: chance
    apart = torch.eye(4)  # identical views, images orthogonal: partner at 1, six others at 0
    expected = math.log(1 + 6 * math.exp(-1 / temperature))
    assert nt_xent(apart, apart, temperature).item() == pytest.approx(expected, rel=1e-3)


def test_half_precision_and_autocast_are_computed_in_float32():
    z1, z2 = pair(16, 64, dtype=torch.float32)
    exact = nt_xent(z1, z2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nt_xent(z1, z2), exact)
    half = nt_xent(z1.half(), z2.half())
    assert half.dtype == torch.float32
    assert torch.equal(half, nt_xent(z1.half().float(), z2.half().float()))


def test_mistakes():
    z1, z2 = pair(3)
    with pytest.raises(TaskError, match="got 1"):
        nt_xent(z1[:1], z2[:1])
    with pytest.raises(TaskError, match=r"\(3, 5\) and \(2, 5\)"):
        nt_xent(z1, z2[:2])
    with pytest.raises(TaskError, match="above 0"):
        nt_xent(z1, z2, temperature=0)
    with pytest.raises(UnknownNameError, match="'mean'"):
        nt_xent(z1, z2, reduction="means")


# --- codes of crops ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crops", [2, 5])
def test_crop_cross_entropy_is_the_loop_over_codes_and_other_crops(crops):
    generator = torch.Generator().manual_seed(0)
    codes = torch.rand(4, 2, 6, generator=generator, dtype=torch.float64)
    codes = codes / codes.sum(-1, keepdim=True)
    logits = torch.randn(4, crops, 6, generator=generator, dtype=torch.float64)
    plain, ours = (logits.clone().requires_grad_() for _ in range(2))
    total = 0
    for code in range(2):  # as SwAV's code: the mean over the other crops, then over the two codes
        others = 0
        for crop in range(crops):
            if crop != code:
                p = plain[:, crop].exp() / plain[:, crop].exp().sum(1, keepdim=True)
                others = others - (codes[:, code] * p.log()).sum(1).mean()
        total = total + others / (crops - 1)
    expected = total / 2
    loss = crop_cross_entropy(codes, ours)
    expected.backward()
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours.grad, plain.grad)
    rows = crop_cross_entropy(codes, logits, "none")
    assert rows.shape == (4,)
    torch.testing.assert_close(rows.mean(), loss)
    torch.testing.assert_close(rows[1], crop_cross_entropy(codes[1:2], logits[1:2]))


def test_crop_cross_entropy_keeps_half_precision_out():
    codes, logits = torch.rand(3, 2, 5).half(), 200 * torch.randn(3, 4, 5).half()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = crop_cross_entropy(codes, logits)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, crop_cross_entropy(codes.float(), logits.float()))
