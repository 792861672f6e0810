"""finetune_text.py: predictions, explanations, adapters in peft's hands, the study by removal."""

import dataclasses
import functools
import io
import json
import math
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from core import random, tree
from core import spec as specs
from experiments.parts import attributions, encoder_classifier, influences, removal
from experiments.parts import encoder as encoders
from experiments.parts.encoder import Encoder, Tuning
from experiments.parts.influences import Read
from nets.language import bert
from tests.experiments import runs
from tests.experiments.test_encoder import minilm
from tests.registry.experiments import encoders as rows
from train.data.text.labelled import Records
from train.data.text.subwords import train_word_piece
from train.run import open_run

SETS = Path(os.environ.get("FUNCTREE_DATA", ""))
call = functools.partial(runs.call, "finetune_text")
ROOT = Path("runs/finetune_text")
DATA = ("--data", "reviews.jsonl", *rows.COLUMNS)
TEXTS = ("a fine and moving film", "dull and much too long", "funny from start to end", "neither funny nor moving")
close = torch.testing.assert_close


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a run `a` from scratch, and `b`, adapters on weights in the form of transformers, in `bert`."""
    folder = tmp_path_factory.mktemp("finetune_text")
    rows.labelled(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        published(folder / "bert")
        assert call(*DATA, *rows.SMALL, "--no-compile", "--name", "a") == 0
        flags = ("--weights", "bert", "--lora", "2", "--longest", "16", "--batch", "6", "--epochs", "1")
        assert call(*DATA, *flags, "--learning-rate", "0.01", "--no-compile", "--name", "b") == 0
    return folder


def published(folder: Path) -> None:
    """A small random BERT as transformers saves it, with its tokenizer."""
    from transformers import BertConfig, BertModel

    tokenizer = train_word_piece(TEXTS, 80, lower_case=True)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=tokenizer.vocabulary_size, **sizes)).save_pretrained(folder)
    tokenizer.save(folder / "tokenizer.json")


def model_of(name: str) -> encoder_classifier.Classifier:
    return encoder_classifier.load(open_run(ROOT / name, ROOT, "best"))


def small(kind: str = "bert", **options) -> Encoder:
    """An encoder with random weights, large enough that its logits differ."""
    tokenizer = train_word_piece(TEXTS, 60, lower_case=True)
    sizes = {"context": 16, "layers": 2, "heads": 2, "width": 8, "hidden": 16, "classes": 3, "dropout": 0.0}
    cfg = bert.Config(tokenizer.vocabulary_size, head="sequence", **sizes, **options)
    params = tree.map(lambda leaf: 10 * leaf, specs.init(random.key(0), bert.spec(cfg)))
    params = tree.map_with_names(lambda name, x: x / 10 if "norm" in name else x, params)
    return Encoder(kind, params, cfg, tokenizer)


def test_figures_stand_beside_those_without_a_net(here):
    result = runs.result(ROOT / "a")
    assert {"accuracy", "calibration_error", "tf_idf_accuracy", "commonest_class_accuracy"} <= result.keys()
    assert result["tf_idf_unit"] == "words" and result["skipped"] == 2  # no JSON, no tokens
    assert result["attribution_error"] < 1e-3
    lora = runs.result(ROOT / "b")
    assert lora["trained_parameters"] < lora["parameters"]


def test_predict_reads_texts_files_and_standard_input(here, monkeypatch, capsys):
    (here / "lines.txt").write_text("a moving film\n\ndull\n", encoding="utf-8")
    capsys.readouterr()
    assert call("predict", "--run", ROOT / "a", "--file", "lines.txt", "--count", "9") == 0
    first = capsys.readouterr()
    assert first.err == "1 empty line is left out\n"
    for line, text in zip(first.out.splitlines(), ("a moving film", "dull"), strict=True):
        name, high, other, low, shown = line.split("\t")
        assert {name, other} == {"0", "1"} and shown == text
        assert float(high) >= float(low) and math.isclose(float(high) + float(low), 1, abs_tol=2e-4)
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(b"a moving film\n\ndull\n")))
    assert call("predict", "--run", ROOT / "a", "--count", "9") == 0
    assert capsys.readouterr().out == first.out


def test_evaluation_is_that_of_the_run(here):
    assert call("evaluate", "--run", ROOT / "b") == 0
    own = json.loads((ROOT / "b" / "evaluations" / "test" / "result.json").read_text(encoding="utf-8"))
    assert {name: runs.result(ROOT / "b")[name] for name in ("accuracy", "nll")}.items() <= own.items()
    assert call("predict", "--run", ROOT / "b", "bytes \udcff of no text") == 0


def test_prediction_does_not_depend_on_the_batch(here):
    model = model_of("b")
    together = encoder_classifier.classify(model, TEXTS)
    alone = torch.cat([encoder_classifier.classify(model, [text]) for text in TEXTS])
    close(together, alone, rtol=0, atol=1e-5)


def test_a_run_is_the_beginning_of_another(here):
    assert call(*DATA, "--weights", ROOT / "a", "--longest", "16", "--epochs", "1", "--no-compile", "--name", "c") == 0
    first, second = (open_run(ROOT / name, ROOT).config for name in "ac")
    assert first["net"]["width"] == second["net"]["width"] and second["encoder"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_are_pefts(here):
    """peft puts the adapters and the head of the run on transformers' classifier, with the same logits."""
    peft = pytest.importorskip("peft")
    from transformers import BertForSequenceClassification

    base = BertForSequenceClassification.from_pretrained("bert", num_labels=2)
    theirs = peft.PeftModel.from_pretrained(base, str(ROOT / "b" / "adapter")).eval()
    model = model_of("b")
    tokens, lengths = encoders.tokens_of(model.encoder, TEXTS, 16)
    mask = encoders.mask_of(tokens, lengths)
    with torch.no_grad():
        expected = theirs(input_ids=tokens, attention_mask=mask.long()).logits.log_softmax(-1)
    close(encoder_classifier.classify(model, TEXTS), expected, rtol=0, atol=1e-5)


