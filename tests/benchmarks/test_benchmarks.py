"""Every benchmark runs, tiny, in this process and without compiling: nothing is learned of times."""

import gzip
import io
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests import processes
from tests.experiments.runs import ENVIRONMENT, execute

FOLDER = Path(__file__).parent
# The program and its flags, and a part of its output.
CASES = [
    ("adamw --rounds 1", "functree donated / torch.optim fused"),
    ("beam_search --presets tiny --batches 2 --sentences 2 --vocabulary 20 --rounds 1", "functree, compiled / trans"),
    ("bert_step --layers 1 --width 16 --vocabulary 50 --time 16 --batch 2 --rounds 1", "functree / transformers"),
    (
        "bert_step --layers 1 --width 16 --vocabulary 50 --time 16 --batch 2 --rounds 1 --norms",
        "norms / plain gradient",
    ),
    ("classifier_accuracy --data pictures.zip --epochs 1 --batch 4 --seeds 1 --workers 0 --no-compile", "plain loop"),
    ("classifier_families --data pictures.zip --nets mnist --batch 4", "| logistic regression | "),
    ("classifiers --size 32 --batch 2 --rounds 1", "functree / torchvision"),
    ("diffusion_sampling --preset digits --batch 1 --steps 2 --rounds 1", "functree / diffusers"),
    ("diffusion_unet --preset digits --batch 1 --rounds 1", "functree / diffusers"),
    ("ensemble --members 2 --batch 3 --rounds 1", "compile(vmap(step)) / one by one, eager"),
    ("fcos_clip_step --net clip --side 64 --batch 2 --rounds 1 --no-compile", "functree / nn.Module"),
    ("gan_step --game dcgan --batch 2 --rounds 1", "functree / nn.Module, compiled, fused Adam"),
    ("gan_step --batch 2 --rounds 1", "functree / nn.Module, eager, create_graph"),
    ("generation --widths 16 --vocabulary 20 --tokens 4 --rounds 1", "functree, compiled / transformers"),
    ("generation --net llama --widths 32 --vocabulary 20 --tokens 4 --rounds 1", "share of the bandwidth limit"),
    ("gpt2_bf16 --device cpu --preset tiny --batch 1 --rounds 1", "functree / nn.Module, torch.compile"),
    ("image_pipeline --data pictures.zip --batch 4 --workers 0 --rounds 1", "functree / DataLoader and Pillow"),
    ("lifted --layers 1 --width 32 --vocabulary 50 --time 16 --batch 2 --rounds 1", "lifted / Opacus, hooks"),
    ("lifted --net resnet18 --side 32 --batch 2 --rounds 1", "lifted / plain gradient"),
    ("lora --adapters 2 --width 16 --tokens 4 --layers 1 --rounds 1", "an adapter each / peft, adapter_names"),
    ("nanogpt --steps 1 --no-compile", "validation loss after 1 steps"),
    ("per_example_gpt --batch 2 --rounds 1", "functree / plain gradient"),
    ("per_example_gpt --batch 2 --memory", "of the plain gradient"),
    ("per_example_memory --sizes 2000 1000 10 --batch 4", "functree, compiled"),
    ("per_example_tools --nets mlp --wants norms --rounds 1", "functree, compiled / loop"),
    ("private --data mnist --batch 8 --physical-batch 8 --steps 1 --rounds 1", "functree / opacus, ghost clipping"),
    ("random_bits --rounds 1", "dropout / F.dropout"),
    ("recurrent --rounds 1 --batch 2 --time 4 --width 4 --no-compile", "functree / torch, packed"),
    ("recurrent_language_model --vocabulary 50 --width 8 --rounds 1", "functree, donated / torch.nn, eager"),
    ("scale --what reduction gpt --rounds 1 --no-compile", "two processes / one process"),
    ("segmentation_accuracy --data pairs --other module --steps 2 --size 16 --batch 2 --width 2 --depth 2", "module "),
    ("segmentation_unet --width 2 --depth 2 --side 8 --batch 2 --rounds 1", "functree / nn.Module, compiled"),
    ("serve --clients 2 --texts 1 --tokens 4", "at once / one after the other"),
    ("ship --what decode --form torchscript --rounds 1", "cached decode step, batch 1"),
    ("startup --rounds 1 --no-compile", "median of the later ones"),
    ("super_resolution --blocks 1 --width 4 --patch 8 --batch 2 --rounds 1", "functree / nn.Module"),
    ("super_resolution --norms --recursions 2 --width 4 --patch 8 --batch 2 --rounds 1", "functree / plain gradient"),
    ("train_step --batch 1 --rounds 1", "functree, donated / jax + optax, jit"),
    ("translation_step --preset tiny --tokens 50 --vocabulary 20 --rounds 1", "functree / torch.nn.Transformer"),
    ("vae_step --epochs 1 --images 128", "time without"),
    ("watch_gradients --preset tiny --batch 2 --rounds 1", "watched step / plain step"),
]
HELPERS = {"memory", "module_gpt", "module_rnn", "module_unet", "timing", "torchvision_operators"}


