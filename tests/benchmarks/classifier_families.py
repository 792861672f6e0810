"""Every family of nets.classifiers on coloured pictures, each from scratch for five minutes: accuracy and time.

Each row is a run of experiments/classify.py with one thread and as many epochs as take about five minutes. By default
the CIFAR-10 JPEGs of FUNCTREE_DATA: 15,000 to learn from, 10,000 to test on. Logistic regression of the same pixels,
scikit-learn's, stands beside them.

    python tests/benchmarks/classifier_families.py [--data FOLDER.zip] [--nets resnet18 vgg11_bn]
    python tests/benchmarks/classifier_families.py --runs FOLDER --write

--write puts table and picture into experiments/CLASSIFIERS.md. --runs keeps the runs, and makes only those that are not
there yet.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

ROOT = Path(__file__).parents[2]
PAGE, PICTURE = ROOT / "experiments" / "CLASSIFIERS.md", ROOT / "experiments" / "gallery" / "classifiers.png"
BEGIN, END = "<!-- classifier_families.py begins -->", "<!-- classifier_families.py ends -->"
# Preset: (pixels per side, epochs, flags). Nets that halve five times see the pictures enlarged. VGG, with
# most weights in hidden layers, learns by SGD, whose update of these is cheaper.
NETS = {
    "mnist": (32, 16, "--learning-rate 0.001"),
    "lenet5-relu": (32, 14, "--learning-rate 0.001"),
    "alexnet": (64, 0.85, "--learning-rate 0.0002"),
    "vgg11_bn": (32, 0.4, "--optimizer sgd --weight-decay 0.0005 --learning-rate 0.02"),
    "googlenet": (32, 1.3, "--learning-rate 0.002"),
    "inception_v3": (75, 0.44, "--learning-rate 0.002"),
    "cifar-resnet8": (32, 5.7, "--learning-rate 0.003"),
    "cifar-resnet20": (32, 2.5, "--learning-rate 0.003"),
    "resnet18": (32, 1.9, "--learning-rate 0.002"),
    "densenet121": (32, 0.65, "--learning-rate 0.002"),
    "squeezenet1_1": (64, 3, "--learning-rate 0.0005"),
    "mobilenet_v1": (64, 1, "--learning-rate 0.002"),
    "mobilenet_v2": (64, 1, "--learning-rate 0.002"),
    "mobilenet_v3_small": (64, 2.2, "--learning-rate 0.003"),
    "vit_ti_16": (64, 1.7, "--learning-rate 0.001"),
    "convnext_tiny": (32, 0.9, "--learning-rate 0.001"),
}
COMMON = "--least-area 0.5 --optimizer adamw --weight-decay 0.05 --no-compile --eval-every 1000000"


def flags_of(net: str) -> str:
    size, epochs, others = NETS[net]
    return f"--net {net} --size {size} {others} --epochs {epochs}"


def run(data: Path, net: str, batch: int, place: Path) -> dict[str, Any]:
    """result.json of a run, with the seconds of its training, and `flags`; a run that has one is not made again."""
    result = place / "runs" / "classify" / net / "result.json"
    if not result.exists():
        words = [*f"{COMMON} --batch {batch} {flags_of(net)}".split(), "--data", data, "--name", net]
        command = [sys.executable, ROOT / "experiments" / "classify.py", *words]
        one = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=place, env=os.environ | one, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
    figures = json.loads(result.read_text())
    learned = figures["steps"] * batch / figures["images_per_second"]
    return figures | {"seconds": learned, "flags": f"`{flags_of(net)}`"}


def pictures(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """((count, pixels) in [0, 1], class names (count,)) of the class folders."""
    paths = sorted(folder.glob("*/*"))
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB").resize((32, 32))).ravel() for path in paths])
    return pixels.astype(np.float32) / 255, np.array([path.parent.name for path in paths])


def logistic_regression(folder: Path) -> dict[str, float]:
    """The figures of scikit-learn's, its penalty among three chosen on every fifth picture that is learnt."""
    from sklearn.linear_model import LogisticRegression

    (x, y), (test_x, test_y) = pictures(folder / "train"), pictures(folder / "test")
    began, mean, held = time.perf_counter(), x.mean(0), np.arange(len(y)) % 5 == 0

    def net(strength: float) -> LogisticRegression:
        return LogisticRegression(C=strength, max_iter=200)

    def score(strength: float) -> float:
        return net(strength).fit(x[~held] - mean, y[~held]).score(x[held] - mean, y[held])

    fit = net(max((1e-4, 1e-3, 1e-2), key=score)).fit(x - mean, y)
    size = fit.coef_.size + fit.intercept_.size
    return {"accuracy": fit.score(test_x - mean, test_y), "seconds": time.perf_counter() - began, "parameters": size}


def draw(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Bars of the accuracies, the best on top."""
    names = sorted(rows, key=lambda name: rows[name]["accuracy"])
    figure = Figure(figsize=(7, 0.32 * len(names) + 0.9), layout="constrained")
    axes = figure.subplots()
    colours = ["tab:blue" if "flags" in rows[name] else "tab:gray" for name in names]
    bars = axes.barh(names, [100 * rows[name]["accuracy"] for name in names], color=colours)
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.axvline(10, color="black", linestyle=":", linewidth=1)
    axes.set(xlabel="test pictures right, in percent (dotted: by chance)", xlim=(0, 100))
    figure.savefig(path, dpi=110)


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = ["| net | parameters | right | time | flags beside those above |", "| --- | --- | --- | --- | --- |"]
    for name, row in rows.items():
        cells = name, f"{row['parameters']:,}", f"{row['accuracy']:.1%}".replace("%", " %"), f"{row['seconds']:.0f} s"
        lines.append(f"| {' | '.join(cells)} | {row.get('flags', 'scikit-learn')} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = Path(os.environ.get("FUNCTREE_DATA", "")) / "cifar10_jpeg" / "cifar10_jpeg_15k_train_10k_test.zip"
    parser.add_argument("--data", type=Path, default=data)
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    if args.write and args.nets != list(NETS):
        parser.error("--write needs all nets")
    with tempfile.TemporaryDirectory() as place:
        place = (args.runs or Path(place)).resolve()
        data = place / "data"
        if not data.exists():
            with zipfile.ZipFile(args.data) as archive:
                archive.extractall(data)
        rows = {}
        for net in args.nets:
            rows[net] = run(data, net, args.batch, place)
            print(table({net: rows[net]}).splitlines()[-1], flush=True)
        rows["logistic regression"] = logistic_regression(data)
        print(table(rows))
    if args.write:
        before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        after = rest.split(END)[1]
        PAGE.write_text(f"{before}{BEGIN}\n\n{table(rows)}\n\n{END}{after}", encoding="utf-8")
        draw(rows, PICTURE)


if __name__ == "__main__":
    main()
