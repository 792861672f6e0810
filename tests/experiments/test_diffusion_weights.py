"""experiments/diffusion.py sample --weights: samples of a folder that diffusers wrote are those of its pipeline."""

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from core import random
from experiments.parts import diffusion
from nets.generative import unet
from tests.experiments import runs
from tests.experiments.runs import flag_id, is_png
from tests.nets.parity import randomise
from train.diffusion import samplers

diffusers = pytest.importorskip("diffusers")
call, refused = (functools.partial(function, "diffusion") for function in (runs.call, runs.refused))
SIZES = {"sample_size": (8, 12), "in_channels": 2, "out_channels": 2, "block_out_channels": (8, 12)}
SIZES |= {"norm_num_groups": 4, "layers_per_block": 1, "attention_head_dim": 4}
SIZES |= {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}


def pipeline_of(scheduler="DDPMScheduler", net=(), **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = randomise(diffusers.UNet2DModel(**SIZES | dict(net))).eval()
    pipeline = diffusers.DDIMPipeline(module, diffusers.DDIMScheduler())
    pipeline.register_modules(scheduler=getattr(diffusers, scheduler)(**options))  # as a DDPMPipeline has it
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """`weights`, a pipeline of diffusers; not to be changed."""
    folder = tmp_path_factory.mktemp("weights")
    pipeline_of().save_pretrained(folder / "weights")
    return folder


def expected(folder, noise, steps, **options):
    """Images in [0, 1] (count, height, width, channels) of diffusers' DDIM, the noise being the first it draws."""
    pipeline = diffusers.DDIMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusers.pipelines.ddim.pipeline_ddim.randn_tensor", lambda *_, **__: noise)
        return pipeline(len(noise), num_inference_steps=steps, output_type="np", **options).images


def noise_of(count, shape, seed=0):
    """The noise that `sample` starts from."""
    for_start, _ = random.sites(random.key(seed), 2)
    return random.normal(random.sites(for_start, count), shape)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scheduler": "DDIMScheduler", "beta_schedule": "scaled_linear", "timestep_spacing": "trailing"},
        {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "clip_sample": False},
        {"prediction_type": "sample", "num_train_timesteps": 100, "beta_end": 0.1},
        {"trained_betas": [0.01, 0.02, 0.03, 0.1, 0.2] * 4, "num_train_timesteps": 20, "timestep_spacing": "linspace"},
        {"variance_type": "learned_range", "net": {"out_channels": 4}, "clip_sample": False},
    ],
    ids=["linear", "scaled", "cosine", "image", "betas", "learned"],
)
def test_samples_are_those_of_diffusers(options, tmp_path):
    pipeline_of(**options).save_pretrained(tmp_path)
    net = diffusion.published(str(tmp_path), "cpu")
    assert net.shape == (2, 8, 12)
    noise = noise_of(3, net.shape)
    steps = 20 if net.spacing == "linspace" else 10  # diffusers' steps back are equal, linspace's are not
    flags = {"spacing": net.spacing, "clip": net.clip, "compile": False}
    sampler = diffusion.make_sampler(net.model, "ddim", steps, **flags)
    with torch.no_grad():
        images = samplers.sample(sampler, (net.params, None), noise)
    if net.model.cfg.learned_variance:  # of which diffusers' DDIM knows nothing: the noise is the first half
        library = pipeline_of(**options)
        library.scheduler = diffusers.DDIMScheduler.from_config(library.scheduler.config)
        library.scheduler.set_timesteps(steps)
        x = noise
        for time in library.scheduler.timesteps:
            with torch.no_grad():
                x = library.scheduler.step(library.unet(x, time).sample[:, :2], time, x).prev_sample
        torch.testing.assert_close(images, x, atol=1e-4, rtol=1e-4)
        return
    clipped = {"use_clipped_model_output": True} if net.clip else {}
    theirs = torch.from_numpy(expected(tmp_path, noise, steps, **clipped)).movedim(-1, 1)
    torch.testing.assert_close((images / 2 + 0.5).clamp(0, 1), theirs, atol=1e-4, rtol=0)
    assert theirs.std() > 0.05