def test_every_benchmark_is_here():
    programs = {path.stem for path in FOLDER.glob("*.py")} - HELPERS - {Path(__file__).stem}
    assert programs == {command.split()[0] for command, _ in CASES}


@pytest.mark.slow
def test_torchvision_is_mended_where_it_is_imported():
    """The tests mend it themselves (tests/conftest.py); a program started by hand must, too."""
    packages = re.compile(r"^ *(?:from|import) (?:diffusers|torchvision|transformers)\b", re.MULTILINE)
    sources = {path.stem: path.read_text() for path in FOLDER.glob("*.py")}
    users = {name for name, source in sources.items() if packages.search(source)} - HELPERS
    assert users == {name for name in users if "import torchvision_operators" in sources[name]} and len(users) >= 6
    process = processes.start(
        [sys.executable, FOLDER / "generation.py", "--help"], env=ENVIRONMENT, stdout=subprocess.PIPE
    )
    assert b"Greedy generation" in process.communicate()[0] and process.returncode == 0


# One per library that they compare with; the others are seconds each.
FAST = ("adamw", "diffusion_unet", "ensemble", "generation", "random_bits")


def case(command, output):
    marks = [] if command.startswith(FAST) else [pytest.mark.slow]
    return pytest.param(command, output, id=command, marks=marks)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with small data of every kind."""
    place = tmp_path_factory.mktemp("data")
    (place / "tinyshakespeare").mkdir()
    (place / "tinyshakespeare/input.txt").write_text("To be, or not to be, that is the question.\n" * 30)
    generator = np.random.default_rng(0)
    (place / "mnist").mkdir()
    for part, count in (("train", 200), ("t10k", 20)):
        for kind, array in (
            ("images-idx3", generator.integers(0, 256, (count, 28, 28), np.uint8)),
            ("labels-idx1", generator.integers(0, 10, count, np.uint8)),
        ):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            path = place / "mnist" / f"{part}-{kind}-ubyte.gz"
            path.write_bytes(gzip.compress(header + array.tobytes()))
    for part, name in (("images", "a"), ("images", "b"), ("masks", "a"), ("masks", "b")):
        (place / "pairs" / part).mkdir(parents=True, exist_ok=True)
        high, shape = (256, (20, 24, 3)) if part == "images" else (3, (20, 24))
        pixels = generator.integers(0, high, shape, np.uint8)
        Image.fromarray(pixels).save(place / "pairs" / part / f"{name}.png")
    with zipfile.ZipFile(place / "pictures.zip", "w") as archive:
        for part, label, number in np.ndindex(2, 2, 6):
            file = io.BytesIO()
            Image.fromarray(generator.integers(0, 256, (20, 24, 3), np.uint8)).save(file, "JPEG")
            archive.writestr(f"{('train', 'test')[part]}/{label}/{number}.jpg", file.getvalue())
    return place


@pytest.mark.filterwarnings("ignore")  # other libraries warn
@pytest.mark.parametrize(("command", "output"), [case(*row) for row in CASES])
def test_runs(command, output, place, monkeypatch, capsys):
    name, *flags = command.split()
    monkeypatch.setattr(torch, "compile", lambda f, **options: f)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setenv("FUNCTREE_DATA", str(place))
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # or the program would start itself again
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(FOLDER)
    execute(FOLDER / f"{name}.py", *flags)
    assert output in capsys.readouterr().out
