"""experiments/examine.py: its tables against plain autograd, its ranking against cleanlab's, models of every kind."""

import csv
import functools
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics
import torch
from PIL import Image

from experiments.parts import cross_validation
from tests.experiments import runs
from tests.experiments.gpt_runs import QUICK, TEXT
from tests.experiments.runs import result

call, completed, refused = (
    functools.partial(function, "examine") for function in (runs.call, runs.completed, runs.refused)
)
OWN = """
import torch
from torch import nn
from sklearn.datasets import load_digits

def data():
    digits = load_digits()
    return torch.from_numpy(digits.images[:40, None] / 16).float(), digits.target[:40]

def unlabelled():
    return data()[0], None

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))

def pure():
    params = {"weight": torch.linspace(-1, 1, 640).reshape(10, 64)}
    return params, lambda p, x: nn.functional.linear(x.flatten(1), p["weight"])

def narrow():
    return nn.Linear(3, 10)

def few():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 7))

def number():
    return 3
"""
SMALL = ("--sketch", "64", "--neighbours", "2", "--pairs", "2")
METHODS = ("self_confidence", "normalized_margin", "confidence_weighted_entropy")
DATA = ("--data", "python:own.py:data", *SMALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def table(run: Path) -> list[dict[str, str]]:
    with open(run / "scores.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_module_of_a_file_has_the_scores_of_plain_autograd(folder):
    assert call("--model", "python:own.py:net", *DATA, "--name", "a") == 0
    rows, namespace = table(folder / "runs/examine/a"), {}
    exec(OWN, namespace)
    module, (images, labels) = namespace["net"]().eval(), namespace["data"]()
    assert len(rows) == 40 and (folder / "runs/examine/a/report.html").stat().st_size > 10**6
    for i in (0, 17, 39):
        logits = module(images[i : i + 1])
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels[i : i + 1]))
        gradients = torch.autograd.grad(loss, list(module.parameters()))
        names = [name for name, _ in module.named_parameters()]
        expected = {f"norm/{name}": float(g.norm()) for name, g in zip(names, gradients, strict=True)}
        expected |= {"loss": loss.item(), "norm": float(torch.cat([g.flatten() for g in gradients]).norm())}
        assert {name: float(rows[i][name]) for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert rows[i]["label"] == str(labels[i]) and rows[i]["predicted"] == str(int(logits.argmax()))
    assert call("--resume", "--name", "a") == 0 and table(folder / "runs/examine/a") == rows  # without a checkpoint


def test_parquet_has_the_columns_of_the_csv(folder):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    assert call("--model", "python:own.py:pure", *DATA, "--name", "a") == 0
    columns = parquet.read_table(folder / "runs/examine/a/scores.parquet").to_pydict()
    rows = table(folder / "runs/examine/a")
    assert list(columns) == list(rows[0]) and columns["loss"] == [float(row["loss"]) for row in rows]


def test_pure_function_and_only_some_parameters(folder, capsys):
    assert call("--model", "python:own.py:pure", *DATA, "--name", "a") == 0
    assert "640 parameters" in capsys.readouterr().out
    assert call("--model", "python:own.py:net", *DATA, "--only", "4.*", "--name", "b") == 0
    assert [name for name in table(folder / "runs/examine/b")[0] if "/" in name] == ["norm/4.bias", "norm/4.weight"]


@pytest.mark.parametrize(
    "flags, error",
    [
        (("--model", "resnet188"), "no net is named 'resnet188'; close to it: resnet18"),
        (("--model", "runs/nowhere"), "--model 'runs/nowhere' is no run's folder; expected one, a name, or python"),
        (("--weights", "file.pth"), "--weights 'file.pth' goes with --model timm:NAME or torchvision:NAME, not 'mlp'"),
        (("--model", "python:own.py:gone", *DATA), "'own.py' has no function 'gone'; it has"),
        (("--model", "python:gone.py:net", *DATA), "'gone.py' does not exist; expected python:FILE.py:FUNCTION"),
        (("--model", "python:own.py:number", *DATA), "returns a int; expected an nn.Module, or (params, apply)"),
        (("--model", "python:own.py:narrow", *DATA), "does not take the data, of shape (1, 8, 8): RuntimeError: mat1"),
        (("--model", "python:own.py:few", *DATA), "returns (2, 7) for 2 examples; expected (2, 10) logits"),
        (("--model", "python:own.py:net", "--data", "python:own.py:unlabelled"), "no labels"),
        (("--model", "python:own.py:net", *DATA, "--folds", "3"), "'python:own.py:net' has learned already"),
        (("--model", "python:own.py:net", *DATA, "--only", "head*"), "the pattern 'head*' fits no leaf"),
        (("--model", "python:own.py:net", *DATA, "--examples", "41"), "--examples is 41; the data has 40"),
    ],
    ids=lambda value: value[1].rpartition(":")[2] + value[-1].rpartition(":")[2] if isinstance(value, tuple) else "",
)
def test_refusals(folder, capfd, flags, error):
    assert error in refused(capfd, *flags)


def test_folder_that_cannot_be_written(folder, capfd):
    (folder / "runs").write_text("a file")
    assert "runs" in refused(capfd, "--model", "python:own.py:net", *DATA)


def test_picture_that_cannot_be_read_is_named_and_counted(folder, capsys, caplog):
    for label in ("cat", "dog"):
        (folder / "pictures" / label).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (12, 12), (40 * i, 200, 10)).save(folder / "pictures" / label / f"{i}.png")
    (folder / "pictures" / "cat" / "2.png").write_bytes(b"no picture")
    flags = ("--data", "pictures", "--size", "8", "--epochs", "1", "--batch", "4", "--workers", "0")
    assert call(*flags, *SMALL, "--name", "a") == 0
    run = folder / "runs/examine/a"
    names = [row["example"] for row in table(run)]
    assert "cat/2.png" not in names and result(run)["skipped"] == 1 == len(caplog.records)
    assert "2.png" in capsys.readouterr().out