SIZES = {"BertConfig": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}}
SIZES["RobertaConfig"] = SIZES["BertConfig"] | {"type_vocab_size": 1, "pad_token_id": 1}
SIZES["DistilBertConfig"] = {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 64}


@pytest.mark.parametrize("config", SIZES)
@pytest.mark.parametrize("head", ["sequence", "tokens", "spans"])
def test_adapters_lie_where_transformers_looks(config, head, tmp_path):
    """peft ignores, in silence, a head under another name."""
    import transformers

    kind, tokenizer = config.removesuffix("Config").lower(), train_word_piece(TEXTS, 80)
    name = {"sequence": "SequenceClassification", "tokens": "TokenClassification", "spans": "QuestionAnswering"}[head]
    sizes = SIZES[config] | {"vocab_size": tokenizer.vocabulary_size}
    theirs = getattr(transformers, config.replace("Config", f"For{name}"))(getattr(transformers, config)(**sizes))
    theirs.save_pretrained(tmp_path)
    tokenizer.save(tmp_path / "tokenizer.json")
    args = Tuning(weights=str(tmp_path), lora=2)
    encoder = encoders.load(args, (), head, 2, key=random.key(0))
    assert encoder.kind == kind
    encoders.write_adapters(tmp_path, encoder, args, encoders.trainable(encoder, args, random.key(1)).values)
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    modules = dict(theirs.named_modules())
    for entry in written:
        module = entry.removeprefix("base_model.model.").partition(".lora_")[0]
        assert module.removesuffix(".weight").removesuffix(".bias") in modules, entry


@pytest.mark.parametrize("options", [{}, {"positions": "tokens", "padding_id": 1}, {"types": 0}])
def test_attributions_are_of_the_nets_own_logits(options):
    encoder = small(**options)
    text = TEXTS[0]
    ids, _ = encoders.tokens_of(encoder, [text], 16)
    close(
        attributions._logits(encoder, encoder.params["tokens"]["weight"][ids[0]]),
        encoder.net.apply(encoder.params, ids, encoder.cfg)[0],
    )
    out = attributions.attribute(encoder, text, 1, 16, 64)
    assert "".join(out.pieces) == text and abs(sum(out.values) - out.difference) < 1e-2 * abs(out.difference) + 1e-4
    few = attributions.attribute(encoder, text, 1, 16, 2)
    assert few.error > out.error


