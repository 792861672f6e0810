"""The short generative models against the full ones: nets, losses, gradients, training, sampling; noise handed in."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from core import random, spec, transforms, tree
from nets.explained import ddpm, gan, vae
from nets.explained import unet as plain_unet
from nets.generative import autoencoder, mlp_gan, unet
from tests.experiments.runs import ENVIRONMENT
from train import optimizers
from train.adversarial import game as games
from train.adversarial import step as adversarial
from train.diffusion import process, samplers, schedules
from train.diffusion.losses import diffusion_loss
from train.losses import variational
from train.metrics.generative import frechet_distance
from train.optimizers.schedules import linear
from train.step import make_step, start

DOUBLE, STEPS, BATCH = torch.float64, 3, 6
FOLDER = Path(vae.__file__).parent
AUTOENCODER = autoencoder.Config((1, 8, 8), latent=3, widths=(20,))
PLAYERS = mlp_gan.Config((1, 8, 8), latent=5, generator_widths=(16, 24), critic_widths=(24, 16), norm="none")
UNET = unet.Config(1, (16, 24), blocks=1, attention=(), groups=8)


def close(a, b, atol=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def values(model, seed=0):
    """Parameters in double precision, none of them 0."""
    params = tree.map(lambda leaf: leaf.to(DOUBLE), spec.init(random.key(seed), model))
    keys = random.split(random.key(seed + 1), len(tree.leaves(params))).unbind(0)
    noise = [random.normal(key, leaf.shape, DOUBLE) for key, leaf in zip(keys, tree.leaves(params), strict=True)]
    return tree.map(lambda leaf, x: leaf + 0.05 * x, params, tree.unflatten(tree.structure(params), noise))


def pixels(count=BATCH, seed=5):
    return random.uniform(random.key(seed), (count, 1, 8, 8), DOUBLE)


def handed_in(monkeypatch, indices, normals):
    """torch.randint and torch.randn give these, one after the other."""
    indices, normals = iter(indices), iter(normals)
    monkeypatch.setattr(torch, "randint", lambda *args, **options: next(indices))
    monkeypatch.setattr(torch, "randn", lambda *args, **options: next(normals))


def negative_elbo(params, batch, keys=None):
    x, noise = batch
    q = autoencoder.encode(params, x, AUTOENCODER)
    z = q.mean + torch.exp(0.5 * q.log_variance) * noise
    likelihood = variational.bernoulli_log_likelihood(autoencoder.decode(params, z, AUTOENCODER), x)
    return -variational.elbo(likelihood, variational.kl_divergence(*q))


def test_vae_loss_and_gradient():
    params, x, key = values(autoencoder.spec(AUTOENCODER)), pixels(), random.key(7)
    noise = random.normal(key, (BATCH, 3), DOUBLE)
    out = autoencoder.apply(params, x, AUTOENCODER, key=key, train=True)
    kl = variational.kl_divergence(out["mean"], out["log_variance"])
    expected = variational.elbo(variational.bernoulli_log_likelihood(out["output"], x), kl)
    close(vae.elbo(params, x.flatten(1), noise), expected)
    gradient = transforms.grad(lambda p: vae.elbo(p, x.flatten(1), noise).mean())(params)
    tree.map(close, gradient, transforms.grad(lambda p: -negative_elbo(p, (x, noise)).mean())(params))
    z = random.normal(random.key(8), (BATCH, 3), DOUBLE)
    close(vae.sample(params, z), autoencoder.decode(params, z, AUTOENCODER).sigmoid().flatten(1))


def test_vae_training(monkeypatch):
    model, images = autoencoder.spec(AUTOENCODER), pixels(20)
    indices = [random.randint(random.key(i), (BATCH,), 0, 20).long() for i in range(STEPS)]
    noise = [random.normal(random.key(i), (BATCH, 3), DOUBLE) for i in range(STEPS)]
    optimizer = optimizers.adam(1e-3)
    step, state = (
        make_step(negative_elbo, optimizer, compile=False),
        start(random.key(0), values(model), model, optimizer),
    )
    for i, e in zip(indices, noise, strict=True):
        state, _ = step(state, (images[i], e))
    handed_in(monkeypatch, indices, noise)
    params = values(model)
    vae.train(params, images.flatten(1), STEPS, None, 3)
    tree.map(lambda a, b: close(a.detach(), b, 1e-8), params, state.params)


def adversarial_losses():
    def generate(params, latents, labels, key):
        return mlp_gan.generator(params, latents.z, PLAYERS, train=True)

    def outputs(params, x, labels, key):
        return mlp_gan.critic_outputs(params, x, PLAYERS, train=True)

    return games.losses(games.Game("non-saturating"), 5, generate, outputs)


def latents(key, draws):
    """The noise that a loss of `adversarial_losses` draws from its key."""
    return games.latents(games.Game(), random.sites(key, draws)[0], BATCH, 5).z.to(DOUBLE)


def test_gan_losses_and_gradients():
    critic, generator = values(mlp_gan.critic_spec(PLAYERS)), values(mlp_gan.generator_spec(PLAYERS), 1)
    batch, key = (2 * pixels() - 1, None), random.key(9)
    full = adversarial_losses()
    close(gan.generator(generator, latents(key, 5)), mlp_gan.generator(generator, latents(key, 5), PLAYERS).flatten(1))
    close(gan.critic(critic, batch[0].flatten(1)), mlp_gan.critic(critic, batch[0], PLAYERS))
    plain = (
        lambda own: gan.critic_loss(own, generator, batch[0].flatten(1), latents(key, 5)),
        lambda own: gan.generator_loss(critic, own, latents(key, 4)),
    )
    for ours, theirs, own, other in zip(plain, full, (critic, generator), (generator, critic), strict=True):
        value, gradient = transforms.value_and_grad(ours)(own)
        (wanted, _), expected = transforms.value_and_grad(
            lambda p, loss=theirs, other=other: loss(p, other, batch, key, {}), has_aux=True
        )(own)
        close(value, wanted)
        tree.map(close, gradient, expected)


def test_gan_training(monkeypatch):
    models, images = (mlp_gan.critic_spec(PLAYERS), mlp_gan.generator_spec(PLAYERS)), 2 * pixels(20) - 1
    optimizer = optimizers.adam(1e-3, 0.5)
    step = adversarial.make_step(*adversarial_losses(), optimizer, optimizer, compile=False)
    state = adversarial.State(*(start(random.key(i), values(m, i), m, optimizer) for i, m in enumerate(models)), {})
    indices = [random.randint(random.key(i), (BATCH,), 0, 20).long() for i in range(STEPS)]
    noise = []
    for i, index in enumerate(indices):
        noise += [latents(random.fold_in(player.key, i), n) for player, n in ((state.critic, 5), (state.generator, 4))]
        state, _ = step(state, (images[index][None], torch.zeros(1, BATCH)))
    handed_in(monkeypatch, indices, noise)
    players = [tree.map(lambda leaf: leaf.requires_grad_(), values(m, i)) for i, m in enumerate(models)]
    gan.train(players, images.flatten(1), STEPS, None, 5)
    for player, expected in zip(players, (state.critic, state.generator), strict=True):
        tree.map(lambda a, b: close(a.detach(), b, 1e-8), player, expected.params)


def model(params):
    return lambda x, time: unet.apply(params, x, time, UNET)


def plain_model(params):
    return lambda x, time: plain_unet.unet(params, x, time)


def test_unet():
    params, x, time = values(unet.spec(UNET)), pixels(), torch.tensor([0, 1, 5, 40, 98, 99])
    # The embedding of the time is in single precision in both.
    close(plain_model(params)(x, time), model(params)(x, time), 1e-6)
    wide = unet.Config(1, (16, 24, 40), blocks=1, attention=(), groups=8)  # the loops take three sizes too
    params = values(unet.spec(wide))
    close(plain_model(params)(x, time), unet.apply(params, x, time, wide), 1e-6)


@pytest.mark.parametrize("steps", [50, 1000])
def test_ddpm_forward_process(steps):
    schedule, image = schedules.linear(steps), 2 * pixels() - 1
    close(ddpm.schedule(steps), schedule.alpha_bars)
    time = random.randint(random.key(1), (BATCH,), 0, steps).long()
    noise = random.normal(random.key(2), image.shape, DOUBLE)
    close(ddpm.diffuse(ddpm.schedule(steps), image, time, noise), process.diffuse(schedule, image, time, noise))


def test_ddpm_loss_and_gradient():
    schedule, image, params = schedules.linear(50), 2 * pixels() - 1, values(unet.spec(UNET))
    time = random.randint(random.key(1), (BATCH,), 0, 50).long()
    noise = random.normal(random.key(2), image.shape, DOUBLE)

    def full(params):
        return diffusion_loss(model(params), schedule, image, time=time, noise=noise)

    def plain(params):
        return ddpm.loss(model(params), ddpm.schedule(50), image, time, noise)

    close(plain(params), full(params))
    close(ddpm.loss(plain_model(params), ddpm.schedule(50), image, time, noise), full(params), 1e-6)
    tree.map(close, *(transforms.grad(lambda p, f=f: f(p).mean())(params) for f in (plain, full)))


def test_ddpm_sampler():
    """The same images from the same noise; predictions of different noise are clipped in places."""
    params, schedule = values(unet.spec(UNET)), schedules.linear(25)
    x, noises = (
        random.normal(random.key(3), (4, 1, 8, 8), DOUBLE),
        random.normal(random.key(4), (25, 4, 1, 8, 8), DOUBLE),
    )
    sampler = samplers.ddpm(schedule)
    predictions = []
    expected = samplers.sample(
        sampler, model(params), x, noise=list(noises), callback=lambda *row: predictions.append(row[2])
    )
    assert any((image.abs() == 1).any() for image in predictions)
    close(ddpm.sample(model(params), ddpm.schedule(25), x, noises), expected, 1e-10)


def test_ddpm_training(monkeypatch):
    schedule, images = schedules.linear(50), 2 * pixels(20) - 1
    indices = [random.randint(random.key(i), (BATCH,), 0, (20, 50)[i % 2]).long() for i in range(2 * STEPS)]
    noise = [random.normal(random.key(i), (BATCH, 1, 8, 8), DOUBLE) for i in range(STEPS)]

    def full(params, batch, keys=None):
        image, time, e = batch
        return diffusion_loss(model(params), schedule, image, time=time, noise=e)

    optimizer = optimizers.adam(linear(3e-3, 0.0, STEPS))
    step = make_step(full, optimizer, compile=False)
    state = start(random.key(0), values(unet.spec(UNET)), unet.spec(UNET), optimizer)
    for index, time, e in zip(indices[::2], indices[1::2], noise, strict=True):
        state, _ = step(state, (images[index], time, e))
    handed_in(monkeypatch, indices, noise)
    params = tree.map(lambda leaf: leaf.requires_grad_(), values(unet.spec(UNET)))
    ddpm.train(params, ddpm.schedule(50), images, STEPS, None)
    tree.map(lambda a, b: close(a.detach(), b, 1e-5), params, state.params)


def test_starts():
    """First values have the names, shapes and spread of the full nets' ones."""
    rng = torch.Generator().manual_seed(0)
    critic, generator = gan.init(rng, 64, (16, 24), 5)
    rows = (
        (vae.init(rng, 64, 20, 3), autoencoder.spec(AUTOENCODER)),
        (critic, mlp_gan.critic_spec(PLAYERS)),
        (generator, mlp_gan.generator_spec(PLAYERS)),
        (plain_unet.init(rng, 16, 24), unet.spec(UNET)),
    )
    for params, full in rows:
        spec.check(full, params)
        expected, params = spec.init(random.key(0), full), tree.map(torch.Tensor.detach, params)
        for name, a, b in zip(tree.names(params), tree.leaves(params), tree.leaves(expected), strict=True):
            assert bool(a.any()) == bool(b.any()), name
            if a.numel() > 250 and b.any():
                assert 0.8 < float(a.std() / b.std()) < 1.25, name


