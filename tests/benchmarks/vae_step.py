"""A VAE on MNIST, of the sizes, optimizer and batches of PyTorch's own example: how well and how fast it learns.

    FUNCTREE_DATA=FOLDER python tests/benchmarks/vae_step.py [--epochs 10] [--tensors]

784-400-20-400-784, Adam with 0.001, batches of 128, Bernoulli pixels. The other side is that model as an nn.Module with
the example's loop: DataLoader, backward, Adam. Its images come as the example's do, each an array that becomes a PIL
image that becomes a tensor (what torchvision's MNIST with ToTensor does); with --tensors from tensors, which is faster.
Epochs of both sides alternate, so that drift of the machine meets both; ours leave out the last, smaller batch. Printed
after each: minus the ELBO of the test images in nats, by one draw of each code, and the seconds of training so far;
functree's with compilation, and without what the first step took longer than the second. The targets: a loss that is
no higher, in at most half of the time.
"""

import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from core import random, tree
from nets.generative import autoencoder
from train import optimizers
from train.data import batching
from train.data.images import arrays
from train.losses import variational
from train.step import create, make_step

BATCH, RATE = 128, 1e-3
CFG = autoencoder.PRESETS["mnist"]


class Module(nn.Module):
    """The same model, in torch.nn."""

    def __init__(self):
        super().__init__()
        self.hidden, self.mean, self.log_variance = nn.Linear(784, 400), nn.Linear(400, 20), nn.Linear(400, 20)
        self.back, self.output = nn.Linear(20, 400), nn.Linear(400, 784)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels' probabilities, mean and log variance of (batch, 784)."""
        h = F.relu(self.hidden(x))
        mean, log_variance = self.mean(h), self.log_variance(h)
        z = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        return torch.sigmoid(self.output(F.relu(self.back(z)))), mean, log_variance


def module_loss(model: nn.Module, x: Tensor) -> Tensor:
    """Minus the ELBO, summed over a batch (N, 1, 28, 28)."""
    x = x.flatten(1)
    p, mean, log_variance = model(x)
    divergence = 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).sum()
    return F.binary_cross_entropy(p, x, reduction="sum") + divergence


class Pictures(Dataset):
    """Each a PIL image, made anew into a tensor."""

    def __init__(self, grey: Tensor):
        self.grey = grey

    def __len__(self) -> int:
        return len(self.grey)

    def __getitem__(self, i: int) -> tuple[Tensor]:
        picture = Image.fromarray(self.grey[i].numpy())
        pixels = torch.from_numpy(np.array(picture, np.uint8, copy=True))
        return (pixels.view(*picture.size[::-1], 1).permute(2, 0, 1).contiguous().to(torch.float32).div(255),)


class Theirs:
    def __init__(self, train: Dataset, test: Tensor, seed: int):
        torch.manual_seed(seed)
        self.model = Module()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=RATE)
        self.train = DataLoader(train, BATCH, shuffle=True)
        self.test = DataLoader(TensorDataset(test), BATCH)
        self.seconds = 0.0

    def epoch(self) -> None:
        start = time.perf_counter()
        self.model.train()
        for (x,) in self.train:
            self.optimizer.zero_grad()
            loss = module_loss(self.model, x)
            loss.backward()
            loss.item()  # summed up, as the example does
            self.optimizer.step()
        self.seconds += time.perf_counter() - start

    @torch.no_grad()
    def test_loss(self) -> float:
        self.model.eval()
        return sum(float(module_loss(self.model, x)) for (x,) in self.test) / len(self.test.dataset)


def negative_elbo(params: tree.Tree, x: Tensor, keys: Tensor) -> Tensor:
    """(N,)"""
    q = autoencoder.encode(params, x, CFG)
    output = autoencoder.decode(params, autoencoder.draw(q, keys), CFG)
    return -variational.elbo(variational.bernoulli_log_likelihood(output, x), variational.kl_divergence(*q))


class Ours:
    def __init__(self, train: Tensor, test: Tensor, seed: int):
        self.data, self.test = train, test
        self.key, optimizer = random.key(seed), optimizers.adam(RATE)
        self.state = create(self.key, autoencoder.spec(CFG), optimizer)
        self.order_key = random.fold_in(self.key, 2)

        def loss(params: tree.Tree, x: Tensor, keys: Tensor) -> Tensor:
            return negative_elbo(params, x, keys).mean()

        self.step = make_step(loss, optimizer, donate=True, update_norm=False)
        self.done, self.seconds, self.compiling = 0, 0.0, 0.0

    def epoch(self) -> None:
        start = before = time.perf_counter()
        first = []
        for _ in range(len(self.data) // BATCH):
            rows = batching.epoch_batch(self.order_key, self.done, len(self.data), BATCH)
            self.state, metrics = self.step(self.state, self.data[rows])
            metrics["loss"].item()
            self.done += 1
            if self.done <= 2:
                first.append(-before + (before := time.perf_counter()))
        if len(first) == 2:
            self.compiling = first[0] - first[1]
        self.seconds += time.perf_counter() - start

    @torch.no_grad()
    def test_loss(self) -> float:
        keys, total = random.sites(random.fold_in(self.key, 3), len(self.test)), 0.0
        for part in batching.evaluation_batches(len(self.test), 500):
            total += float(negative_elbo(self.state.params, self.test[part], keys[part]).sum())
        return total / len(self.test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--images", type=int, help="learn from so many only, to see whether it runs")
    parser.add_argument("--tensors", action="store_true", help="the other side's images are tensors from the start")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    folder = Path(os.environ.get("FUNCTREE_DATA", "")) / "mnist"
    train, test = (
        part.images.float() / (1 if part.images.is_floating_point() else 255) for part in arrays.mnist(folder)
    )
    train = train[: args.images]
    pictures = TensorDataset(train) if args.tensors else Pictures((train[:, 0] * 255).round().byte())
    ours, theirs = Ours(train, test, args.seed), Theirs(pictures, test, args.seed)
    print(f"{len(train)} images, {torch.get_num_threads()} threads; test loss in nats, seconds of training so far")
    print(f"{'epoch':>5}  {'functree':>8} {'s':>7} {'s without compiling':>20}   {'nn.Module':>9} {'s':>7}")
    for epoch in range(1, args.epochs + 1):
        for side in (ours, theirs) if epoch % 2 else (theirs, ours):
            side.epoch()
        losses = ours.test_loss(), theirs.test_loss()
        without = ours.seconds - ours.compiling
        print(
            f"{epoch:5}  {losses[0]:8.3f} {ours.seconds:7.1f} {without:20.1f}   {losses[1]:9.3f} {theirs.seconds:7.1f}",
            flush=True,
        )
    better = losses[0] <= losses[1]
    print(f"loss: {losses[0]:.3f} against {losses[1]:.3f} (at most that: {'reached' if better else 'missed'})")
    for name, seconds in (("with compilation", ours.seconds), ("without", without)):
        ratio = seconds / theirs.seconds
        print(f"time {name}: {ratio:.3f} of theirs (at most 0.5: {'reached' if ratio <= 0.5 else 'missed'})")


if __name__ == "__main__":
    main()
