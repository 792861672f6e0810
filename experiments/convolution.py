"""Convolution in pictures: on a photograph, as a matrix, by im2col, in the frequency domain, and how fast each way is.

`nets.explained.convolution` writes two-dimensional convolution out four ways in plain tensor operations; here they are
drawn, and timed beside torch's own (im2col: Chellapilla et al. 2006; FFT: Mathieu et al. 2014, arXiv:1312.5851; the
transposed: Dumoulin and Visin 2016, arXiv:1603.07285). The image is a photograph in scikit-learn, by danielbuechele
(CC BY 2.0):

    python experiments/convolution.py                                    about 20 seconds on 2 CPU cores
    python experiments/convolution.py --image FILE --size 512            your own image
    python experiments/convolution.py --channels 16 --kernels 3 7 15 31 --sides 32 64 128 --rounds 21

Expected: torch's own is the fastest up to kernels of 5 x 5, FFT from 9 x 9 on; errors are below 1e-6 of the output.
"""

import experiments.parts.interrupts  # noqa: F401 # isort: skip
import importlib.util
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from core import random
from nets.explained.convolution import WAYS, by_definition, by_fft, im2col, matrix, transposed
from train import plots
from train.data.images import arrays
from train.data.understood import understood
from train.run import Count, Integer, command_line
from train.run.logs import RunLog
from train.run.run import check_name, new_folder

RUNS = Path("runs/convolution")
OWN, PRODUCT = "torch", "matrix, kept"  # torch's convolution; the product alone, with the matrix of an earlier call
MOST_ENTRIES = 2**21  # of a matrix that is timed: 40 MB, and some time to build


@dataclass(frozen=True)
class Args:
    image: Path | None = None
    """Picture to use; the photograph in scikit-learn if None."""
    size: Count = 256
    """Pixels per side, at least 16, that the picture is scaled and cropped to."""
    kernels: tuple[Count, ...] = (1, 3, 5, 9, 15, 25)
    """Side lengths of the timed kernels, on images of the middle one of --sides."""
    sides: tuple[Count, ...] = (16, 32, 64, 128, 256)
    """Side lengths of the timed images, with a kernel of 5 x 5."""
    channels: Count = 4
    """Channels of the timed images, of both input and output."""
    rounds: Count = 21
    """Number of measurements of each time; the median counts."""
    seed: Integer = 0
    """Seed of everything random: the timed images and kernels, and the order in each round."""
    name: str | None = None
    """Folder under runs/convolution; the date and time if None."""
    device: str = "cpu"
    """cpu, cuda, cuda:1 ..."""


def gaussian(size: int, sigma: float) -> Tensor:
    line = torch.exp(-0.5 * ((torch.arange(size) - size // 2) / sigma) ** 2)
    return torch.outer(line, line) / line.sum() ** 2


SOBEL = torch.tensor([[-1.0, -2, -1], [0, 0, 0], [1, 2, 1]])
LAPLACE = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])
IDENTITY = torch.tensor([[0.0, 0, 0], [0, 1, 0], [0, 0, 0]])
KERNELS = {
    "as it is": IDENTITY,
    "blur (Gauss)": gaussian(9, 2.0),
    "motion blur": torch.eye(15) / 15,
    "sharpen": IDENTITY - LAPLACE,
    "horizontal edges (Sobel)": SOBEL,
    "vertical edges (Sobel)": SOBEL.T,
    "all edges (Laplace)": LAPLACE,
    "emboss": torch.tensor([[-2.0, -1, 0], [-1, 1, 1], [0, 1, 2]]),
}
FILTERS = {"none": IDENTITY, "Gauss": gaussian(9, 2.0), "Laplace": LAPLACE, "Sobel": SOBEL}
VARIANTS = ({}, {"padding": 1}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": 1})


def as_pixels(y: Tensor, kernel: Tensor) -> Tensor:
    """The image (1, channels, height, width) as imshow takes it; where the kernel's sum is 0, grey is 0."""
    if kernel.sum().abs() < 0.1:
        y = 0.5 + 0.15 * y / y.std().clamp(min=1e-6)
    return y[0].permute(1, 2, 0).clamp(0, 1).squeeze(-1)


def picture(axes, pixels: Tensor, title: str, **style):
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, color=plots.INK, fontsize=10)
    axes.spines[:].set_color("#888888")
    return axes.imshow(pixels.numpy(), interpolation="nearest", **style)


def cells(axes, values: Tensor, title: str = "", numbers: bool = False) -> None:
    """A matrix in colours, its zeros white."""
    high = float(values.abs().max())
    low, cmap = (-high, "RdBu_r") if values.min() < 0 or title == "" else (0.0, "viridis")
    mesh = picture(axes, values.where(values != 0, torch.nan), title, cmap=cmap, vmin=low, vmax=high)
    for i, row in enumerate(values.tolist() if numbers else ()):
        for j, value in enumerate(row):
            dark = value != 0 and sum(mesh.to_rgba(value)[:3]) < 1.5
            axes.text(j, i, f"{value:g}", ha="center", va="center", color="white" if dark else plots.INK, fontsize=9)


def draw_kernels(path: Path, image: Tensor) -> None:
    with plots.panels(path, 2, 4, 3.2, 3.5) as axes:
        for panel, (name, kernel) in zip(axes, KERNELS.items(), strict=True):
            weight = kernel.expand(3, 1, *kernel.shape)  # three groups: each colour by itself
            picture(panel, as_pixels(by_definition(image, weight, groups=3), kernel), name)
            cells(panel.inset_axes((0.02, 0.02, 0.28, 0.28)), kernel, numbers=len(kernel) == 3)


def draw_matrices(path: Path) -> None:
    """Each number of the kernel has its own colour, so that one sees where it recurs; lines end a row of pixels."""
    kernel, count = torch.arange(1.0, 10.0).view(1, 1, 3, 3), len(VARIANTS)
    with plots.panels(path, 2, 1 + count, 3.1, 3.4) as axes:
        cells(axes[0], kernel[0, 0], "the kernel", numbers=True)
        strokes = transposed(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3), stride=2)[0, 0]
        cells(axes[count + 1], strokes, "how often a transposed\nconvolution of stride 2 paints a pixel", numbers=True)
        for column, options in enumerate(VARIANTS, 1):
            m = matrix(kernel, (6, 6), **options).to_dense()
            name = ", ".join(f"{option} {number}" for option, number in options.items()) or "plain"
            for panel, values, label in ((axes[column], m, name), (axes[count + 1 + column], m.T, "its transpose")):
                rows, columns = (math.isqrt(n) for n in values.shape)
                cells(panel, values, f"{label}: {len(values)} x {len(values.T)}")
                panel.set_ylabel(f"output, {rows} x {rows}", color=plots.INK, fontsize=9)
                panel.set_xlabel(f"image, {columns} x {columns}", color=plots.INK, fontsize=9)
                for line, side in ((panel.axhline, rows), (panel.axvline, columns)):
                    for end in range(side, side * side, side):
                        line(end - 0.5, color=plots.GRID, lw=0.8)