def test_what_the_net_does_not_see_has_no_value():
    out = attributions.attribute(small(), TEXTS[1], 0, 4)
    assert "".join(out.pieces) == TEXTS[1] and math.isnan(out.values[-1])
    with pytest.raises(ValueError, match="has no tokens"):
        attributions.attribute(small(), "\u200b", 0, 16)


def test_tokens_that_share_letters_are_one_piece():
    offsets, special = [(0, 0), (1, 2), (1, 2), (2, 4), (0, 0)], [True, False, False, False, True]
    assert attributions.in_pieces(" é ab", offsets, special, [9, 1, 2, 3, 9])[0] == [" ", "é", " a", "b"]
    pieces, values = attributions.in_pieces("éab", [(0, 1), (0, 1), (1, 3)], [False] * 3, [1, 2, 4])
    assert pieces == ["é", "ab"] and values == [3, 4]


def example_gradients(loss, params, count):
    """Gradient of each example's loss by plain autograd: (count, parameters)."""
    out = []
    for i in range(count):
        leaves = [leaf.clone().requires_grad_() for leaf in tree.leaves(params)]
        gradients = torch.autograd.grad(loss(tree.unflatten(params, leaves), i), leaves, allow_unused=True)
        zeros = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True)]
        out.append(torch.cat([g.flatten() for g in zeros]))
    return torch.stack(out)


def test_support_of_a_head():
    """Inner products and cosines of gradients one by one; the influence by a dense Gauss-Newton matrix."""
    encoder = small()
    head = influences.head_of(encoder, encoder.params)
    train = Read(random.normal(random.key(1), (7, 8)), torch.tensor([0, 1, 2, 0, 1, 2, 0]))
    test = Read(random.normal(random.key(2), (1, 8)), torch.tensor([1]))

    def single(data):
        def loss(params, i):
            logits = bert.outputs(params, data.states[i : i + 1, None], encoder.cfg)
            return F.cross_entropy(logits, data.labels[i : i + 1])

        return loss

    ours, theirs = example_gradients(single(train), head, 7), example_gradients(single(test), head, 1)[0]
    dots = ours @ theirs
    close(influences.head_support(encoder, head, train, test, "gradient", 1.0), dots, rtol=1e-4, atol=1e-5)
    cosines = dots / (ours.norm(dim=1) * theirs.norm())
    close(influences.head_support(encoder, head, train, test, "cosine", 1.0), cosines, rtol=1e-4, atol=1e-5)

    def logits_of(vector):
        parts = vector.split([leaf.numel() for leaf in tree.leaves(head)])
        leaves = [x.reshape(y.shape) for x, y in zip(parts, tree.leaves(head), strict=True)]
        return bert.outputs(tree.unflatten(head, leaves), train.states[:, None], encoder.cfg)

    flat = torch.cat([leaf.flatten() for leaf in tree.leaves(head)])
    jacobian = torch.func.jacrev(logits_of)(flat)  # (7, classes, parameters)
    p = logits_of(flat).softmax(-1)
    curved = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    matrix = torch.einsum("ncp,ncd,ndq->pq", jacobian, curved, jacobian) / 7
    damped = matrix + 0.1 * torch.eye(len(matrix))
    expected = ours @ torch.linalg.solve(damped, theirs) / 7
    out = influences.head_support(encoder, head, train, test, "influence", 0.1)
    close(out, expected, rtol=0, atol=5e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["a", "b"])
