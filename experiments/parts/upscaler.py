"""A net that enlarges pictures, of a run of `experiments/superres.py` or of a published file: pictures by tiles, its
figures on a test set, beside bicubic interpolation and the papers, and its pictures."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from core import tree
from nets.superresolution import by_name
from train.data.images import patches, resize
from train.data.images.augment import unit
from train.data.images.originals import Originals
from train.files import shown
from train.metrics import image_quality
from train.plots import bars
from train.plots import gan as gan_plots
from train.run import SavedRun

TILE = 256  # pixels per side of what the net sees of a picture
SHOWN = 5  # pictures in a table of crops
PROTOCOL = "luminance of 8-bit pictures, a border of `scale` pixels left out, mean over the pictures"

# PSNR in dB and SSIM on Set5, as published; SRResNet and SRGAN after their own protocol, which differs a little.
PAPERS: dict[int, dict[str, tuple[float, float | None]]] = {
    2: {
        "bicubic": (33.66, 0.9299),
        "SRCNN": (36.66, 0.9542),
        "FSRCNN": (37.00, 0.9558),
        "VDSR": (37.53, 0.9587),
        "DRCN": (37.63, 0.9588),
        "DRRN B1U9": (37.66, 0.9589),
        "DRRN B1U25": (37.74, 0.9591),
        "EDSR": (38.11, 0.9601),
    },
    3: {
        "bicubic": (30.39, 0.8682),
        "SRCNN": (32.75, 0.9090),
        "FSRCNN": (33.16, 0.9140),
        "ESPCN": (33.13, None),
        "VDSR": (33.66, 0.9213),
        "DRCN": (33.82, 0.9226),
        "DRRN B1U9": (33.93, 0.9234),
        "DRRN B1U25": (34.03, 0.9244),
        "EDSR": (34.65, 0.9282),
    },
    4: {
        "bicubic": (28.42, 0.8104),
        "SRCNN": (30.48, 0.8628),
        "FSRCNN": (30.71, 0.8657),
        "ESPCN": (30.90, None),
        "VDSR": (31.35, 0.8838),
        "DRCN": (31.53, 0.8854),
        "DRRN B1U25": (31.68, 0.8888),
        "EDSR": (32.46, 0.8968),
        "SRResNet": (32.05, 0.9019),
        "SRGAN": (29.40, 0.8472),
    },
}


class Upscaler(NamedTuple):
    """A net with its values, the factors of enlargement it has learned, and whether it learned the difference from the
    bicubic enlargement."""

    name: str
    net: ModuleType
    cfg: Any
    values: tree.Tree
    scales: tuple[int, ...]
    residual: bool

    @property
    def device(self) -> torch.device:
        return tree.leaves(self.values)[0].device

    def overlap(self, scale: int) -> int:
        """Pixels around a part of a picture that decide on its enlargement, on each side."""
        reach = self.net.reach(self.cfg)
        return -(-reach // scale) + resize.REACH if self.net.ENLARGED else max(reach, resize.REACH)


def load(run: SavedRun) -> Upscaler:
    """The net of a run, on the CPU."""
    args = run.config["args"]
    net = by_name.PRESETS[args["net"]]
    cfg = run.read("net", net.Config)
    values = run.learned(net.spec(cfg), "generator" if args["net"].startswith("srgan") else "", averaged=False)
    return Upscaler(args["net"], net, cfg, values, tuple(args["scale"]), args["residual"])


@torch.no_grad()
def luminance_or_colour(model: Upscaler, small: Tensor, scale: int, ensemble: bool = False) -> Tensor:
    """The net itself, on its own channels: (1, channels, height, width) -> (1, channels, scale height, scale width).

    ensemble: the mean over the eight symmetries of a square (Lim et al. 2017, section 3.4).
    """
    out = []
    for symmetry in patches.SYMMETRIES if ensemble else patches.SYMMETRIES[:1]:
        x = patches.turned(small.to(model.device), *symmetry).contiguous()
        bicubic = resize.enlarged(x, scale)
        y = by_name.enlarge(model.net, model.values, model.cfg, x, bicubic, scale, residual=model.residual)
        out.append(patches.returned(y, *symmetry).cpu())
    return torch.stack(out).mean(0)


def enlarge(model: Upscaler, small: Tensor, scale: int, ensemble: bool = False) -> Tensor:
    """A grey or coloured picture, (1, 1 or 3, height, width) in [0, 1] -> (1, the same, scale height, scale width).

    A net of the luminance leaves the colours to the bicubic enlargement; a net of colours sees grey as three of them.
    """
    if model.cfg.channels == 3:
        large = luminance_or_colour(model, small.expand(-1, 3, -1, -1), scale, ensemble)
        return large if small.shape[1] == 3 else large.mean(1, keepdim=True)
    ycbcr = resize.ycbcr(small.expand(-1, 3, -1, -1))
    luminance = luminance_or_colour(model, ycbcr[:, :1], scale, ensemble)
    whole = resize.rgb(torch.cat([luminance, resize.enlarged(ycbcr[:, 1:], scale)], 1))
    return whole[:, : small.shape[1]]


class Window(NamedTuple):
    """Rows and columns of a picture."""

    top: int
    left: int
    bottom: int
    right: int

    def with_margin(self, margin: int, height: int, width: int) -> "Window":
        """The window and `margin` pixels around it, within a picture of this size."""
        top, left = max(0, self.top - margin), max(0, self.left - margin)
        return Window(top, left, min(height, self.bottom + margin), min(width, self.right + margin))

    def of(self, x: Any, scale: int = 1) -> Any:
        """This part of (..., height, width), or of its enlargement."""
        return x[..., scale * self.top : scale * self.bottom, scale * self.left : scale * self.right]


def windows(height: int, width: int, tile: int, overlap: int) -> Iterator[tuple[Window, Window]]:
    """(what the net sees, the part of it that counts): the second ones cover the picture, each once.

    Raises ValueError: a tile of which nothing would count.
    """
    step = tile - 2 * overlap
    if step < 1:
        least = 2 * overlap + 1
        raise ValueError(f"--tile is {tile}; expected at least {least}: {overlap} pixels a side only decide on others")
    for top in range(0, height, step):
        for left in range(0, width, step):
            inner = Window(top, left, min(top + step, height), min(left + step, width))
            yield inner.with_margin(overlap, height, width), inner


def by_tiles(
    model: Upscaler, small: Tensor, scale: int, tile: int = TILE, ensemble: bool = False, whole: bool = True
) -> Tensor:
    """The enlargement of (1, channels, height, width), tile by tile, equal to that of the picture at once.

    whole: of a grey or coloured picture, as `enlarge`; otherwise of what the net takes.
    """
    height, width = small.shape[2:]
    out = small.new_empty(*small.shape[:2], scale * height, scale * width)
    for outer, inner in windows(height, width, tile, model.overlap(scale)):
        large = (enlarge if whole else luminance_or_colour)(model, outer.of(small), scale, ensemble)
        inner.of(out, scale)[:] = within(outer, inner).of(large, scale)
    return out


def within(outer: Window, inner: Window) -> Window:
    """The inner window counted from the corner of the outer one."""
    top, left = outer.top, outer.left
    return Window(inner.top - top, inner.left - left, inner.bottom - top, inner.right - left)


def rounded(x: Tensor) -> Tensor:
    """[0, 1] -> whole numbers from 0 to 255."""
    return (x * 255).clamp(0, 255).round()


def bicubic_figures(test: Originals, scale: int) -> list[tuple[float, float]]:
    """(PSNR, SSIM) of the bicubic enlargement of each picture (3, height, width) of bytes."""
    out = []
    for picture in test.pictures:
        y = resize.cropped(rounded(resize.luminance(unit(picture)[None].double())), scale)
        out.append(_figures(resize.enlarged(resize.lowered(y, scale), scale).clamp(0, 255).round(), y, scale))
    return out


def figures(
    model: Upscaler, test: Originals, scale: int, tile: int = TILE, ensemble: bool = False
) -> list[tuple[float, float]]:
    """(PSNR, SSIM) of the net's enlargement of each picture, in the same protocol.

    A net of luminance sees it as 8 bits, rounded, and lowered without rounding; of a net of colours the luminance is
    that of the rounded colours.
    """
    out = []
    for picture in test.pictures:
        x = resize.cropped(unit(picture)[None], scale)
        if model.cfg.channels == 1:
            x = rounded(resize.luminance(x)) / 255
        large = by_tiles(model, resize.lowered(x, scale), scale, tile, ensemble, whole=False)
        if model.cfg.channels == 1:
            out.append(_figures(rounded(large), rounded(x), scale))
        else:
            out.append(_figures(*(255 * resize.luminance(rounded(y) / 255) for y in (large, x)), scale))
    return out


def _figures(images: Tensor, originals: Tensor, scale: int) -> tuple[float, float]:
    options = {"peak": 255.0, "border": scale}
    return tuple(float(f(images, originals, **options)) for f in (image_quality.psnr, image_quality.ssim))


def means(values: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(mean PSNR, mean SSIM)."""
    return tuple(sum(column) / len(column) for column in zip(*values, strict=True))


