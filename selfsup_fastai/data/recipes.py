"""The numbers that rule random views, and the papers' choices of them.

Sizes of the papers' views on ImageNet: 224 pixels, small crops of DINO and SwAV 96. A recipe has no size of its own:
a small view is a recipe drawn at a small size.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from selfsup_fastai.errors import TaskError, unknown

KINDS = ("photo", "scan", "microscopy")
"""Of images, as to how they may be changed without becoming other images; see `adapted`."""
BLUR_FROM = 64  # Pixels: the papers leave blur out on CIFAR


@dataclass(frozen=True)
class Recipe:
    """The numbers that rule random views; `dataclasses.replace(recipe, blur_p=0.0)` gives a variation.

    A strength s draws a factor from [max(0, 1 - s), 1 + s] for brightness, contrast and saturation, and a turn of the
    color wheel from [-s, s] for hue. Fields that end in `_p`, `flip` and `vertical_flip` are probabilities per image.
    """

    scale: tuple[float, float] = (0.08, 1.0)  # Share of the image's area in the crop
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # Width by height of the crop
    flip: float = 0.5  # Mirrored left to right
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0  # At most 0.5
    jitter_p: float = 0.8  # The four color operations together
    grey_p: float = 0.2
    blur_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # In pixels of the view
    solarize_p: float = 0.0
    solarize_threshold: float = 0.5  # Pixels from here up are inverted
    vertical_flip: float = 0.0  # Mirrored top to bottom
    turn: float = 0.0  # Degrees: turned about the crop's center by -turn..turn
    shear: float = 0.0  # Degrees: rows shifted sideways by tan(angle) per row, angle in -shear..shear
    window: float = 0.0  # Black is drawn from 0..window / 2, white from 1 - window / 2..1, and stretched to 0..1
    erase_p: float = 0.0  # A rectangle painted over with the view's mean color
    erase_scale: tuple[float, float] = (0.02, 0.33)  # Share of the view's area in the rectangle
    erase_ratio: tuple[float, float] = (0.3, 3.3)  # Height by width of the rectangle

    def __post_init__(self):
        for name in ("flip", "vertical_flip", "jitter_p", "grey_p", "blur_p", "solarize_p", "erase_p"):
            _in_range(name, (getattr(self, name),), 0, 1, "a probability in [0, 1]")
        for name in ("brightness", "contrast", "saturation"):
            _in_range(name, (getattr(self, name),), 0, math.inf, "a strength of 0 or more")
        _in_range("hue", (self.hue,), 0, 0.5, "a strength in [0, 0.5]")
        _in_range("turn", (self.turn,), 0, 180, "an angle in [0, 180] degrees")
        _in_range("shear", (self.shear,), 0, 60, "an angle in [0, 60] degrees")
        _in_range("window", (self.window,), 0, 0.9, "a share of the value range in [0, 0.9]")
        for name in ("scale", "erase_scale"):
            _in_range(name, getattr(self, name), 1e-9, 1, "two rising shares of the area in (0, 1]")
        for name in ("ratio", "erase_ratio"):
            _in_range(name, getattr(self, name), 1e-9, math.inf, "two rising ratios above 0")
        _in_range("blur_sigma", self.blur_sigma, 1e-9, math.inf, "two rising widths in pixels above 0")


def _in_range(name: str, values: tuple[float, ...], low: float, high: float, wanted: str) -> None:
    if list(values) != sorted(values) or not all(low <= v <= high for v in values):
        arrived = values[0] if len(values) == 1 else values
        raise TaskError(f"The recipe's {name} is {arrived}; it must be {wanted}.")


def simclr_recipe(
    strength: float = 1.0,  # Multiplies the color strengths; 0.5 for images as small as CIFAR's
    blur: bool = True,  # The paper leaves blur out on CIFAR
) -> Recipe:
    """The views of SimCLR (Chen et al. 2020)."""
    s = strength
    return Recipe(brightness=0.8 * s, contrast=0.8 * s, saturation=0.8 * s, hue=0.2 * s, blur_p=0.5 if blur else 0.0)


def _byol_recipe(blur_p: float, solarize_p: float) -> Recipe:
    return Recipe(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, blur_p=blur_p, solarize_p=solarize_p)


# NPID (Wu et al. 2018), whose code draws grey before color
NPID_VIEW = Recipe(scale=(0.2, 1.0), brightness=0.4, contrast=0.4, saturation=0.4, hue=0.4, jitter_p=1.0)
# PIRL (Misra & van der Maaten 2020): the image, and what its patches are cut from. The authors' code also posterizes,
# sharpens, solarizes and stretches two in three of them.
PIRL_VIEW = Recipe(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.2, jitter_p=1.0)
PIRL_PATCHES = replace(PIRL_VIEW, scale=(0.6, 1.0))
SIMCLR = simclr_recipe()
# DeepCluster (Caron et al. 2018) and NAT (Bojanowski & Joulin 2017): a crop, mirrored or not
CROP_FLIP = Recipe(grey_p=0.0)
# MoCo v2 (Chen et al. 2020) and SimSiam (Chen & He 2021)
MOCO = Recipe(scale=(0.2, 1.0), brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, blur_p=0.5)
# BYOL (Grill et al. 2020), Barlow Twins, VICReg, MoCo v3: one recipe for each of the two views
BYOL_1 = _byol_recipe(blur_p=1.0, solarize_p=0.0)
BYOL_2 = _byol_recipe(blur_p=0.1, solarize_p=0.2)
# DINO (Caron et al. 2021): two global views and, at 96 / 224 of their size, 6 to 10 local ones. The authors' code
# resizes with bicubic interpolation and blurs with Pillow's approximation; here both are as in all other recipes.
DINO_GLOBAL_1 = replace(BYOL_1, scale=(0.4, 1.0))
DINO_GLOBAL_2 = replace(BYOL_2, scale=(0.4, 1.0))
DINO_LOCAL = replace(BYOL_1, scale=(0.05, 0.4), blur_p=0.5)
# SwAV (Caron et al. 2020): two large crops and, at 96 / 224 of their size, six small ones; SimCLR's colors
SWAV_GLOBAL = replace(SIMCLR, scale=(0.14, 1.0))
SWAV_LOCAL = replace(SIMCLR, scale=(0.05, 0.14))
# The strong views of UDA and FixMatch are RandAugment (Cubuk et al. 2020) and cutout; these are ours, by the operations
# of RandAugment that a recipe has: turned and sheared by up to 30 and 17 degrees as there, and a square cut out
STRONG = Recipe(
    scale=(0.5, 1.0),
    brightness=0.5,
    contrast=0.5,
    saturation=0.5,
    hue=0.1,
    solarize_p=0.1,
    turn=30.0,
    shear=17.0,
    erase_p=1.0,
    erase_scale=(0.02, 0.25),
    erase_ratio=(1.0, 1.0),
)
# Grey scans (ours): never mirrored, because left and right differ in a body; crops large enough to keep a lesion in
# sight; an intensity window in place of hue, grey and solarize. For 1 channel and for 3 equal ones.
GREY_SCAN = Recipe(
    scale=(0.3, 1.0), flip=0.0, turn=10.0, window=0.2, brightness=0.2, contrast=0.2, grey_p=0.0, blur_p=0.5
)


def adapted(
    recipe: Recipe,  # A paper's, for photographs
    views: str | Mapping | None = None,  # A kind, or changes by field, which may have a 'kind' and a 'strength'
    channels: int = 3,  # Of the images
    side: int = 224,  # Of the images, in pixels
) -> Recipe:
    """A paper's recipe as the images need it.

    'photo', the default for images of 3 channels: the recipe itself. 'scan', for those of 1 channel: `GREY_SCAN` with
    the paper's blur; crops are at least 30 % of the area, or half the largest share where that is less. 'microscopy',
    for all that has no up, satellite images too: turned by any angle, mirrored both ways. Nothing is blurred below 64
    pixels. `strength` multiplies the color strengths (hue up to 0.5); fields given by name come last:
    `{'kind': 'scan', 'turn': 0}`. Raises `TaskError` for kinds, fields and values that do not exist.
    """
    changes = {"kind": views} if views is None or isinstance(views, str) else dict(_mapping(views))
    kind, strength = changes.pop("kind", None), changes.pop("strength", 1.0)
    if kind not in (None, *KINDS):
        raise unknown("kind of views", kind, KINDS)
    for name in changes:
        if name not in _FIELDS:
            raise unknown("field of a recipe", name, (*_FIELDS, "kind", "strength"))
    if kind == "scan" or (kind is None and channels == 1):
        low, high = recipe.scale
        low = max(low, min(GREY_SCAN.scale[0], high / 2))
        recipe = replace(GREY_SCAN, scale=(low, high), blur_p=recipe.blur_p, blur_sigma=recipe.blur_sigma)
    elif kind == "microscopy":
        recipe = replace(recipe, flip=0.5, vertical_flip=0.5, turn=180.0)
    if side < BLUR_FROM and recipe.blur_p:
        recipe = replace(recipe, blur_p=0.0)
    recipe = _colored(recipe, strength)
    return replace(recipe, **{name: _value(name, value) for name, value in changes.items()}) if changes else recipe


def for_scans(views: str | Mapping | None) -> str | Mapping:
    """What is asked of views, of kind 'scan' where no kind is."""
    if views is None or isinstance(views, str):
        return views or "scan"
    return {"kind": "scan", **views}


def _colored(recipe: Recipe, strength: object) -> Recipe:
    """The recipe with its color strengths multiplied."""
    _in_range("strength", (_value("strength", strength),), 0, math.inf, "a factor of 0 or more")
    if strength == 1:
        return recipe
    names = ("brightness", "contrast", "saturation")
    return replace(
        recipe, hue=min(0.5, recipe.hue * strength), **{name: getattr(recipe, name) * strength for name in names}
    )


def _mapping(views: object) -> Mapping:
    if isinstance(views, Mapping):
        return views
    said = f"views is one of {', '.join(KINDS)}, or a recipe's fields by name, such as {{'flip': 0}}"
    raise TaskError(f"{said}; got {views!r}.")


def _value(name: str, value: object) -> float | tuple[float, ...]:
    """A field's value as a recipe wants it; from a file or the shell, pairs come as lists."""
    is_pair = isinstance(getattr(Recipe, name, None), tuple)
    numbers = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    good = [isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in numbers]
    if not all(good) or len(good) != 1 + is_pair:
        raise TaskError(f"A recipe's {name} is {'two numbers' if is_pair else 'a number'}; got {value!r}.")
    return tuple(map(float, numbers)) if is_pair else float(value)


_FIELDS = tuple(field.name for field in fields(Recipe))
