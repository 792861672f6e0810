"""pretrain.py: its objectives, what is loaded from its runs, the three losses beside torch's; the default's figures."""

import dataclasses
import functools
import io
import math
import os
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from core import random, tree
from experiments import pretrain
from experiments.parts import distillation, encoder_attention, filling, pretraining
from experiments.parts import encoder as encoders
from experiments.parts.encoder import Tuning
from experiments.pretrain import OBJECTIVES, Args
from tests.experiments import runs
from tests.experiments.runs import is_png
from tests.experiments.test_laws import final_state
from tests.registry.experiments import language as rows
from train.data.text import masking
from train.run import checkpoints, open_run

call = functools.partial(runs.call, "pretrain")
SETS = Path(os.environ.get("FUNCTREE_DATA", ""))
NET = ("--vocabulary", "300", "--layers", "2", "--width", "32")
DATA = ("--data", "text.txt", "--context", "24")
SMALL = (*DATA, "--batch", "2", "--steps", "6", "--eval-every", "3", "--save-every", "3", "--no-compile")
OTHERS = {
    "c": (*NET, "--objective", "causal"),
    "l": (*NET, "--objective", "causal", "--net", "llama"),
    "s": (*NET, "--objective", "span"),
    "d": ("--objective", "distil", "--teacher", "runs/pretrain/a", "--lines"),
    "lora": ("--weights", "runs/pretrain/a", "--lora", "2"),
    "published": ("--weights", "published"),
    "headless": ("--objective", "distil", "--teacher", "published/body"),
}
RUNS = Path("runs/pretrain")