def summary(
    scale: int, ours: Sequence[tuple[float, float]], bicubic: Sequence[tuple[float, float]]
) -> dict[str, float]:
    """Figures by name for `result.json`: psnr_x3, ssim_x3, psnr_bicubic_x3 and ssim_bicubic_x3."""
    table = {}
    for prefix, values in (("", ours), ("bicubic_", bicubic)):
        table |= {f"{m}_{prefix}x{scale}": v for m, v in zip(("psnr", "ssim"), means(values), strict=True)}
    return table


def check_set5(name: str, scale: int, psnr: float) -> None:
    """Raise ValueError if the pictures are called Set5, and their bicubic PSNR is not the published one."""
    if not Path(name).name.lower().startswith("set5") or scale not in PAPERS:
        return
    published = PAPERS[scale]["bicubic"][0]
    if abs(psnr - published) > 0.02:
        reason = "other pictures, pictures that were scaled or compressed, or another resize"
        raise ValueError(
            f"'{shown(name)}': bicubic PSNR x{scale} is {psnr:.2f} dB; that of Set5 is {published}: {reason}"
        )


def least_size(scales: Sequence[int]) -> int:
    """Pixels per side below which a picture cannot be judged: SSIM's window within the border."""
    return max(image_quality.WINDOW + 3 * scale for scale in scales)


