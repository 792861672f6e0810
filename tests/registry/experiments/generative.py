"""Rows of the experiments that generate images."""

from pathlib import Path

from PIL import Image

from tests.registry.experiments.experiment import Experiment
from train.run.ranks import BY_ROWS


def two_folders(folder: Path) -> None:
    """first/ and second/ with four pictures of one name each, lone/ with one of another name."""
    for name in (*(f"{side}/{i}.png" for side in ("first", "second") for i in range(4)), "lone/9.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.effect_noise((40, 40), 60).convert("RGB").save(folder / name)


ROWS = [
    Experiment(
        "gan",
        (
            "--steps",
            "4",
            "--batch",
            "8",
            "--save-every",
            "2",
            "--sample-every",
            "2",
            "--width",
            "4",
            "--critic-steps",
            "1",
        ),
        4,
        pictures=("samples.png", "interpolation.png", "loss.png", "frames/*.png"),
        files=("training.gif",),
        baseline="real_frechet_distance",
        refusals=(
            (("--classifier", "nowhere"), "nowhere"),
            (("--data", "ring", "--gan", "cgan"), "'cgan' has conditional"),
        ),
        commands=((("sample", "--count", "9"), ("sampled.png",)),),
    ),
    Experiment(
        "stylegan",
        ("--steps", "4", "--batch", "4", "--phase", "4", "--size", "16", "--first", "1")
        + ("--save-every", "2", "--sample-every", "2"),
        4,
        pictures=("samples.png", "mixed.png", "loss.png", "frames/*.png"),
        files=("training.gif",),
        baseline="real_frechet_distance",
        refusals=(
            (("--preset", "large"), "invalid choice 'large' for argument '--preset'"),
            (("--size", "12"), "size is 12; expected a power of 2 from 8 on"),
            (("--first", "5"), "--first is 5; expected 0 to 1, the level of 8 pixels"),
            (("--batch", "6"), "batch 6 is not divisible into groups of 4"),
            (("--batch", "2000"), "--batch is 2000, but there are 1500 images"),
            (("--data", "nowhere"), "'nowhere' does not exist"),
            (("--classifier", "nowhere"), "nowhere"),
            (("--resume", "--name", "a", "--size", "32"), "with --size 32: it was started with 16"),
        ),
        commands=(
            (("sample", "--count", "4"), ("sampled.png",)),
            (("sample", "--mix"), ("mixed_2.png",)),
        ),
    ),
    Experiment(
        "pix2pix",
        ("--steps", "3", "--batch", "1", "--save-every", "3", "--sample-every", "2"),  # a checkpoint has 120 MB
        3,
        pictures=("translations.png", "l1.png", "frames/*.png"),
        files=("training.gif",),
        inputs=two_folders,
        baseline="l1_mean",
        refusals=(
            (("--data", "nowhere"), "--data 'nowhere' does not exist; expected photographs, facades, a folder"),
            (("--data", "first,lone"), "has no pair"),
            (("--data", "first,nowhere"), "nowhere does not exist"),
            (("--data", "lone"), "lone has one pair; expected at least 2, of which one is for testing"),
            (("--preset", "large"), "invalid choice 'large' for argument '--preset'"),
            (("--source", "top"), "invalid choice 'top' for argument '--source'"),
            (("--size", "60"), "--size is 60; expected a multiple of 64, since the small net halves pictures 6 times"),
            (("--size", "64", "--preset", "paper"), "--size is 64; expected a multiple of 256"),
            (("--batch", "9999"), "--batch is 9999, but there are 198 pairs"),
            (("--objective", "l3"), "invalid choice 'l3' for argument '--objective'"),
            (("--resume", "--name", "a", "--l1", "3"), "with --l1 3.0: it was started with 100.0"),
        ),
        commands=((("translate", "first/0.png", "second"), ("translated/0.png", "translated/0_2.png")),),
    ),
    Experiment(
        "cyclegan",
        ("--steps", "3", "--batch", "1", "--size", "16", "--save-every", "2", "--sample-every", "2"),
        3,
        pictures=("translations.png", "cycle.png", "frames/*.png"),
        files=("training.gif",),
        inputs=two_folders,
        baseline="error_source",
        refusals=(
            (("--data", "nowhere"), "--data 'nowhere' does not exist; expected digits, horse2zebra, FIRST,SECOND"),
            (("--data", "first"), "first/trainA does not exist, expected a folder of pictures"),
            (("--data", "first,lone"), "lone has one picture; expected at least 2, of which one is for testing"),
            (("--data", "first,nowhere"), "nowhere does not exist"),
            (("--preset", "large"), "invalid choice 'large' for argument '--preset'"),
            (("--size", "30"), "--size is 30; expected a multiple of 4, since the small net halves pictures 2 times"),
            (("--size", "8"), "--size is 8; expected at least 12, for the critic's patches"),
            (("--batch", "9999"), "--batch is 9999, but there are 750 pictures of one kind"),
            (("--resume", "--name", "a", "--cycle", "3"), "with --cycle 3.0: it was started with 10.0"),
        ),
        commands=((("translate", "--back", "first/0.png", "second"), ("translated/0.png", "translated/0_2.png")),),
    ),
    Experiment(
        "vae",
        ("--width", "16", "--latent", "2", "--bound-samples", "3", "--steps", "4", "--batch", "50")
        + ("--eval-every", "2", "--save-every", "2"),
        4,
        pictures=("reconstructions.png", "samples.png", "latent_grid.png", "walk.png", "codes.png", "loss.png"),
        baseline="mean_image_log_likelihood",
        shards=BY_ROWS,
        refusals=(
            (("--model", "gan"), "invalid choice 'gan' for argument '--model'"),
            (("--kind", "transformer"), "invalid choice 'transformer' for argument '--kind'"),
            (("--likelihood", "poisson"), "invalid choice 'poisson' for argument '--likelihood'"),
            (("--beta", "2", "--model", "autoencoder"), "--beta 2.0 is for vae, conditional-vae; the model is 'auto"),
            (("--noise", "0.5"), "--noise 0.5 is for denoising; the model is 'vae'"),
            (("--model", "denoising", "--noise", "1"), "--noise is 1.0; expected a number in (0, 1)"),
            (("--model", "iwae", "--watch-gradients"), "--watch-gradients is not for iwae"),
            (("--kind", "convolutional", "--size", "6"), "images of 6 x 6 pixels cannot be halved 2 times"),
            (("--data", "nowhere"), "--data 'nowhere' does not exist"),
            (("--batch", "5000"), "--batch is 5000, but there are 1500 images"),
            (("--resume", "--name", "a", "--model", "iwae"), "with --model iwae: it was started with vae"),
            (("--resume", "--name", "a", "--steps", "3"), "--steps is 3, but 'runs/vae/a' has done 4"),
        ),
        commands=(
            (("sample", "--count", "9"), ("sampled.png",)),
            (("reconstruct", "--count", "6"), ("reconstructed.png",)),
            (("interpolate", "--indices", "5", "9", "--count", "4"), ("interpolated.png",)),
        ),
    ),
    Experiment(
        "vqvae",
        ("--width", "8", "--codes", "8", "--steps", "3", "--prior-steps", "3", "--revive-every", "2", "--batch", "50")
        + ("--eval-every", "2", "--save-every", "2"),
        6,
        pictures=("reconstructions.png", "samples.png", "usage.png", "walk.png", "codes.png", "loss.png"),
        baseline="prior_nats_unigram",
        shards=("replicate",),
        refusals=(
            (("--codebook", "list"), "invalid choice 'list' for argument '--codebook'"),
            (("--watch-gradients",), "--watch-gradients: the averages of an ema codebook mix the images; use --codeb"),
            (("--size", "7"), "images of 7 x 7 pixels cannot be halved 1 times"),
            (("--data", "nowhere"), "--data 'nowhere' does not exist"),
            (("--batch", "5000"), "--batch is 5000, but there are 1500 images"),
            (("--resume", "--name", "a", "--steps", "9"), "with --steps 9: it was started with 3"),
            (("--resume", "--name", "a", "--prior-steps", "2"), "--prior-steps is 2, but 'runs/vqvae/a' has done 3"),
        ),
        commands=(
            (("sample", "--count", "9", "--label", "3"), ("sampled.png",)),
            (("reconstruct", "--count", "6"), ("reconstructed.png",)),
            (("interpolate", "--indices", "5", "9", "--count", "4"), ("interpolated.png",)),
        ),
    ),
    Experiment(
        "diffusion",
        ("--steps", "4", "--batch", "8", "--save-every", "2", "--timesteps", "20", "--sampler-steps", "2")
        + ("--count", "16", "--classes", "--importance", "--dropout", "0.1"),
        4,
        pictures=("samples.png", "film.png", "film_predicted.png", "loss.png", "loss_by_time.png"),
        files=("sampling.gif",),
        baseline="real_frechet_distance",
        shards=BY_ROWS,
        refusals=(
            (("--noise-schedule", "quadratic"), "invalid choice 'quadratic' for argument '--noise-schedule'"),
            (("--timesteps", "1"), "--timesteps is 1; expected at least 2"),
            (("--drop", "1"), "--drop is 1.0; expected a number in [0, 1)"),
            (("--noise-schedule", "linear", "--timesteps", "10"), "betas must lie inside (0, 1)"),
            (("--timesteps", "20", "--sampler-steps", "30"), "20 steps is sampled in 1 to 20 steps, got 30"),
            (("--size", "9"), "the images have 9 x 9 pixels; the digits net takes sides divisible by 2: choose --size"),
            (("--variance", "learned"), "--variance learned goes with --loss-weight hybrid"),
            (("--flip",), "--flip is not for digits"),
            (("--batch", "5000"), "--batch is 5000, but there are 1500 images"),
            (("--data", "nowhere"), "--data 'nowhere' does not exist"),
            (("--classifier", "nowhere"), "'nowhere' is not the folder of a run"),
            (("--count", "4"), "--count is 4; expected at least 6"),
            (("--resume", "--name", "a", "--preset", "mnist"), "with --preset mnist: it was started with digits"),
            (("--resume", "--name", "a", "--predicts", "noise"), "with --predicts noise: it was started with velocity"),
        ),
        commands=(
            (("sample", "--no-compile", "--sampler-steps", "2"), ("sampled/samples.png", "sampled/samples.npy")),
            (("sample", "--no-compile", "--sampler-steps", "2", "--label", "3"), ("sampled_2/samples.png",)),
        ),
    ),
]
