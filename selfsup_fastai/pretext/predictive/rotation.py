"""Rotation (RotNet)."""

import torch
from fastai.metrics import accuracy

from selfsup_fastai.checks import check_choice, check_number
from selfsup_fastai.data.views import center_square, random_shift_flip
from selfsup_fastai.encoders.heads import linear_head
from selfsup_fastai.pictures import draw, grid_axes
from selfsup_fastai.pretext.base import PerView, PretextTask, class_loss

DEGREES = ("0°", "90°", "180°", "270°")


class Rotation(PretextTask):
    """By which quarter turn was the image rotated?

    Gidaris, Singh & Komodakis, Unsupervised Representation Learning by Predicting Image Rotations, 2018
    (arXiv 1803.07728). To answer, the network must know which way up things stand: objects, their parts, their usual
    pose.

    In: the center square of each image in all four quarter turns (counterclockwise), made without interpolation, as
    one input (B, 4, C, S, S), in training first shifted (reflected at the borders, the authors fill with black) and
    mirrored at random; or one random turn, (B, 1, C, S, S), at a quarter of the cost. Target: the number of
    quarter turns, (B, 4) or (B, 1), 0..3. Prediction: (B, 4 or 1, 4) logits; chance is 25 %.

    Guards: turns are made without interpolation, which would leave traces, and in training the shift and the mirror
    image keep single pixels from counting. Against shortcuts in the pictures themselves there is none: vignettes,
    letterboxes, captions, light that always comes from above.

    Suits photographs, X-rays, hands, faces: whatever has an up. Does not suit images that look the same turned
    (microscopy, many satellite tiles) nor labels that turning would swap (6 and 9).
    """

    name = "rotation"
    paper = "Gidaris et al. 2018"
    metrics = (accuracy,)

    def __init__(
        self,
        turns: str = "all",  # 'all': the four turns of an image in one batch, as in the paper; 'one': a random one
        crop: float = 0.125,  # Before turning, a shift by up to this share of the side (paper: 4 of 32 pixels); 0: none
        flip: float = 0.5,  # Probability of a mirror image before turning; 0 where left and right matter
    ):
        check_choice("turns", turns, ("all", "one"))
        check_number("crop", crop, 0, 0.5)
        check_number("flip", flip, 0, 1)
        self.turns, self.crop, self.flip = turns, crop, flip
        self.passes = 4 if turns == "all" else 1

    def make_batch(self, x, *, generator, train, idx=None):
        x = center_square(x)
        if train:
            x = random_shift_flip(x, generator, pad=round(self.crop * x.shape[-1]), flip=self.flip)
        turned = torch.stack([torch.rot90(x, k, (-2, -1)) for k in range(4)], 1)  # (B, 4, C, S, S)
        if self.turns == "all":
            return (turned,), (torch.arange(4, device=x.device).expand(len(x), 4),)
        k = torch.randint(4, (len(x), 1), generator=generator, device=x.device)
        return (turned[torch.arange(len(x), device=x.device), k[:, 0]].unsqueeze(1),), (k,)

    def model(self, encoder):
        return PerView(encoder, linear_head(encoder.num_features, 4))

    def loss(self, pred, target, reduction="mean"):
        return class_loss(pred, target, reduction)

    def chance(self):
        return 0.25

    def show(self, inputs, targets, pred=None, ctxs=None, max_n=9, figsize=None):
        """Image i in its i-th turn, titled with the turn and, after training, with the one the network named."""
        axes = grid_axes(min(max_n, len(inputs[0])), ctxs, figsize)
        for i, ax in enumerate(axes):
            at = i % inputs[0].shape[1]
            turn = int(targets[0][i, at])
            guess = None if pred is None else int(pred[i, at])
            title = DEGREES[turn] if guess is None else f"{DEGREES[turn]}, named {DEGREES[guess]}"
            draw(ax, inputs[0][i, at], title, None if guess is None else guess == turn)
        return axes