def test_command_writes_the_samples(here, capsys):
    """A pipeline, and its net and scheduler in one folder, as the first ones have it; the file of the net there."""
    theirs = expected("weights", noise_of(3, (2, 8, 12), 5), 4, use_clipped_model_output=True)
    flags = ("--sampler-steps", "4", "--count", "3", "--seed", "5", "--no-compile")
    for source in ("weights", "flat", "flat/diffusion_pytorch_model.safetensors"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(diffusion, "draw", lambda *_: None)  # two channels make no picture
            assert call("sample", "--weights", source, *flags) == 0
        name = {"weights": "sampled", "flat": "sampled_2"}.get(source, "sampled_3")
        samples = np.load(f"{name}/samples.npy")
        assert np.abs(samples - theirs * 255).max() < 0.51 + 0.03
        assert f"3 samples by ddim in 4 steps in {name}/" in capsys.readouterr().out
        if source == "weights":
            Path("flat").mkdir()
            for path in (*Path("weights/unet").iterdir(), Path("weights/scheduler/scheduler_config.json")):
                shutil.copy(path, "flat")


def test_pictures_of_a_net_with_classes(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    net = {"in_channels": 1, "out_channels": 1, "num_class_embeds": 4, "sample_size": 8}
    pipeline_of(net=net, num_train_timesteps=20).save_pretrained("weights")
    flags = ("--weights", "weights", "--no-compile", "--sampler-steps", "2", "--count", "4", "--sampler", "ddpm")
    assert call("sample", *flags, "--label", "2", "--guidance", "2", "--out", "out") == 0
    assert is_png(Path("out/samples.png")) and np.load("out/samples.npy").shape == (4, 8, 8, 1)
    assert "--label is 3; expected 0 to 2" in refused(capfd, "sample", *flags, "--label", "3")


def change(name, **entries):
    def spoil():
        path = Path("weights", name)
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    return spoil


change_scheduler = functools.partial(change, "scheduler/scheduler_config.json")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (change_scheduler(_class_name="EulerDiscreteScheduler"), "is 'EulerDiscreteScheduler'; expected 'DDPM"),
        (change_scheduler(beta_schedule="laplace"), "beta_schedule is 'laplace'; expected 'linear' or"),
        (change_scheduler(beta_start="low"), "its betas make no schedule"),
        (change_scheduler(trained_betas=[0.1, 2.0]), "betas must lie inside (0, 1)"),
        (change_scheduler(clip_sample_range=2.0), "clip_sample_range is 2.0; expected 1.0"),
        (change_scheduler(prediction_type="flow"), "prediction_type is 'flow'; expected 'epsilon' or 'sample'"),
        (change_scheduler(rescale_betas_zero_snr=True), "rescale_betas_zero_snr is True; expected False"),
        (change_scheduler(set_alpha_to_one=False), "set_alpha_to_one is False; expected True"),
        (change_scheduler(steps_offset=1), "steps_offset is 1; expected 0"),
        (change_scheduler(thresholding=True), "thresholding is True; expected False"),
        (change_scheduler(timestep_spacing="log"), "timestep_spacing is 'log'; expected 'leading' or"),
        (change_scheduler(variance_type="learned"), "variance_type is 'learned'; expected 'fixed_small' or"),
        (change_scheduler(variance_type="learned_range"), "2 output channels, which do not go with a learned variance"),
        (change("unet/config.json", sample_size=None), "sample_size is None; expected the pixels per side"),
        (change("unet/config.json", act_fn="gelu"), "act_fn is 'gelu'; expected 'silu'"),
        (change("model_index.json", vqvae=["diffusers", "VQModel"]), "is a pipeline with a part 'vqvae'; expected"),
        (lambda: shutil.rmtree("weights/scheduler"), "'weights' has none of the files scheduler/scheduler_config.json"),
        (lambda: shutil.rmtree("weights/unet"), "'weights' has none of the files unet/config.json, config.json"),
    ],
    ids=[
        "class", "betas", "word", "large-betas", "range", "flow", "zero-snr", "alpha", "offset", "threshold", "spacing",
        "variance", "outputs", "size", "activation", "latent", "no-scheduler", "no-net",
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused_in_one_line(spoil, message, here, monkeypatch, capfd):
    def never(*_, **__):
        raise AssertionError("nothing may be sampled")

    monkeypatch.setattr(unet, "apply", never)
    spoil()
    assert message in refused(capfd, "sample", "--weights", "weights", "--no-compile")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "expected either --run DIR or --weights SOURCE"),
        (["--run", "weights", "--weights", "weights"], "expected either --run DIR or --weights SOURCE"),
        (["--weights", "weights", "--label", "1"], "--label is 1, but the net of 'weights' has no classes"),
        (["--weights", "weights", "--sampler-steps", "1001"], "sampled in 1 to 1000 steps, got 1001"),
        (["--weights", "weights", "--out", "weights"], "'weights' exists already; choose another --out"),
    ],
    ids=flag_id,
)
def test_refused_in_one_line(flags, message, here, capfd):
    assert message in refused(capfd, "sample", "--no-compile", *flags)
