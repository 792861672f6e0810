"""Training batches from class folders of photographs: `image_files.Decoder` beside torch's DataLoader with Pillow.

Both read the same JPEGs in the same number of processes, cut a random rectangle, scale it to 224x224 (bilinear), mirror
half of them, and give normalised float32 batches and labels. A round of each is an epoch; starting the workers is not
counted. The plain data set does in its workers, one picture after the other, what is usual; ours cuts and scales there,
and mirrors and normalises whole batches in the process that trains.

    python tests/benchmarks/image_pipeline.py [--data FOLDER.zip] [--rounds 7] [--workers 2] [--batch 64] [--enlarge 4]

The zip file holds class folders of pictures, by default the photographs of clothes of FUNCTREE_DATA (400x533 pixels).
`--enlarge` first scales them up, to the size of a camera's.
"""

import argparse
import os
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timing import interleaved, report
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from core import random
from train.data.images import augment
from train.data.images.files import Decoder, Files, listing

SIZE, SCALE, RATIO = 224, (0.08, 1.0), (3 / 4, 4 / 3)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Pictures(Dataset):
    """As a training script has it that uses Pillow and torch alone."""

    def __init__(self, files: Files):
        self.paths, self.labels = [str(path) for path in files.paths], files.labels.tolist()
        self.mean, self.std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = Image.open(self.paths[index]).convert("RGB")
        image = image.crop(self.rectangle(*image.size)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        if torch.rand(()) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return (pixels.to(torch.float32).div_(255) - self.mean) / self.std, self.labels[index]

    @staticmethod
    def rectangle(width: int, height: int) -> tuple[int, int, int, int]:
        for _ in range(10):
            area = width * height * float(torch.empty(1).uniform_(*SCALE))
            ratio = float(torch.empty(1).uniform_(*np.log(RATIO)).exp())
            wide, tall = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
            if 0 < wide <= width and 0 < tall <= height:
                left, top = (int(torch.randint(room + 1, ())) for room in (width - wide, height - tall))
                return left, top, left + wide, top + tall
        return 0, 0, width, height


def ours(decoder: Decoder, files: Files, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    scale = torch.tensor(STD)[:, None, None].mul(255)
    shift = torch.tensor(MEAN)[:, None, None].mul(255) / scale
    key, mirror = random.sites(random.key(0), 2)
    steps = range(len(files.paths) // batch)
    for step, (images, labels) in zip(steps, decoder.train_batches(files, key, steps, batch, SIZE), strict=True):
        images = augment.flip(random.sites(random.fold_in(mirror, step), batch), images)
        yield images.to(torch.float32).div_(scale).sub_(shift), labels


def unpacked(archive: Path, folder: Path, enlarge: int) -> Files:
    """The pictures of the first folder of class folders in a zip file, or in the zip file itself."""
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(folder)
    parts = [p for p in sorted(folder.iterdir()) if any(child.is_dir() for child in p.iterdir())]
    files = listing(parts[0] if parts else folder)
    for path in files.paths if enlarge > 1 else ():
        with Image.open(path) as image:
            larger = image.convert("RGB").resize([x * enlarge for x in image.size], Image.Resampling.BICUBIC)
        larger.save(path, quality=90)
    return files


def epoch(batches: Callable[[], Iterator[tuple[Tensor, Tensor]]]) -> Callable[[], None]:
    def run() -> None:
        for images, labels in batches():
            assert images.shape == (len(labels), 3, SIZE, SIZE) and images.dtype == torch.float32

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--enlarge", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    # torch forks its workers and says that this is not safe.
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    if args.data is None and "FUNCTREE_DATA" not in os.environ:
        parser.error("give --data, or set FUNCTREE_DATA")
    archive = args.data or Path(os.environ["FUNCTREE_DATA"], "clothing_small", "clothing_small_val_test.zip")
    with tempfile.TemporaryDirectory() as folder, Decoder(args.workers) as decoder:
        files = unpacked(archive, Path(folder), args.enlarge)
        with Image.open(files.paths[0]) as image:
            width, height = image.size
        loader = DataLoader(
            Pictures(files),
            args.batch,
            shuffle=True,
            drop_last=True,
            num_workers=args.workers,
            persistent_workers=args.workers > 0,
        )
        contestants = {
            "functree": lambda: ours(decoder, files, args.batch),
            "DataLoader and Pillow": lambda: iter(loader),
        }
        medians = interleaved({name: epoch(run) for name, run in contestants.items()}, args.rounds, warmup=1)
        if decoder.skipped:
            print(f"{len(decoder.skipped)} files could not be read")
    count = len(files.paths) // args.batch * args.batch
    title = f"{count} JPEGs like {width}x{height} at {SIZE}, batches of {args.batch}, {args.workers} workers, an epoch:"
    report(title, medians, "functree", {"DataLoader and Pillow": 1.0})
    print("  images/s: " + ", ".join(f"{name} {count / seconds:.0f}" for name, seconds in medians.items()))


if __name__ == "__main__":
    main()