def draw_im2col(path: Path) -> None:
    """Numbered pixels, their patches as columns, one of them framed, and its product with the kernel."""
    from matplotlib.patches import Rectangle

    image, kernel = torch.arange(25.0).view(1, 1, 5, 5), torch.tensor([[0.0, 1, 0], [1, 2, 1], [0, 1, 0]])
    columns, positions = im2col(image, 3)[0], [f"{a}, {b}" for a in range(3) for b in range(3)]
    frames = (((1.5, 0.5), 3, 3), ((-0.5, -0.5), 3, 3), ((4.5, -0.5), 1, 9), ((1.5, 0.5), 1, 1))
    with plots.panels(path, 1, 4, 3.3, 3.8) as axes:
        plots.matrix(axes[0], image[0, 0], title="The image")
        plots.matrix(axes[1], kernel, title="The kernel")
        plots.matrix(axes[2], columns, positions, positions, "patch", "position in the kernel", "Patches as columns")
        plots.matrix(axes[3], (kernel.flatten() @ columns).view(3, 3), title="Kernel as a row, times columns")
        for panel, frame in zip(axes, frames, strict=True):
            panel.add_patch(Rectangle(*frame, fill=False, ec=plots.COLOURS[1], lw=3, clip_on=False, zorder=5))


def draw_spectra(path: Path, image: Tensor) -> None:
    """A column per filter: its spectrum, the product with that of the image, and the filtered image."""
    grey = image.mean(1, keepdim=True)
    spectrum = torch.fft.fft2(grey[0, 0] - grey.mean()).abs()
    high = float(spectrum.max().clamp(min=1e-3).log10())
    with plots.panels(path, 3, len(FILTERS), 3.1, 3.3) as axes:
        for column, (name, kernel) in enumerate(FILTERS.items()):
            upper, middle, lower = axes[column :: len(FILTERS)]
            response = torch.fft.fftshift(torch.fft.fft2(kernel, spectrum.shape)).abs()
            product = (torch.fft.fftshift(spectrum) * response).clamp(min=1e-9).log10()
            y = by_fft(grey, kernel[None, None], padding=len(kernel) // 2)
            picture(upper, response, f"{name}: spectrum of the kernel", cmap="viridis", vmin=0)
            picture(middle, product, "times that of the image (log)", cmap="magma", vmin=high - 4.5, vmax=high)
            picture(lower, as_pixels(y, kernel), "the image then", cmap="gray", vmin=0, vmax=1)
        axes[0].set_ylabel("from -1/2 to 1/2 cycle a pixel", color=plots.INK, fontsize=9)


def contestants(x: Tensor, weight: Tensor) -> dict[str, Callable[[], Tensor]]:
    """{way: convolution of x}, with padding of half the kernel; without matrices that are too large."""
    padding, size = weight.shape[-1] // 2, x.shape[2:]
    calls = {way: lambda f=f: f(x, weight, padding=padding) for way, f in {OWN: conv2d, **WAYS}.items()}
    if weight.numel() * math.prod(size) > MOST_ENTRIES:
        return {way: call for way, call in calls.items() if way != "matrix"}
    m = matrix(weight, size, padding=padding)
    return {**calls, PRODUCT: lambda: (m @ x.flatten(1).T).T}


def measure(calls: dict[str, Callable[[], Tensor]], exact: Tensor, rounds: int, key: Tensor) -> dict[str, float]:
    """{"seconds/way": median of the rounds, "error/way": the largest error, relative to the largest output}.

    Each round has another order, so that all ways meet the same disturbances.
    """
    seconds: dict[str, list[float]] = {way: [] for way in calls}
    for number in range(rounds + 1):  # the first warms up
        for i in random.permutation(random.fold_in(key, number), len(calls)).tolist():
            began = time.perf_counter()
            if list(calls.values())[i]().is_cuda:
                torch.cuda.synchronize(exact.device)
            seconds[list(calls)[i]].append(time.perf_counter() - began)
    error = {way: (calls[way]() - exact).abs().max() / exact.abs().max() for way in calls if way != PRODUCT}
    medians = {f"seconds/{way}": statistics.median(values[1:]) for way, values in seconds.items()}
    return medians | {f"error/{way}": float(value) for way, value in error.items()}


def draw_timings(path: Path, records: list[dict], middle: int) -> None:
    by_kernel, by_side = ([r for r in records if r[name] == fixed] for name, fixed in (("side", middle), ("kernel", 5)))
    with plots.panels(path, 1, 3, 4.6, 4.2) as axes:
        for panel, line, over, figure, scale, ylabel, title in (
            (axes[0], by_kernel, "kernel", "seconds", 1e3, "ms", f"Time, images of {middle} x {middle}"),
            (axes[1], by_side, "side", "seconds", 1e3, "ms", "Time, kernel of 5 x 5"),
            (axes[2], by_kernel, "kernel", "error", 2**23, "in $2^{-23}$ of the largest output", "Error, float32"),
        ):
            xs = [r[over] for r in line]
            lines = {w: (xs, [scale * r.get(f"{figure}/{w}", math.nan) for r in line]) for w in (OWN, *WAYS, PRODUCT)}
            plots.curves(
                panel, lines, f"side of the {over.replace('side', 'image')}", ylabel, title, figure == "seconds"
            )
            panel.set_xscale("log")
            panel.set_xticks(xs, map(str, xs))
            panel.minorticks_off()
            if panel is not axes[1]:
                panel.get_legend().remove()


def main(args: Args) -> None:
    check_name(RUNS, args.name)
    if args.size < 16:
        raise ValueError(f"--size is {args.size}; expected at least 16, room for the largest kernel")
    if not args.kernels or not args.sides:
        raise ValueError("--kernels and --sides expect at least one number each")
    device, start, records = command_line.device(args.device), time.perf_counter(), []
    # The file that sklearn.datasets would load, without the two seconds of its import.
    sample = Path(importlib.util.find_spec("sklearn").origin).parent / "datasets" / "images" / "china.jpg"
    image = arrays.read_image(args.image or sample, args.size)[None]  # (1, 3, size, size)
    middle = sorted(args.sides)[len(args.sides) // 2]
    settings = sorted({*((middle, kernel) for kernel in args.kernels), *((side, 5) for side in args.sides)})
    timed = {"settings to time": len(settings), "rounds": args.rounds, "threads": torch.get_num_threads()}
    understood(print, {"picture": str(args.image or sample), "pixels per side": args.size} | timed)

    folder, key = new_folder(RUNS, args.name), random.key(args.seed)
    config = {"experiment": RUNS.name, "args": args, "torch": torch.__version__, "threads": torch.get_num_threads()}
    with RunLog(folder, config, total=len(settings), unit="settings") as log:
        log.print(f"run in {folder}")
        draw_kernels(folder / "kernels.png", image)
        draw_matrices(folder / "matrices.png")
        draw_im2col(folder / "im2col.png")
        draw_spectra(folder / "spectra.png", image)
        for at, (side, kernel) in enumerate(settings, 1):
            x_key, weight_key, order_key = random.split(random.fold_in(key, at), 3).unbind(0)
            x = random.normal(x_key.to(device), (1, args.channels, side, side))
            weight = random.normal(weight_key.to(device), (args.channels, args.channels, kernel, kernel))
            exact = conv2d(x.double(), weight.double(), padding=kernel // 2)
            figures = measure(contestants(x, weight), exact, args.rounds, order_key)
            records.append({"side": side, "kernel": kernel, **figures})
            log.metrics(at, records[-1])
            log.progress(at, 1, side=side, kernel=kernel)
        draw_timings(folder / "timings.png", records, middle)
        worst = {way: max(r.get(f"error/{way}", 0.0) for r in records) for way in (OWN, *WAYS)}
        log.result({"error": worst, "timings": records, "seconds": time.perf_counter() - start})
    for record in (r for r in records if r["side"] == middle):
        times = (f"{name[8:]} {1e3 * value:.3g}" for name, value in record.items() if name[:8] == "seconds/")
        print(f"kernel {record['kernel']:>2}, ms: {', '.join(times)}")
    print(f"{time.perf_counter() - start:.0f} s; files in {folder}/")


if __name__ == "__main__":
    command_line.run(__doc__, (Args, main))
