"""Parts that pix2pix.py and cyclegan.py share: pictures held out for testing, translations of pictures and files."""

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, TypeVar

import torch
import tyro
from torch import Tensor

from core import random, tree
from train.data import DataError
from train.data.images import folders
from train.data.images import pairs as image_pairs
from train.data.images.pairs import Images, Pairs, signed
from train.data.understood import understood
from train.files import shown
from train.plots import gan as gan_plots
from train.run import FromRun
from train.run.run import unused

SHOWN = 8  # pictures in a table of translations
FRAME = 0.4  # seconds per frame of training.gif
Pictures = TypeVar("Pictures", Pairs, Images)


@dataclass(frozen=True, kw_only=True)
class TranslateArgs(FromRun):
    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Pictures, folders of pictures, a .txt file with one name per line, or - for names on standard input."""
    out: Path | None = None
    """New folder for the translations; RUN/translated, numbered if it exists, if None."""


def loaded_size(size: int) -> int:
    """Pixels per side of the pictures to train on: a little larger than the windows that are cut out of them."""
    return size * 9 // 8


def held_out(pictures: Pictures, size: int) -> tuple[Pictures, Pictures]:
    """(train, test): a tenth of the pictures, always the same, of which the middle `size` pixels are for testing.

    Raises DataError if there is only one.
    """
    count = len(pictures.paths)
    if count < 2:
        kind = "pair" if isinstance(pictures, Pairs) else "picture"
        raise DataError(f"{pictures.paths[0].parent} has one {kind}; expected at least 2, of which one is for testing")
    order, held = random.permutation(random.key(0), count), max(1, count // 10)

    images = {name: value for name, value in pictures._asdict().items() if isinstance(value, Tensor)}
    edge = (pictures[0].shape[-1] - size) // 2
    window = slice(edge, edge + size)

    def part(indices: Tensor, images: dict[str, Tensor]) -> Pictures:
        parts = {name: value[indices] for name, value in images.items()}
        return pictures._replace(**parts, paths=tuple(pictures.paths[i] for i in indices.tolist()))

    test = part(order[:held], {name: value[..., window, window] for name, value in images.items()})
    return part(order[held:], images), test._replace(skipped=(), recoloured=())


def check_size(args: Any, halvings: int, critic_layers: int) -> None:
    """Raise ValueError unless the net can halve pictures of `--size`, and the critic of patches sees enough of them."""
    if args.size % 2**halvings:
        halved = f"the {args.preset} net halves pictures {halvings} times"
        raise ValueError(f"--size is {args.size}; expected a multiple of {2**halvings}, since {halved}")
    if args.size < 3 * 2**critic_layers:
        raise ValueError(f"--size is {args.size}; expected at least {3 * 2**critic_layers}, for the critic's patches")


@torch.no_grad()
def translated(net: ModuleType, values: tree.Tree, cfg: Any, pictures: Tensor) -> Tensor:
    """Translations by `net.generator`, on the CPU: (count, channels, size, size) in [-1, 1] -> the same."""
    device = tree.leaves(values)[0].device
    return torch.cat([net.generator(values, x.to(device), cfg).cpu() for x in pictures.split(16)])


def rgb(images: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1] in three channels, of grey images too."""
    return ((images + 1) / 2).expand(-1, 3, -1, -1)  # (count, 3, height, width)


def translate_files(
    args: TranslateArgs, net: ModuleType, values: tree.Tree, cfg: Any, size: int, channels: int
) -> None:
    """Write a PNG per picture into a new folder, numbered where names repeat.

    Raises ValueError: the folder exists, or no picture can be read.
    """
    folder = unused(args.out, args.run / "translated")
    paths, skipped = folders.picture_paths(args.images)
    pictures = image_pairs.pictures(paths, size=size, channels=channels)
    understood(print, {"pictures to translate": len(pictures.paths), "skipped": [*skipped, *pictures.skipped]})
    folder.mkdir(parents=True)
    images = rgb(translated(net, values, cfg, signed(pictures.images)))
    for path, image in zip(pictures.paths, images, strict=True):
        file = unused(None, folder / f"{path.stem}.png")
        gan_plots.save(file, gan_plots.tile(image[None], 1, gap=0))
        print(shown(file))
    print(f"files in {shown(folder)}/")