def test_lines_of_text(folder):
    lines = [f"the {word} of the {other}" for word in ("sound", "light", "end") for other in ("day", "night", "sea")]
    (folder / "lines.txt").write_text("\n".join(["x", *lines]), encoding="utf-8")
    flags = ("--model", "gpt", "--data", "lines.txt", "--epochs", "2", "--batch", "3", *SMALL)
    assert call(*flags, "--name", "a") == 0
    rows = table(folder / "runs/examine/a")
    assert [row["text"] for row in rows] == lines  # one token has no next one
    assert "label" not in rows[0] and all(float(row["loss"]) > 0 for row in rows)


@pytest.mark.slow
def test_transformers_and_their_texts(folder):
    library = pytest.importorskip("transformers")
    texts = [f"{word} {other}" for word in ("good", "bad") for other in ("film", "book", "song", "play", "plot")]
    from train.data.text.subwords import train_word_piece

    train_word_piece(texts, 100, lower_case=True).save(folder / "tokenizer.json")
    tokens = {"tokenizer_file": "tokenizer.json", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    tokenizer = library.PreTrainedTokenizerFast(**tokens)
    sizes = {"vocab_size": len(tokenizer), "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8}
    names = {"id2label": {0: "neg", 1: "pos"}, "label2id": {"neg": 0, "pos": 1}}
    bert = library.BertForSequenceClassification(library.BertConfig(**sizes, **names, intermediate_size=16))
    gpt = library.GPT2LMHeadModel(
        library.GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=8, n_layer=1, n_head=2)
    )
    for name, model in {"bert": bert, "gpt": gpt}.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    lines = [f"{'pos' if 'good' in text else 'neg'}\t{text}" for text in texts]
    (folder / "texts.tsv").write_text("\n".join(["label\ttext", *lines]), encoding="utf-8")
    assert call("--model", "transformers:bert", "--data", "texts.tsv", *SMALL, "--name", "a") == 0
    for i, row in enumerate(table(folder / "runs/examine/a")):
        inputs = tokenizer(texts[i], return_tensors="pt")
        inputs.pop("token_type_ids", None)
        logits = bert.eval()(**inputs).logits
        label = torch.tensor([names["label2id"][row["label"]]])
        assert float(row["loss"]) == pytest.approx(torch.nn.functional.cross_entropy(logits, label).item(), rel=1e-4)
    assert call("--model", "transformers:gpt", "--data", "texts.tsv", *SMALL, "--name", "b") == 0
    for i, row in enumerate(table(folder / "runs/examine/b")):
        ids = tokenizer(texts[i], return_tensors="pt")["input_ids"]
        assert float(row["loss"]) == pytest.approx(gpt.eval()(ids, labels=ids).loss.item(), rel=1e-4)


@pytest.mark.slow
def test_published_architectures_with_a_state_dict(folder):
    models = pytest.importorskip("torchvision.models")
    for label in ("cat", "dog"):
        (folder / "pictures" / label).mkdir(parents=True)
        for i in range(6):
            noise = np.random.default_rng(i).integers(0, 255, (40, 40, 3), np.uint8)
            Image.fromarray(noise).save(folder / "pictures" / label / f"{i}.png")
    module = models.resnet18(num_classes=2)
    torch.save(module.state_dict(), folder / "weights.pth")
    flags = ("--model", "torchvision:resnet18", "--weights", "weights.pth", "--data", "pictures", "--size", "32")
    assert call(*flags, "--only", "fc*", *SMALL, "--name", "a") == 0
    assert len(table(folder / "runs/examine/a")) == 10  # a fifth is for testing


@pytest.mark.slow
def test_nets_of_runs(folder):
    assert runs.call("classify", "--epochs", "1", "--no-compile", "--name", "a") == 0
    assert call("--model", "runs/classify/a", "--data", "digits", "--examples", "80", *SMALL, "--name", "a") == 0
    figures = result(folder / "runs/examine/a")
    assert figures["examples"] == 80 and 0 < figures["accuracy"] <= 1
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    assert runs.call("gpt", *QUICK, "--steps", "3", "--name", "a") == 0
    lines = [TEXT[start : start + 8] for start in (0, 10, 20)]
    (folder / "lines.txt").write_text("\n".join([*lines, "\u4eca\u65e5"]), encoding="utf-8")  # unknown characters
    assert call("--model", "runs/gpt/a", "--data", "lines.txt", *SMALL, "--name", "b") == 0
    assert len(table(folder / "runs/examine/b")) == 3 and result(folder / "runs/examine/b")["skipped"] == 1


@pytest.mark.slow
def test_wrong_labels_are_ranked_as_well_as_by_cleanlab(folder, monkeypatch):
    """Average precision over five seeds: suspicion, and cleanlab's qualities by the same held-out probabilities."""
    rank = pytest.importorskip("cleanlab.rank", reason="cleanlab is not installed")
    held_out, kept = cross_validation.held_out, []
    monkeypatch.setattr(cross_validation, "held_out", lambda *args: kept.append(held_out(*args)) or kept[-1])
    ours, theirs = [], []
    for seed in range(5):
        assert call("--seed", seed, "--name", seed, *SMALL) == 0
        rows = table(folder / "runs" / "examine" / str(seed))
        labels, wrong = np.array([int(row["label"]) for row in rows]), [row["made_wrong"] == "True" for row in rows]
        suspicion = [float(row["suspicion"]) for row in rows]
        probabilities = kept[seed].exp().double().numpy()
        probabilities /= probabilities.sum(1, keepdims=True)
        precision = functools.partial(sklearn.metrics.average_precision_score, wrong)
        ours.append(precision(suspicion))
        quality = [rank.get_label_quality_scores(labels, probabilities, method=name) for name in METHODS]
        theirs.append([precision(-x) for x in quality])
    print(np.round(ours, 4), np.round(theirs, 4).tolist())
    assert np.all(np.mean(ours) >= np.mean(theirs, 0))
