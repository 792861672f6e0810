"""Every script of experiments/, once: the rows that `tests/experiments/test_laws.py` holds to the laws of experiments.

Experiment("gpt", ("--steps", "20", ...), pictures=("loss.png",), inputs=text, baseline="unigram_entropy", ...)
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from train.data.translation import dates


@dataclass(frozen=True)
class Experiment:
    """A script as the laws see it.

    Args:
        flags: those of a run of seconds, uncompiled, with checkpoints at half of its steps or before.
        steps: its number of steps.
        pictures: files of the run that are pictures (patterns as in a shell).
        files: other files of the run.
        inputs: writes what the flags name into a folder.
        baseline: the figure of `result.json` that a method without a net reaches; "" if there is none to compare with.
        refusals: (flags, the error they give), run in the folder of `inputs`; nothing may be written.
        commands: (sub-command and flags, files it writes into the run's folder); the run is added with `--run`.
    """

    name: str
    flags: tuple[str, ...]
    steps: int
    pictures: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    inputs: Callable[[Path], None] = lambda folder: None
    baseline: str = ""
    refusals: tuple[tuple[tuple[str, ...], str], ...] = ()
    commands: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = ()

    def __str__(self) -> str:
        return self.name


def text(folder: Path) -> None:
    lines = (f"The {n} quick brown foxes jump over {n * n} lazy dogs, and café owners laugh.\n" for n in range(40))
    (folder / "text.txt").write_text("".join(lines), encoding="utf-8")


def pairs(folder: Path) -> None:
    """Parallel files in pairs/; tables with one empty side and of other languages; files of unlike length."""
    (folder / "pairs").mkdir()
    for part, sentences in zip(("train", "val", "test"), dates.pairs(120, 12, 10), strict=True):
        for language, lines in zip(("de", "en"), zip(*sentences, strict=True), strict=True):
            (folder / "pairs" / f"{part}.{language}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "empty.tsv").write_text("de\ten\n" + "Haus\t\n" * 300, encoding="utf-8")
    (folder / "french.tsv").write_text("fr\ten\n" + "maison\thouse\n" * 300, encoding="utf-8")
    (folder / "a.de").write_text("eins\nzwei\n", encoding="utf-8")
    (folder / "b.en").write_text("one\n", encoding="utf-8")


def two_folders(folder: Path) -> None:
    """first/ and second/ with four pictures of one name each, lone/ with one of another name."""
    for name in (*(f"{side}/{i}.png" for side in ("first", "second") for i in range(4)), "lone/9.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.effect_noise((40, 40), 60).convert("RGB").save(folder / name)


DIGITS = ("--net", "lenet-digits", "--batch", "100", "--epochs", "1", "--save-every", "4", "--eval-every", "0.5")

EXPERIMENTS = [
    Experiment(
        "classify",
        (*DIGITS, "--ema", "0.9", "--optimizer", "muon", "--flip", "--rand-augment", "9", "--mixup", "0.2"),
        15,
        pictures=("confusion.png", "calibration.png", "mistakes.png", "filters.png", "accuracy.png"),
        files=("report.txt",),
        baseline="nearest_mean_accuracy",
        refusals=(
            (("--batch", "3", "--micro-batches", "2"), "--batch 3 does not divide into --micro-batches 2"),
            (("--data", "nowhere"), "--data 'nowhere' does not exist"),
        ),
        commands=((("evaluate",), ("evaluations/digits/report.txt", "evaluations/digits/confusion.png")),),
    ),
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
        "gpt",
        ("--text", "text.txt", "--batch", "2", "--steps", "20", "--eval-every", "4", "--save-every", "8"),
        20,
        pictures=("loss.png",),
        files=("sample.txt", "tokenizer.json"),
        inputs=text,
        baseline="unigram_entropy",
        refusals=(
            (("--text", "nowhere.txt"), "nowhere.txt does not exist"),
            (("--batch", "3", "--micro-batches", "2"), "--batch 3 does not divide into --micro-batches 2"),
            (("--text", "text.txt", "--preset", "gpt2"), "a context of 1024"),
        ),
        commands=(
            (("sample", "--tokens", "5", "--samples", "2"), ()),
            (("sample", "--tokens", "5", "--checkpoint", "best"), ()),
            (("evaluate", "--text", "text.txt"), ()),
        ),
    ),
    Experiment(
        "ensemble",
        ("--members", "3", "--widths", "8", "--steps", "12", "--save-every", "6"),
        12,
        pictures=("ensemble.png",),
        baseline="nearest_mean_accuracy",
        refusals=(
            (("--batch", "501"), "--batch is 501, but 'digits' has 500 examples to learn from"),
            (("--data", "nowhere"), "--data 'nowhere' does not exist; expected a folder of images, or one of digits"),
            (("--net", "mlpp"), "'mlpp'"),
            (("--resume", "--name", "a", "--widths", "9"), "with --widths (9,): it was started with (8,)"),
            (("--resume", "--name", "a", "--steps", "3"), "--steps is 3, but 'runs/ensemble/a' has done 12"),
        ),
        commands=((("evaluate",), ("ensemble.png",)),),
    ),
    Experiment(
        "gradients",
        ("--examples", "40", "--batch", "10", "--steps", "12", "--save-every", "6"),
        12,
        pictures=("gradients.png", "examples.png"),
        refusals=(
            (("--task", "sound"), "--task"),
            (("--batch", "1"), "--batch is 1; expected 2 to 1000, the number of examples"),
            (("--data", "nowhere"), "--data 'nowhere' does not exist"),
            (("--task", "text", "--data", "nowhere"), "nowhere does not exist"),
            (("--resume", "--name", "a", "--steps", "20"), "with --steps 20: it was started with 12"),
        ),
    ),
    Experiment(
        "noise_scale",
        ("--text", "text.txt", "--batch", "4", "--steps", "12", "--save-every", "6"),
        12,
        pictures=("noise_scale.png",),
        inputs=text,
        refusals=(
            (("--batch", "12"), "--batch is 12; expected a power of two from 4 on"),
            (("--batch", "4", "--micro-batches", "3"), "--batch 4 does not divide into --micro-batches 3"),
            (("--text", "nowhere"), "nowhere does not exist"),
            (("--preset", "nanogns", "--text", "text.txt", "--batch", "0"), "--batch is 0; expected at least 1"),
        ),
    ),
    Experiment(
        "mislabelled",
        ("--examples", "100", "--widths", "8", "--batch", "20", "--rank", "3", "--steps", "40")
        + ("--snapshot-every", "10", "--save-every", "10"),
        40,
        pictures=("precision_recall.png", "scores.png", "suspects.png"),
        files=("scores.safetensors", "snapshots/*.safetensors"),
        baseline="neighbours_average_precision",
        refusals=(
            (("--examples", "1501"), "--examples is 1501; 'digits' has 1500 to learn from"),
            (("--flipped", "nan"), "--flipped is nan; expected a number in (0, 1)"),
            (("--flipped", "1e-9"), "--flipped is 1e-09; expected a share of 1500 labels, not none or all"),
            (("--batch", "1501"), "--batch is 1501, but there are 1500 examples to learn from"),
            (("--snapshot-every", "1200"), "--snapshot-every is 1200; expected up to half of --steps 2000"),
            (("--resume", "--name", "a", "--flipped", "0.2"), "with --flipped 0.2: it was started with 0.1"),
        ),
    ),
    Experiment(
        "prune",
        ("--seeds", "2", "--kept", "0.5", "0.1", "--scorers", "2", "--early", "4", "--widths", "8", "--batch", "10")
        + ("--steps", "12", "--save-every", "6"),
        12,
        pictures=("prune.png", "el2n_early.png", "grand_early.png", "grand_at_initialisation.png"),
        files=("scores.npy",),
        baseline="nearest_mean_accuracy",
        refusals=(
            (("--seeds", "1"), "--seeds is 1; expected at least 2, for the error bars"),
            (("--kept", "0.5", "1.0"), "--kept is 1.0; expected a number in (0, 1)"),
            (("--kept", "0.5", "0.5"), "--kept is (0.5, 0.5); expected different fractions"),
            (("--early", "700"), "--early is 700; expected up to --steps, 600"),
            (("--resume", "--name", "a", "--seeds", "3"), "with --seeds 3: it was started with 2"),
        ),
    ),
    Experiment(
        "private",
        ("--batch", "30", "--physical-batch", "16", "--noise-multiplier", "2", "--steps", "8", "--every", "4")
        + ("--save-every", "4"),
        8,
        pictures=("accuracy.png", "gradient_norms.png", "mistakes.png"),
        baseline="nearest_mean_accuracy",
        refusals=(
            (("--batch", "1501"), "--batch is 1501, but 'digits' has 1500 examples to learn from"),
            (("--momentum", "2"), "--momentum is 2.0; expected a number in [0, 1)"),
            (("--delta", "1"), "--delta is 1.0; expected a number in (0, 1)"),
            (("--clipping", "adaptive", "--batch", "30"), "needs more than 10 --noise-multiplier, 30"),
            (("--resume", "--name", "a", "--noise-multiplier", "1"), "1.0: it was started with 2.0"),
        ),
    ),
    Experiment(
        "spectrum",
        ("--pool", "4", "--widths", "4", "--lanczos-steps", "10", "--probes", "1", "--every", "4")
        + ("--steps", "8", "--spectra", "0", "--save-every", "4"),
        8,
        pictures=("spectra.png", "sharpness.png"),
        files=("spectra/0.json", "spectra/8.json"),
        baseline="nearest_mean_accuracy",
        refusals=(
            (("--pool", "3"), "--pool"),
            (("--spectra", "-5"), "--spectra is -5; expected at least 0"),
            (("--resume", "--name", "a", "--pool", "2"), "with --pool 2: it was started with 4"),
        ),
    ),
    Experiment(
        "translate",
        ("--data", "pairs", "--vocabulary", "300", "--tokens", "300", "--steps", "12", "--save-every", "6")
        + ("--eval-every", "6"),
        12,
        pictures=("loss.png", "attention/encoder.png", "attention/decoder.png", "attention/cross.png"),
        files=("samples.txt", "tokenizer.json"),
        inputs=pairs,
        baseline="copy_bleu",
        refusals=(
            (("--preset", "huge"), "--preset"),
            (("--tokenizer", "letters"), "--tokenizer"),
            (("--data", "nowhere"), "'nowhere' does not exist"),
            (("--data", "pairs", "--target", "fr"), "no pair of languages de-fr; there are de, en"),
            (("--source", "en", "--target", "en"), "source and target are both en"),
            (("--data", "a.de,b.en"), "a.de has 2 sentences and b.en has 1 sentences; expected as many"),
            (("--data", "empty.tsv"), "there is not one pair of sentences, as all of column 2 of empty.tsv is empty"),
            (("--data", "french.tsv"), "french.tsv: no pair of languages de-en; there are fr, en"),
            (("--data", "pairs", "--vocabulary", "100"), "a vocabulary of 100 is too small: expected at least 260"),
            (("--dropout", "1"), "--dropout is 1.0; expected a number in [0, 1)"),
            (("--resume", "--name", "a", "--preset", "base"), "with --preset base: it was started with tiny"),
        ),
        commands=(
            (("translate", "Der Bus", "--beam", "2", "--n-best", "2"), ()),
            (("translate", "Der Bus", "--beam", "2", "--n-best", "2", "--checkpoint", "6"), ()),
            (("evaluate", "--beam", "1"), ()),
        ),
    ),
    Experiment(
        "playground",
        ("--lengths", "16", "32", "--rounds", "1", "--steps", "20", "--save-every", "10"),
        20,
        pictures=tuple(
            f"{name}.png"
            for name in ("positions", "masks", "smoothed_targets", "learning_rate", "attention_maps", "cost")
        ),
        baseline="copied_letters_right",
        refusals=(
            (("--run", "nowhere"), "'nowhere' is not the folder of a run"),
            (("--run", "runs/playground/a", "Der Bus"), "is a run of playground.py, expected one of translate.py"),
            (("Der Bus",), "'Der Bus' is for a translator; name its run with --run"),
            (("--lengths",), "--lengths is empty; expected at least one length"),
            (("--resume", "--name", "a", "--steps", "3"), "--steps is 3, but 'runs/playground/a' has done 20"),
        ),
    ),
    Experiment(
        "vae",
        ("--width", "16", "--latent", "2", "--bound-samples", "3", "--steps", "4", "--batch", "50")
        + ("--test-every", "2", "--save-every", "2"),
        4,
        pictures=("reconstructions.png", "samples.png", "latent_grid.png", "walk.png", "codes.png", "loss.png"),
        baseline="mean_image_log_likelihood",
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
            (("interpolate", "--images", "5", "9", "--steps", "4"), ("interpolated.png",)),
        ),
    ),
    Experiment(
        "vqvae",
        ("--width", "8", "--codes", "8", "--steps", "3", "--prior-steps", "3", "--revive-every", "2", "--batch", "50")
        + ("--test-every", "2", "--save-every", "2"),
        6,
        pictures=("reconstructions.png", "samples.png", "usage.png", "walk.png", "codes.png", "loss.png"),
        baseline="prior_nats_unigram",
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
            (("interpolate", "--images", "5", "9", "--steps", "4"), ("interpolated.png",)),
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
        refusals=(
            (("--schedule", "quadratic"), "invalid choice 'quadratic' for argument '--schedule'"),
            (("--timesteps", "1"), "--timesteps is 1; expected at least 2"),
            (("--drop", "1"), "--drop is 1.0; expected a number in [0, 1)"),
            (("--schedule", "linear", "--timesteps", "10"), "betas must lie inside (0, 1)"),
            (("--timesteps", "20", "--sampler-steps", "30"), "20 steps is sampled in 1 to 20 steps, got 30"),
            (("--size", "9"), "the images have 9 x 9 pixels; the digits net takes sides divisible by 2: choose --size"),
            (("--variance", "learned"), "--variance learned goes with --weight hybrid"),
            (("--flip",), "--flip is not for digits"),
            (("--batch", "5000"), "--batch is 5000, but there are 1500 images"),
            (("--data", "nowhere"), "--data 'nowhere' does not exist"),
            (("--classifier", "nowhere"), "'nowhere' is not the folder of a run"),
            (("--count", "4"), "--count is 4; expected at least 6"),
            (("--resume", "--name", "a", "--preset", "mnist"), "with --preset mnist: it was started with digits"),
            (("--resume", "--name", "a", "--predicts", "noise"), "with --predicts noise: it was started with velocity"),
        ),
        commands=(
            (("sample", "--no-compile", "--steps", "2"), ("sampled/samples.png", "sampled/samples.npy")),
            (("sample", "--no-compile", "--steps", "2", "--label", "3"), ("sampled_2/samples.png",)),
        ),
    ),
    Experiment(
        "pix2pix",
        ("--steps", "3", "--batch", "1", "--save-every", "3", "--sample-every", "2"),  # a checkpoint has 120 MB
        3,
        pictures=("translations.png", "l1.png", "frames/*.png"),
        files=("training.gif",),
        inputs=two_folders,
        baseline="l1_source",
        refusals=(
            (("--data", "nowhere"), "nowhere does not exist, expected a folder of pictures"),
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
            (("--data", "first"), "--data 'first' is neither digits nor two folders, FIRST,SECOND"),
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
]
