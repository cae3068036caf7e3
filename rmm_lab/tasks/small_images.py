"""How the small image sets are made: glyphs from matplotlib's fonts, procedural textures, real digits.

Everything here is seeded and returns uint8 grey images of 28 x 28 pixels in 16 levels (0, 17, ...,
255), grouped by class. The rendered reward and test splits ship as PNG sheets under ``data/sets``,
so this file only runs to rebuild them, and to draw train splits, which do not ship.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 28  # pixels, as MNIST
LEVELS = 15  # grey levels above black: half a byte a pixel in a PNG

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SYMBOLS = "αβγδθλμξπσφψωΓΔΣΩ∂∇∞√∫∈≈"
# What the base is pretrained on: scripts that no task uses, without the letters that look Latin or Greek.
BASE_GLYPHS = (
    "БДЖЗИЛЦЧШЩЪЫЭЮЯ"
    "ԱԲԳԴԵԶԷԸԹԺԻԼԽԾԿՀՁՂՃՄՅՆՇՈՉՊՋՌՍՎՏՐՑՒՓՔՖ"
    "აბგდევზთიკლმნოპჟრსტუფქღყშჩცძწჭხჯჰ"
    "←↑→↓↔↕↖↗↺↻⇐⇑⇒⇓"
)
TEXTURES = tuple(
    f"{kind}-{angle}"
    for kind, angles in (
        ("grating", (0, 45, 90, 135)),
        ("bars", (0, 45, 90, 135)),
        ("chirp", (0, 45, 90, 135)),
        ("checks", (0, 22.5, 45, 67.5)),  # checks look the same every 90 degrees
    )
    for angle in angles
)
_DEJAVU = [
    f"DejaVu{family}.ttf"
    for family in (
        *("Sans", "Sans-Bold", "Sans-Oblique", "Sans-BoldOblique"),
        *("SansMono", "SansMono-Bold", "SansMono-Oblique", "SansMono-BoldOblique"),
        *("Serif", "Serif-Bold", "Serif-Italic", "Serif-BoldItalic"),
    )
]
_STIX = ["STIXGeneral.ttf", "STIXGeneralBol.ttf"]
_ITALIC = ["STIXGeneralItalic.ttf", "STIXGeneralBolIta.ttf"]
_CM = ["cmr10.ttf", "cmss10.ttf", "cmtt10.ttf", "cmti10.ttf", "cmb10.ttf"]
GLYPH_SETS: dict[str, tuple[str, list[str]]] = {
    "letters": (LETTERS, _DEJAVU + _STIX + _ITALIC + _CM),
    "symbols": (SYMBOLS, _DEJAVU + _STIX),
    "base": (BASE_GLYPHS, _DEJAVU),
}


def glyph_bank(name: str) -> Tensor:
    """Every glyph of a set in every font, white on black, before any distortion.

    Returns: (classes, fonts, 1, 56, 56) float in [0, 1]; each glyph centred, its larger side 40 px.
    """
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont

    glyphs, fonts = GLYPH_SETS[name]
    folder = Path(get_data_path()) / "fonts" / "ttf"
    bank = torch.zeros(len(glyphs), len(fonts), 1, 2 * SIZE, 2 * SIZE)
    for j, file in enumerate(fonts):
        font = ImageFont.truetype(str(folder / file), 96)
        for i, glyph in enumerate(glyphs):
            canvas = Image.new("L", (256, 256))
            ImageDraw.Draw(canvas).text((80, 60), glyph, fill=255, font=font)
            box = canvas.getbbox()
            if box is None:
                raise ValueError(f"font {file} draws nothing for {glyph!r}: take it from the set")
            ink = canvas.crop(box)
            # Letters keep their relative heights a little: only large glyphs are shrunk to 40 px.
            scale = 40 / max(*ink.size, 72)
            ink = ink.resize(
                (max(1, round(ink.width * scale)), max(1, round(ink.height * scale))),
                Image.Resampling.LANCZOS,
            )
            x, y = SIZE - ink.width // 2, SIZE - ink.height // 2
            bank[i, j, 0, y : y + ink.height, x : x + ink.width] = (
                torch.from_numpy(np.array(ink)).float() / 255
            )
    return bank


def distort(
    images: Tensor,
    generator: torch.Generator,
    *,
    degrees: float,
    scale: tuple[float, float],
    shift: float,
    shear: float = 0.0,
) -> Tensor:
    """Random rotation, scale, shear and shift of each image; what comes in from outside is black.

    images: (n, channels, H, W); degrees, shear: largest angle and shear; scale: range of the size;
    shift: largest shift as a share of the image. Returns the same shape.
    """
    n = len(images)
    u = torch.rand(5, n, generator=generator) * 2 - 1  # (5, n) in [-1, 1]
    angle = u[0] * math.radians(degrees)
    size = scale[0] + (u[1] + 1) / 2 * (scale[1] - scale[0])
    cos, sin = torch.cos(angle) / size, torch.sin(angle) / size
    theta = torch.stack(
        [
            torch.stack([cos, -sin + u[2] * shear, u[3] * shift * 2], -1),
            torch.stack([sin, cos, u[4] * shift * 2], -1),
        ],
        1,
    )  # (n, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)  # (n, H, W, 2)
    return F.grid_sample(images, grid, align_corners=False)


def quantise(images: Tensor) -> Tensor:
    """Float images in [0, 1] to uint8 in 16 even levels (0, 17, ..., 255)."""
    return (images.clamp(0, 1) * LEVELS).round().to(torch.uint8) * (255 // LEVELS)


def glyphs(name: str, per_class: int, seed: int) -> Tensor:
    """A split of a glyph set: random font, rotation, size, shift, contrast and noise.

    Returns: (classes * per_class, 1, 28, 28) uint8, class by class.
    """
    g = torch.Generator().manual_seed(seed)
    bank = glyph_bank(name)
    classes, fonts = bank.shape[:2]
    label = torch.arange(classes).repeat_interleave(per_class)  # (n,)
    font = torch.randint(fonts, (len(label),), generator=g)
    large = distort(bank[label, font], g, degrees=20, scale=(0.75, 1.25), shift=0.1, shear=0.15)
    images = F.avg_pool2d(large, 2)  # (n, 1, 56, 56) -> (n, 1, 28, 28)
    contrast = 0.6 + 0.4 * torch.rand(len(label), 1, 1, 1, generator=g)
    return quantise(images * contrast + 0.12 * torch.randn(images.shape, generator=g).abs())


def textures(per_class: int, seed: int) -> Tensor:
    """Gratings, bars, chirps and checks in four orientations each, under noise.

    Phase, wavelength (4 to 9 px), contrast and a jitter of 7 degrees are random.
    Returns: (16 * per_class, 1, 28, 28) uint8, class by class in the order of ``TEXTURES``.
    """
    g = torch.Generator().manual_seed(seed)
    axis = torch.arange(SIZE) - (SIZE - 1) / 2  # (28,) px from the centre
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    out = []
    for name in TEXTURES:
        kind, angle = name.split("-")
        u = torch.rand(5, per_class, 1, 1, generator=g)  # (5, n, 1, 1)
        jitter = 3.5 if kind == "checks" else 7.0  # their orientations lie half as far apart
        turn = torch.deg2rad(float(angle) + jitter * (2 * u[0] - 1))
        along = x * torch.cos(turn) + y * torch.sin(turn)  # (n, 28, 28) px
        across = -x * torch.sin(turn) + y * torch.cos(turn)
        wave = 2 * math.pi / (4 + 5 * u[1])  # radians per px
        phase = 2 * math.pi * u[2]
        if kind == "grating":
            z = torch.sin(wave * along + phase)
        elif kind == "bars":
            z = torch.sign(torch.sin(wave * along + phase) - 0.5)
        elif kind == "chirp":
            z = torch.sin(wave * along * (1 + along / SIZE) + phase)
        else:
            z = torch.sign(torch.sin(wave * along + phase) * torch.sin(wave * across + 7 * phase))
        contrast = 0.15 + 0.35 * u[3]
        noise = 0.16 * torch.randn(per_class, SIZE, SIZE, generator=g)
        out.append(0.35 + 0.3 * u[4] + contrast * z + noise)
    return quantise(torch.cat(out)[:, None])  # (16 n, 1, 28, 28)


def digits(split: str) -> Tensor:
    """The real handwritten digits of scikit-learn (UCI optdigits), enlarged from 8 to 28 pixels.

    Dealt by class with a fixed seed: 54 train, 60 reward and 60 test images of each of the ten digits.
    Returns: (n, 1, 28, 28) uint8, class by class.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    first, count = {"train": (0, 54), "reward": (54, 60), "test": (114, 60)}[split]
    rng = np.random.default_rng(0)
    rows = [rng.permutation(np.flatnonzero(data.target == c)) for c in range(10)]
    keep = np.concatenate([r[first : first + count] for r in rows])
    small = torch.from_numpy(data.images[keep]).float()[:, None] / 16  # (n, 1, 8, 8)
    framed = F.pad(F.interpolate(small, size=(22, 22), mode="bicubic"), [3] * 4)
    return quantise(framed)  # (n, 1, 28, 28)


def render(name: str, split: str, per_class: int) -> Tensor:
    """Draw one split of a set that ships: (classes * per_class, 1, 28, 28) uint8.

    Every split has its seed, so that no image is in two of them.
    """
    if name == "digits":
        return digits(split)
    seed = {"train": 1, "reward": 2, "test": 3}[split]
    return textures(per_class, seed) if name == "textures" else glyphs(name, per_class, seed)
