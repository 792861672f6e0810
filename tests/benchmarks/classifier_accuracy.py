"""Accuracy of experiments/classify.py beside torchvision's module in a plain PyTorch loop: same recipe, same steps.

Both learn the class folders of a zip file, by default the CIFAR-10 JPEGs of FUNCTREE_DATA: random resized crops, flips,
SGD with Nesterov's momentum 0.9, warm-up over a twentieth of the steps and a cosine to 0, weight decay of matrices and
convolutions alone; tested on the middle of the test images. The plain loop has torchvision's net and transforms,
torch's DataLoader with as many workers, torch.compile and the fused optimizer. Initial values, order and crops are
their own, so figures of several seeds have to be compared.

    python tests/benchmarks/classifier_accuracy.py [--data FOLDER.zip] [--net resnet18] [--size 32] [--epochs 4]
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import torch
import torchvision_operators  # noqa: F401
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import datasets, models, transforms

SCRIPT = Path(__file__).parents[2] / "experiments" / "classify.py"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def functree(folder: Path, args: argparse.Namespace, seed: int) -> tuple[float, float]:
    """(accuracy, seconds) of the experiment."""
    flags = {"net": args.net, "size": args.size, "epochs": args.epochs, "batch": args.batch, "seed": seed}
    flags |= {"learning-rate": args.learning_rate, "weight-decay": args.weight_decay, "name": f"seed{seed}"}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    words += ["--data", str(folder), "--eval-every", str(10**9), "--workers", str(args.workers)]
    words += [] if args.compile else ["--no-compile"]
    subprocess.run([sys.executable, SCRIPT, *words], cwd=folder.parent, check=True, stdout=subprocess.DEVNULL)
    result = json.loads((folder.parent / "runs" / "classify" / f"seed{seed}" / "result.json").read_text())
    return result["accuracy"], result["seconds"]


def plain(folder: Path, args: argparse.Namespace, seed: int) -> tuple[float, float]:
    """The same of a plain loop."""
    torch.manual_seed(seed)
    normalise = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    crop = transforms.RandomResizedCrop(args.size)
    train = datasets.ImageFolder(
        folder / "train", transforms.Compose([crop, transforms.RandomHorizontalFlip(), *normalise])
    )
    resize = transforms.Resize(round(args.size * 256 / 224))
    test = datasets.ImageFolder(
        folder / "test", transforms.Compose([resize, transforms.CenterCrop(args.size), *normalise])
    )
    loader = DataLoader(train, args.batch, shuffle=True, drop_last=True, num_workers=args.workers)
    net = getattr(models, args.net)(num_classes=len(train.classes))
    weights = [p for p in net.parameters() if p.ndim >= 2]
    others = [p for p in net.parameters() if p.ndim < 2]
    groups = [{"params": weights, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, args.learning_rate, momentum=0.9, nesterov=True, fused=True)
    steps = round(args.epochs * len(loader))
    warm = round(0.05 * steps)

    def rate(step: int) -> float:
        return step / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    compiled = torch.compile(net, fullgraph=True, dynamic=False) if args.compile else net
    began, step = time.perf_counter(), 0
    while step < steps:
        for pixels, labels in loader:
            loss = F.cross_entropy(compiled(pixels), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            if step == steps:
                break
    seconds = time.perf_counter() - began
    net.eval()
    with torch.no_grad():
        right = sum(int((net(x).argmax(-1) == y).sum()) for x, y in DataLoader(test, 256, num_workers=args.workers))
    return right / len(test), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = Path(os.environ.get("FUNCTREE_DATA", "")) / "cifar10_jpeg" / "cifar10_jpeg_15k_train_10k_test.zip"
    parser.add_argument("--data", type=Path, default=data)
    parser.add_argument("--net", default="resnet18")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "data"
        with zipfile.ZipFile(args.data) as archive:
            archive.extractall(folder)
        if not (folder / "train").is_dir():  # the clothes have none: their validation images are learned
            (folder / "validation").rename(folder / "train")
        for seed in range(args.seeds):
            for name, run in (("functree", functree), ("torchvision, plain loop", plain)):
                accuracy, seconds = run(folder, args, seed)
                print(f"seed {seed}  {name:<24} {accuracy:7.2%} in {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