@pytest.mark.parametrize("module", [gan, ddpm])
def test_frechet_distance(module):
    a, b = random.normal(random.key(0), (50, 6), DOUBLE), random.uniform(random.key(1), (40, 6), DOUBLE)
    close(module.frechet(a, b), frechet_distance(a, b), 1e-9)


@pytest.mark.parametrize("name", ["vae", "gan", "unet", "ddpm"])
def test_files_are_as_short_as_they_say_and_import_torch_alone(name):
    source = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 100
    imports = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in ast.parse(source).body
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    assert imports - sys.stdlib_module_names <= ({"torch", "nets"} if name == "ddpm" else {"torch"})


@pytest.mark.long  # the tutorials of the three run the same code in CI
@pytest.mark.parametrize("name", ["vae", "gan", "ddpm"])
def test_scripts_learn_digits(name, tmp_path):
    """The ELBO is above the mean image's; the Fréchet distance below a quarter of that of images of noise."""
    command = [sys.executable, "-W", "error", str(FOLDER / f"{name}.py")]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    figure, reference = map(float, re.findall(r": (-?\d+\.\d+)", done.stdout))
    with Image.open(tmp_path / "runs" / f"{name}.png") as picture:
        assert picture.size == (80, 80)
    if name == "vae":
        assert figure > reference + 1
    else:
        images = torch.tensor(load_digits().data / 8 - 1)
        noise = random.uniform(random.key(0), images.shape, DOUBLE, minval=-1.0, maxval=1.0)
        assert reference < figure < 0.25 * float(frechet_distance(images, noise))