def row(name: str, scale: int, values: Sequence[tuple[float, float]], test: Originals) -> str:
    """A line of figures: their means, and the PSNR of each of the first pictures."""
    psnr, ssim = means(values)
    each = ", ".join(f"{shown(path.stem)} {v[0]:.2f}" for path, v in zip(test.paths[:SHOWN], values, strict=False))
    return f"{name:14} x{scale}  PSNR {psnr:.2f} dB, SSIM {ssim:.4f}  ({each}{' ...' if values[SHOWN:] else ''})"


def line(table: dict[str, float], scales: Sequence[int]) -> str:
    """The figures of all scales beside those of bicubic interpolation."""
    return "\n".join(
        f"x{s}: PSNR {table[f'psnr_x{s}']:.2f} dB, SSIM {table[f'ssim_x{s}']:.4f} (bicubic: "
        f"{table[f'psnr_bicubic_x{s}']:.2f} dB, {table[f'ssim_bicubic_x{s}']:.4f})"
        for s in scales
    )


# Pictures.


def draw(
    folder: Path, models: Sequence[tuple[str, Upscaler]], test: Originals, source: str, table: dict[str, float]
) -> None:
    """crops_x3.png and bars_x3.png of each scale. The last model has the figures; `source` names the pictures."""
    name, model = models[-1]
    for scale in model.scales:
        draw_crops(folder / f"crops_x{scale}.png", models, test, scale)
        papers = PAPERS.get(scale, {}) if Path(source).name.lower().startswith("set5") else {}
        figures = {}
        for i, (title, key) in enumerate((("PSNR in dB", "psnr"), ("SSIM", "ssim"))):
            published = {n: v[i] for n, v in papers.items() if n != "bicubic" and v[i] is not None}
            figures[title] = {"bicubic": table[f"{key}_bicubic_x{scale}"], name: table[f"{key}_x{scale}"]}
            figures[title] |= {f"{n}, published": v for n, v in published.items()}
        bars.bars(
            folder / f"bars_x{scale}.png", figures, "bicubic", name, title=f"{shown(Path(source).name)}, x{scale}"
        )


def draw_crops(path: Path, models: Sequence[tuple[str, Upscaler]], test: Originals, scale: int, side: int = 72) -> None:
    """Small, bicubic, each net's enlargement and the original, where bicubic interpolation errs most."""
    rows, names, context = [], [], max(model.overlap(scale) for _, model in models)
    pictures = list(zip(test.pictures, test.paths, strict=True))[:SHOWN]
    side = min(side, *(n for picture, _ in pictures for n in picture.shape[1:])) // scale * scale
    for picture, name in pictures:
        x = resize.cropped(unit(picture)[None], scale)
        small = resize.lowered(x, scale)
        for window in _worst(small, x, scale, side, -(-SHOWN // len(pictures))):
            around = Window(*(n // scale for n in window))
            outer = around.with_margin(context, *small.shape[2:])
            part, inner = outer.of(small), within(outer, around)
            nearest = inner.of(part).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
            columns = [nearest, inner.of(resize.enlarged(part, scale), scale)]
            columns += [inner.of(enlarge(model, part, scale), scale) for _, model in models]
            rows.append(torch.cat([*columns, window.of(x)]).clamp(0, 1))  # (columns, 3, side, side)
            names.append(shown(name.stem))
    titles = ["small", "bicubic", *(name for name, _ in models), "original"]
    gan_plots.image_table(path, torch.stack(rows), names, titles, title=f"Enlarged x{scale}", scale=1.5)


def _worst(small: Tensor, x: Tensor, scale: int, side: int, count: int) -> list[Window]:
    """Windows of the original, on multiples of the scale, with the largest errors of bicubic interpolation; those of
    one picture do not overlap. A picture without room has fewer."""
    error = (resize.enlarged(small, scale) - x).square().mean(1, keepdim=True)
    sums = F.avg_pool2d(error, side, scale)[0, 0]  # (rows, columns), by multiples of the scale
    out, near = [], side // scale - 1
    while len(out) < count and sums.max() >= 0:
        top, left = divmod(int(sums.flatten().argmax()), sums.shape[1])
        sums[max(0, top - near) : top + near + 1, max(0, left - near) : left + near + 1] = -1
        out.append(Window(scale * top, scale * left, scale * top + side, scale * left + side))
    return out