def publish(folder: Path) -> None:
    """Files as transformers writes them: a BERT with a head for masked tokens, and in body/ one without."""
    run = encoders.of_finetuned(open_run(RUNS / "a", RUNS))
    sizes = {"vocab_size": run.cfg.vocabulary, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 1}
    config = transformers.BertConfig(**sizes, intermediate_size=64, max_position_embeddings=64)
    torch.manual_seed(0)
    for place, kind in ((folder, transformers.BertForMaskedLM), (folder / "body", transformers.BertModel)):
        kind(config).save_pretrained(place)
        run.tokenizer.save(place / "tokenizer.json")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a run of each objective."""
    folder = tmp_path_factory.mktemp("pretrain")
    rows.text(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call(*NET, *SMALL, "--name", "a") == 0
        publish(Path("published"))
        for name, flags in OTHERS.items():
            assert call(*flags, *SMALL, "--name", name) == 0, name
    return folder


@pytest.mark.parametrize("name", OTHERS)
def test_resumed_run_ends_with_the_same_bits(name, here):
    folder, whole = RUNS / name, runs.result(RUNS / name)
    state = final_state(folder)
    shutil.rmtree(folder / "checkpoints" / "6")
    assert checkpoints.latest(folder / "checkpoints") == 3
    assert call("--resume", "--name", name) == 0
    assert runs.same_bits(final_state(folder), state)
    again = runs.result(folder)
    assert {k: v for k, v in whole.items() if k != "seconds"} == {k: v for k, v in again.items() if k != "seconds"}


def test_figures_stand_beside_those_without_a_net(here):
    for name in ("a", *OTHERS):
        result = runs.result(RUNS / name)
        if name == "headless":
            assert {"embedding_cosine", "mean_embedding_cosine", "untrained_embedding_cosine"} <= result.keys()
            assert "val_loss" not in result
            continue
        assert {"val_loss", "accuracy", "unigram_entropy", "commonest_token_accuracy"} <= result.keys()
        assert abs(result["val_loss"] - math.log(300)) < 3 and result["unigram_entropy"] < math.log(300)
    student = runs.result(RUNS / "d")
    assert {"cosine", "soft", "teacher_val_loss", "untrained_val_loss"} <= student.keys()
    assert student["untrained_cosine"] != student["cosine"]  # steps overwrite their state, not the teacher


def test_encoders_of_runs_are_fine_tuned(here):
    """The encoder of a run has its weights, whatever the objective, with any head."""
    for name in ("a", "d", "headless", "published"):
        run = open_run(RUNS / name, RUNS)
        trained = encoders.of_finetuned(run)
        encoder = encoders.of_run(RUNS / name, "sequence", 3, key=random.key(0))
        loaded = encoders.load(Tuning(weights=str(RUNS / name), longest=24), (), "tokens", 3, key=random.key(0))
        for each in (encoder, loaded):
            body = {k: x for k, x in tree.items(each.params) if k.partition(".")[0] not in ("classifier", "pooler")}
            old = dict(tree.items(trained.params))
            assert body and all(torch.equal(x, old[k]) for k, x in body.items())
        assert encoder.cfg.head == "sequence" and encoder.cfg.layers == trained.cfg.layers
        tokens, lengths = encoders.tokens_of(encoder, ["the lazy dogs", "foxes"], 24)
        logits = encoder.net.apply(encoder.params, tokens, encoder.cfg, mask=encoders.mask_of(tokens, lengths))
        assert logits.shape == (2, 3)
    for name in ("c", "s"):
        with pytest.raises(ValueError, match="is no run with an encoder"):
            encoders.of_run(RUNS / name, "sequence", 2, key=random.key(0))


def test_weights_go_on_where_they_were(here):
    """A run's own head is kept, and a published one's; another one is drawn, which is said."""
    args = dataclasses.replace(Args(data="text.txt", context=24), weights="runs/pretrain/a")
    task = OBJECTIVES["masked"](args, None, random.key(5))
    trained = encoders.of_finetuned(open_run(RUNS / "a", RUNS))
    assert runs.same_bits(task.values, trained.params) and task.facts["head"] is None
    task = OBJECTIVES["masked"](dataclasses.replace(args, weights="published/body"), None, random.key(5))
    assert "drawn anew" in task.facts["head"]
    theirs = transformers.BertForMaskedLM.from_pretrained("published").eval()
    net = OBJECTIVES["masked"](dataclasses.replace(args, weights="published"), None, random.key(5))
    batch = next(net.held_out_batches(1))
    labels = torch.full_like(batch.tokens, -100).scatter(1, batch.positions, batch.targets.where(batch.counted, -100))
    with torch.no_grad():
        expected = theirs(batch.tokens, labels=labels).loss
    nats, number = (part.sum() for part in pretraining.total_of(net.score(net.values, batch)))
    torch.testing.assert_close(nats / number, expected)


def test_adapters_are_merged(here):
    base, tuned = (encoders.of_finetuned(open_run(RUNS / name, RUNS)) for name in ("a", "lora"))
    old, new = (dict(tree.items(each.params)) for each in (base, tuned))
    assert not torch.equal(old["blocks.0.attn.qkv.weight"], new["blocks.0.attn.qkv.weight"])
    assert torch.equal(old["tokens.weight"], new["tokens.weight"])
    assert not torch.equal(old["masked_tokens.bias"], new["masked_tokens.bias"])
    assert (RUNS / "lora" / "adapter" / "adapter_config.json").exists()
    assert call("evaluate", "--run", RUNS / "lora") == 0
    figures = runs.result(RUNS / "lora" / "evaluations" / "held_out")
    assert math.isclose(figures["val_loss"], runs.result(RUNS / "lora")["val_loss"], rel_tol=1e-6)
    shutil.rmtree(RUNS / "a")
    shutil.copytree(RUNS / "published", RUNS / "a")  # other weights under the adapters
    assert call("evaluate", "--run", RUNS / "lora") == 2


def test_three_losses_are_those_of_torch(here):
    """Sums, means and weights as in the authors' training: `batchmean` over tokens that are no padding."""
    args = Args("distil", data="text.txt", lines=True, context=12, teacher="published", layers=1)
    task = OBJECTIVES["distil"](args, None, random.key(0))
    tokens = torch.tensor([[2, 9, 10, 11, 12, 13, 3], [2, 40, 41, 3, 0, 0, 0]])
    marks = masking.marks_of(task.tokenizer)
    batch = masking.mask_tokens(random.split(random.key(1)), tokens, marks, 0.4)
    assert batch.counted.sum() >= 2
    loss, parts = task.loss(task.values, batch, random.split(random.key(2)))

    teacher, _ = pretraining.open_encoder("published")
    real = batch.tokens != 0
    outputs = []
    for net, params in ((task.net(task.values), task.values), (teacher, teacher.params)):
        hidden = net.net.features(params, batch.tokens, net.cfg)
        outputs.append((hidden[real], net.net.token_logits(params, hidden, net.cfg)))
    (hidden, logits), (taught_hidden, taught) = outputs
    soft = nn.KLDivLoss(reduction="batchmean")(
        nn.functional.log_softmax(logits[real] / 2, -1), nn.functional.softmax(taught[real] / 2, -1)
    )
    labels = torch.full_like(tokens, -100).scatter(1, batch.positions, batch.targets.where(batch.counted, -100))
    masked = nn.CrossEntropyLoss()(logits.flatten(0, 1), labels.flatten())
    cosine = nn.CosineEmbeddingLoss()(hidden, taught_hidden, torch.ones(len(hidden)))
    torch.testing.assert_close(parts["soft"], 4 * soft)
    torch.testing.assert_close(parts["masked"], masked)
    torch.testing.assert_close(parts["hidden"], cosine)
    torch.testing.assert_close(loss, 5 * 4 * soft + 2 * masked + cosine)


