"""The variational autoencoder in 100 lines, with torch and nothing else: equal to `nets.generative.autoencoder`.

Kingma and Welling 2014, "Auto-Encoding Variational Bayes" (arXiv:1312.6114); sections and equations are its. n images
of d pixels in [0, 1], codes of `latent` numbers. Full losses: `train.losses.variational`; run: `experiments/vae.py`.

`python nets/explained/vae.py` learns digits of 8 x 8 pixels in half a minute and draws new ones into runs/vae.png.
"""

from pathlib import Path

import torch
from torch.nn.functional import pad, softplus


def mlp(layers, output, x):
    """Linear layers with a ReLU between them."""
    for p in layers:
        x = (x @ p["weight"].T + p["bias"]).relu()  # h = max(0, W x + b)
    return x @ output["weight"].T + output["bias"]


def encode(p, x):
    """q(z | x) = N(mean, variance), as mean and log variance: (n, d) -> (n, latent) each (appendix C.2)."""
    return mlp(p["layers"], p["code"], x).chunk(2, -1)


def draw(mean, log_variance, noise):
    """z = mean + std ε, ε ~ N(0, I): a sample of q with a gradient by mean and variance (section 2.4)."""
    return mean + torch.exp(0.5 * log_variance) * noise


def decode(p, z):
    """p(x | z), the logit of a Bernoulli per pixel: (n, latent) -> (n, d) (appendix C.1)."""
    return mlp(p["layers"], p["output"], z)


def log_likelihood(logits, x):
    """log p(x | z) = Σ x log p + (1 - x) log(1 - p), p = sigmoid(logits): (n, d) -> (n,) (equation 11)."""
    return (x * logits - softplus(logits)).sum(1)  # log(1 - p) = -softplus(logits), log p = logits + log(1 - p)


def divergence(mean, log_variance):
    """KL(q(z | x) || N(0, I)) = Σ (mean² + variance - log variance - 1) / 2: (n, latent) -> (n,) (appendix B)."""
    return 0.5 * (mean**2 + log_variance.exp() - log_variance - 1).sum(1)


def elbo(params, x, noise):
    """log p(x) >= E_q[log p(x | z)] - KL(q(z | x) || p(z)), by one z per image: (n,) (equation 3)."""
    mean, log_variance = encode(params["encoder"], x)
    logits = decode(params["decoder"], draw(mean, log_variance, noise))
    return log_likelihood(logits, x) - divergence(mean, log_variance)


def init(rng, d, hidden, latent):
    """Weights and biases uniform between -1 / sqrt(inputs) and 1 / sqrt(inputs)."""

    def layer(d_in, d_out):
        weight, bias = torch.rand(d_out, d_in, generator=rng), torch.rand(d_out, generator=rng)
        return {"weight": (2 * weight - 1) / d_in**0.5, "bias": (2 * bias - 1) / d_in**0.5}

    encoder = {"layers": [layer(d, hidden)], "code": layer(hidden, 2 * latent)}  # the code: means, then log variances
    return {"encoder": encoder, "decoder": {"layers": [layer(latent, hidden)], "output": layer(hidden, d)}}


def leaves(tree):
    """The tensors of nested dicts and lists."""
    parts = tree.values() if isinstance(tree, dict) else tree
    return [tree] if isinstance(tree, torch.Tensor) else [leaf for part in parts for leaf in leaves(part)]


def train(params, images, steps, rng, latent, batch=128, rate=1e-3):
    """Ascends the mean bound of random batches by Adam, in place (algorithm 1)."""
    optimizer = torch.optim.Adam([leaf.requires_grad_() for leaf in leaves(params)], rate)
    for _ in range(steps):
        x = images[torch.randint(len(images), (batch,), generator=rng)]  # (batch, d)
        loss = -elbo(params, x, torch.randn(batch, latent, generator=rng)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def sample(params, z):
    """Probabilities of the pixels of new images, z ~ N(0, I): (n, latent) -> (n, d)."""
    return decode(params["decoder"], z).sigmoid().detach()


if __name__ == "__main__":
    from matplotlib.pyplot import imsave
    from sklearn.datasets import load_digits

    rng = torch.Generator().manual_seed(0)
    images = torch.tensor(load_digits().data / 16, dtype=torch.float32)  # (1797, 64)
    params, held_out = init(rng, 64, 256, 8), images[1500:]
    train(params, images[:1500], 2000, rng, 8)
    bound = elbo(params, held_out, torch.randn(297, 8, generator=rng)).mean()
    mean_image = log_likelihood(images[:1500].mean(0).logit(1e-4).expand(297, 64), held_out).mean()
    print(f"unseen digits: {bound:.2f} nats; the mean image: {mean_image:.2f}")
    Path("runs").mkdir(exist_ok=True)
    new = pad(sample(params, torch.randn(64, 8, generator=rng)).view(8, 8, 8, 8), (1, 1, 1, 1))
    imsave("runs/vae.png", new.transpose(1, 2).reshape(80, 80).numpy(), cmap="gray_r")
