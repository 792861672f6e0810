"""The generative adversarial net in 100 lines, with torch and nothing else: equal to `nets.generative.mlp_gan`.

Goodfellow et al. 2014, "Generative Adversarial Nets" (arXiv:1406.2661); sections and equations are its. n images of d
pixels in [-1, 1]. The full net may have a batch norm, classes and dropout; losses are in `train.adversarial`, thirteen
papers' in `experiments/gan.py`.

`python nets/explained/gan.py` learns digits of 8 x 8 pixels in half a minute and draws new ones into runs/gan.png.
"""

from pathlib import Path

import torch
from torch.nn.functional import leaky_relu, pad, softplus


def linear(p, x):
    """y = W x + b."""
    return x @ p["weight"].T + p["bias"]


def generator(params, z):
    """Images G(z) from noise: (n, latent) -> (n, d)."""
    for p in params["layers"]:
        z = leaky_relu(linear(p["linear"], z), 0.2)
    return linear(params["out"], z).tanh()


def critic(params, x):
    """Scores C(x), of which the probability that x is real is D(x) = sigmoid(C(x)): (n, d) -> (n,)."""
    for p in params["layers"]:
        x = leaky_relu(linear(p, x), 0.2)
    return linear(params["out"], x)[:, 0]


def critic_loss(critic_params, generator_params, real, z):
    """-log D(x) - log(1 - D(G(z))), which the critic descends (equation 1)."""
    fake = generator(generator_params, z).detach()
    # -log sigmoid(c) = softplus(-c) and -log(1 - sigmoid(c)) = softplus(c).
    return softplus(-critic(critic_params, real)).mean() + softplus(critic(critic_params, fake)).mean()


def generator_loss(critic_params, generator_params, z):
    """-log D(G(z)): unlike log(1 - D(G(z))), it has a gradient where the critic is sure (section 3)."""
    return softplus(-critic(critic_params, generator(generator_params, z))).mean()


def init(rng, d, hidden, latent):
    """Parameters of critic and generator, two hidden layers each; weights of variance 2 / inputs (He et al. 2015)."""

    def layer(d_in, d_out, gain=2.0):
        weight = (gain / d_in) ** 0.5 * torch.randn(d_out, d_in, generator=rng)
        return {"weight": weight.requires_grad_(), "bias": torch.zeros(d_out, requires_grad=True)}

    narrow, wide = hidden
    layers = [{"linear": layer(latent, narrow)}, {"linear": layer(narrow, wide)}]
    critic = {"layers": [layer(d, wide), layer(wide, narrow)], "out": layer(narrow, 1, gain=1.0)}
    return critic, {"layers": layers, "out": layer(wide, d, gain=1.0)}


def leaves(tree):
    """The tensors of nested dicts and lists."""
    parts = tree.values() if isinstance(tree, dict) else tree
    return [tree] if isinstance(tree, torch.Tensor) else [leaf for part in parts for leaf in leaves(part)]


def train(players, images, steps, rng, latent, batch=64, rate=1e-3):
    """A step of the critic, then one of the generator (algorithm 1, with Adam as in Radford et al. 2016), in place."""
    optimizers = [torch.optim.Adam(leaves(player), rate, betas=(0.5, 0.999)) for player in players]
    for _ in range(steps):
        real = images[torch.randint(len(images), (batch,), generator=rng)]  # (batch, d)
        for own, optimizer in enumerate(optimizers):
            z = torch.randn(batch, latent, generator=rng)
            loss = critic_loss(*players, real, z) if own == 0 else generator_loss(*players, z)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def frechet(a, b):
    """|μ - μ'|² + tr(S + S' - 2 (S S')^(1/2)) of two samples' means and covariances (Dowson and Landau 1982)."""
    (m, s), (n, t) = ((x.double().mean(0), x.double().T.cov()) for x in (a, b))
    return (m - n).square().sum() + (s + t).trace() - 2 * torch.linalg.eigvals(s @ t).real.clamp(min=0).sqrt().sum()


if __name__ == "__main__":
    from matplotlib.pyplot import imsave
    from sklearn.datasets import load_digits

    rng = torch.Generator().manual_seed(0)
    images = torch.tensor(load_digits().data / 8 - 1, dtype=torch.float32)  # (1797, 64)
    players = init(rng, 64, (128, 256), 64)
    train(players, images, 2000, rng, 64)
    new = generator(players[1], torch.randn(1797, 64, generator=rng)).detach()
    halves = frechet(images[::2], images[1::2])
    print(f"Fréchet distance of the pixels: {frechet(images, new):.2f}; of halves of the digits: {halves:.2f}")
    Path("runs").mkdir(exist_ok=True)
    grid = pad(new[:64].view(8, 8, 8, 8), (1, 1, 1, 1), value=-1.0).transpose(1, 2).reshape(80, 80)
    imsave("runs/gan.png", grid.numpy(), cmap="gray_r")