def test_students_begin_with_layers_of_the_teacher():
    assert distillation.student_layers(12, 6) == [0, 2, 4, 7, 9, 11]  # DistilBERT's
    assert distillation.student_layers(6, 3) == [0, 2, 5] and distillation.student_layers(4, 4) == [0, 1, 2, 3]
    assert distillation.student_layers(4, 1) == [0]


def test_a_student_of_all_layers_is_its_teacher(here):
    args = Args("distil", data="text.txt", lines=True, context=24, teacher="published/body", layers=2)
    task = OBJECTIVES["distil"](args, None, random.key(0))
    figures, by_position = pretraining.measure(task, task.values)
    assert figures == {"cosine": pytest.approx(1, abs=1e-6), "embedding_cosine": pytest.approx(1, abs=1e-6)}
    assert by_position == []


def test_lines_are_examples(here):
    """Padding is neither seen nor predicted; special tokens are no part of the baselines."""
    args = Args(data="text.txt", lines=True, context=24, vocabulary=300, layers=1, width=32, batch=4)
    task = OBJECTIVES["masked"](args, None, random.key(0))
    batch = next(task.batches(random.key(1), range(1), 4))
    assert (batch.tokens[:, 0] == 2).all() and not (batch.targets[batch.counted] < 5).any()
    assert len(task.examples.held_out_rows.lengths) + len(task.examples.rows.lengths) == 40
    assert not torch.isin(task.examples.train, torch.arange(5)).any()
    scores = task.score(task.values, batch)
    wide = torch.nn.functional.pad(batch.tokens, (0, 5))
    torch.testing.assert_close(task.score(task.values, batch._replace(tokens=wide)).nats, scores.nats)


def test_each_epoch_has_other_masks(here):
    task = OBJECTIVES["masked"](Args(data="text.txt", context=24, vocabulary=300, width=32), None, random.key(0))
    first = [next(task.batches(random.key(1), range(t, t + 1), 2)) for t in (3, 3, 4)]
    assert runs.same_bits(first[0]._asdict(), first[1]._asdict())
    assert not torch.equal(first[0].positions, first[2].positions)


def test_fill(here, monkeypatch, capsys):
    capsys.readouterr()
    assert call("fill", "--run", RUNS / "a", "The [MASK] brown foxes", "--top", "3") == 0
    first, words = capsys.readouterr().out.splitlines()
    assert first.startswith("The ") and first.endswith(" brown foxes") and words.count("%") == 3
    (here / "lines.txt").write_text("The [MASK]\n\nno mask\n[MASK] [MASK]\n", encoding="utf-8")
    assert call("fill", "--weights", "published", "--file", "lines.txt") == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 5 and err == "left out: 'no mask' has no [MASK]\n"
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(b"the [MASK]\n")))
    assert call("fill", "--run", RUNS / "d") == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert call("fill", "--run", RUNS / "s", "The [MASK] brown [MASK]", "the <extra_id_0>") == 0
    assert len(capsys.readouterr().out.splitlines()) == 5
    for argv, error in (
        (("--run", RUNS / "a", "no mask"), "no text could be filled in: 'no mask' has no [MASK]"),
        (("--run", RUNS / "a", "word " * 200 + "[MASK]"), "masks beyond the 128 tokens that the net sees"),
        (("--run", RUNS / "a", "a [MASK]", "--file", "lines.txt"), "there are texts and a --file"),
        (("--run", RUNS / "s", "no mask"), "has no [MASK] or <extra_id_0>"),
        (("--run", RUNS / "s", "[MASK] " * 101), "has 101 masks; the net has no <extra_id_100>"),
        (("--run", RUNS / "c", "[MASK]"), "is causal, and writes on from a text; use: python experiments/generate.py"),
        (("--run", RUNS / "headless", "[MASK]"), "has no head for masked tokens"),
        (("--weights", "published/body", "[MASK]"), "has no head for masked tokens"),
        (("[MASK]",), "expected either --run DIR or --weights SOURCE"),
    ):
        assert call("fill", *argv) == 2
        assert error in capsys.readouterr().err.splitlines()[-1]