def test_support_by_all_that_was_trained(here, name):
    """All weights, and adapters with the head: as one gradient after the other."""
    run = open_run(ROOT / name, ROOT, "best")
    model = encoder_classifier.load(run)
    base, parts, values = encoders.finetuned_parts(run)
    records = Records(TEXTS, ("0", "1", "1", "0"))
    _, data, _ = encoder_classifier.encoded(model.encoder, records, model.classes, 16, "record")
    test = tree.map(lambda x: x[:1], data)

    def loss(params, i):
        mask = encoders.mask_of(data.tokens, data.lengths)[i : i + 1]
        logits = base.net.apply(parts.whole(params), data.tokens[i : i + 1], base.cfg, mask=mask)
        return F.cross_entropy(logits, data.labels[i : i + 1])

    gradients = example_gradients(loss, values, 4)
    for score, expected in (
        ("gradient", gradients @ gradients[0]),
        ("cosine", F.cosine_similarity(gradients, gradients[:1])),
    ):
        support = influences.supporter(run, model, data, score, "trained", 0.1)
        close(support(test), expected, rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="expected gradient or cosine"):
        influences.supporter(run, model, data, "influence", "trained", 0.1)


def test_explanation(here, capsys):
    capsys.readouterr()
    assert call("explain", "--run", ROOT / "b", "a fine and moving film", "--count", "2", "--out", "why") == 0
    out = capsys.readouterr().out
    assert "tokens: " in out and "for it, by influence:" in out and "against it, by influence:" in out
    assert (here / "why" / "explanation.txt").read_text(encoding="utf-8") in out
    page = (here / "why" / "explanation.html").read_text(encoding="utf-8")
    assert "moving" in page and "for it: " in page and runs.is_png(here / "why" / "explanation.png")
    page = (here / "why" / "report.html").read_text(encoding="utf-8")
    assert "Texts that speak most for it" in page and '"rank":"support_1"' in page
    assert call("explain", "--run", ROOT / "b", "\u200b") == 2
    assert "has no tokens; expected a text" in capsys.readouterr().err


def test_data_that_has_changed_is_refused(here, capsys):
    path = here / "reviews.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("number 7", "number 77"), encoding="utf-8")
    for command in ("explain", "evaluate"):
        capsys.readouterr()
        assert call(command, "--run", ROOT / "a") == 2
        assert "'reviews.jsonl' has changed since 'runs/finetune_text/a' was trained on it" in capsys.readouterr().err


def test_removal_of_what_helps_hurts():
    """A tenth of the labels is wrong: without these the accuracy rises, without as many of the best it falls."""
    encoder = small()
    encoder = encoder._replace(cfg=dataclasses.replace(encoder.cfg, classes=2))
    states = random.normal(random.key(3), (120, 8))
    labels = (states[:, 0] > 0).long()
    flipped = torch.arange(120) % 10 == 0
    train = Read(states, torch.where(flipped, 1 - labels, labels))
    other = random.normal(random.key(4), (400, 8))
    rest = Read(other, (other[:, 0] > 0).long())
    recipe = removal.Recipe(8.0, 20, 0.03)
    parts = {"train": train, "validation": rest, "test": rest}
    seeds = [removal.removals(encoder, parts, 0.2, recipe, "influence", 0.1, random.key(i)) for i in range(2)]
    changes = removal.summary(seeds)["test"]
    helpful, harmful = (changes[f"without most {name}"] for name in ("helpful", "harmful"))
    assert max(helpful) < 0 < min(harmful)
    assert "without most helpful" in removal.table(removal.summary(seeds), 0.2)


def test_influence_study(here, capsys):
    flags = ("--weights", ROOT / "a", *DATA, "--longest", "16", "--epochs", "1", "--batch", "8", "--seeds", "2")
    assert call("influence-study", *flags) == 0
    folder = ROOT / "influence-study"
    changes = json.loads((folder / "result.json").read_text(encoding="utf-8"))["changes"]
    assert len(changes["test"]["all"]) == 2 and (folder / "removal.png").exists()
    assert call("influence-study", "--weights", ROOT / "a", *DATA, "--seeds", "1") == 2
    assert "--seeds is 1; expected at least 2" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.skipif(not os.environ.get("FUNCTREE_DATA"), reason="FUNCTREE_DATA names no folder of public data")
def test_sst2_fine_tuned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = SETS / "text_cls_en" / "stsa.binary.train"
    assert call("--data", source, "--weights", minilm(), "--shapes", "8", "--no-compile", "--name", "a") == 0
    result = runs.result(ROOT / "a")
    assert result["accuracy"] >= 0.88 > 0.82 > result["tf_idf_accuracy"] > 0.80