def test_attention_of_a_text(here, capsys):
    text, out = "The quick brown foxes", here / "heads.png"
    assert call("attention", text, "--run", RUNS / "a") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:14].strip() for line in lines[:-1]] == [
        "previous token",
        "next token",
        "itself",
        "first token",
        "last token",
    ]
    assert is_png(RUNS / "a" / "attention_of_text.png") and "2 layers of 1 heads" in lines[-1]
    assert call("attention", text, "--weights", "published/body", "--heads", "2.1", "--out", out) == 0 and is_png(out)
    capsys.readouterr()
    for argv, error in (
        ((text, "--run", RUNS / "a", "--heads", "1.2"), "there is no head '1.2'; expected LAYER.HEAD, up to 2.1"),
        ((text, "--run", RUNS / "a", "--heads", "0.1"), "there is no head '0.1'"),
        ((text, "--run", RUNS / "a", "--heads", "first"), "there is no head 'first'"),
        ((text, "--run", RUNS / "a", "--out", out), "exists already"),
        (("word " * 200, "--run", RUNS / "a"), "the text has more than 64 tokens; expected a sentence"),
        ((text, "--run", RUNS / "c"), "'runs/pretrain/c'"),
        ((text, "--run", "nowhere"), "'nowhere' is not the folder of a run"),
        ((text,), "expected either --run DIR or --weights SOURCE"),
    ):
        assert call("attention", *argv) == 2
        assert error in capsys.readouterr().err.splitlines()[-1]


def test_the_typical_heads():
    previous, rest = torch.zeros(4, 4), torch.full((4, 4), 0.25)
    previous[torch.arange(4), torch.tensor([0, 0, 1, 2])] = 1.0
    weights = torch.stack([rest, previous, previous.flip(0, 1), torch.eye(4)]).unflatten(0, (2, 2))
    heads = encoder_attention.typical(weights)
    assert heads["previous token"] == (0, 1, 1.0) and heads["next token"] == (1, 0, 1.0)
    assert heads["itself"] == (1, 1, 1.0) and heads["first token"] == (0, 1, 0.5)
    assert set(encoder_attention.typical(weights[..., :1, :1])) == {"itself", "first token", "last token"}


def test_words_go_where_the_masks_are(here):
    assert filling._inserted("a [M] b[M] [M]", "[M]", [" x", "y", " z"]) == "a x by z"
    assert filling._inserted("[M]ing", "[M]", ["do"]) == "doing"


def test_causal_and_span_runs_write(here, capsys):
    for name in ("c", "l", "s"):
        flags = ("--prompt", "the quick", "--max-new-tokens", "3")
        assert runs.call("generate", "sample", "--run", RUNS / name, *flags) == 0
        assert "--- sample 1" in capsys.readouterr().out
    assert runs.call("generate", "sample", "--run", RUNS / "a", "--prompt", "the") == 2
    assert "writes no text; use: python experiments/pretrain.py fill --run runs/pretrain/a" in capsys.readouterr().err
    task = OBJECTIVES["span"](Args("span", data="text.txt", context=24, weights="runs/pretrain/s"), None, random.key(0))
    assert runs.same_bits(task.values, final_state(RUNS / "s")["params"])
    assert call("--objective", "causal", "--weights", RUNS / "s", *SMALL) == 2
    assert "of another kind of net; expected gpt2 or llama" in capsys.readouterr().err


def test_attention_maps_are_distributions(here):
    net = encoders.of_finetuned(open_run(RUNS / "a", RUNS))
    maps = filling.attention_maps(net, torch.tensor([[2, 8, 9, 3, 0]]))
    assert maps.shape == (1, 2, 1, 5, 5) and not maps[..., 4].any()
    torch.testing.assert_close(maps.sum(-1), torch.ones(1, 2, 1, 5))
    torch.testing.assert_close(maps, theirs(net, torch.tensor([[2, 8, 9, 3, 0]])))


def theirs(net, tokens):
    """The same of transformers' BERT."""
    sizes = {"vocab_size": net.cfg.vocabulary, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 1}
    config = transformers.BertConfig(**sizes, intermediate_size=128, max_position_embeddings=128)
    config._attn_implementation = "eager"
    module = transformers.BertModel(config, add_pooling_layer=False).eval()
    targets = dict(module.named_parameters())
    with torch.no_grad():
        for name, rename in net.net.rename_table(net.cfg).items():
            parts = dict(tree.items(net.params))[name].chunk(len(rename.names))
            for target, value in zip(rename.names, parts, strict=True):
                if target in targets:
                    targets[target].copy_(value)
        return torch.stack(module(tokens, tokens != 0, output_attentions=True).attentions, 1)


@pytest.mark.long
def test_default_is_well_below_the_unigram_entropy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("--name", "a") == 0
    result = runs.result(RUNS / "a")
    assert result["val_loss"] < result["unigram_entropy"] - 0.7
    assert result["accuracy"] > 2 * result["commonest_token_accuracy"]


def test_presets():
    assert pretrain.presets({}) == Args() and pretrain.presets({"objective": "distil"}).objective == "distil"
    assert pretrain.presets({"weights": "a"}).learning_rate < Args().learning_rate
