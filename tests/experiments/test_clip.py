"""clip.py: its loss and embeddings against transformers', search, classes, true and false, bad records, small data."""

import csv
import functools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from core import random, spec, tree
from experiments.parts import caption_scenes, picture_pairs, picture_search, picture_task, picture_text
from nets.multimodal import clip
from tests.experiments import runs
from tests.nets.multimodal.test_clip import IMAGE, TEXT
from tests.registry.experiments.picture_text import SMALL, files
from train.data.text import clip_pairs
from train.run import open_run
from train.step import make_step, start

call = functools.partial(runs.call, "clip")
RUN = Path("runs/clip/a")
TEXTS = ("a red square, top left", "A  green SQUARE; bottom right", "something blue")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a run called `a`, and published weights of transformers in `weights`."""
    folder = tmp_path_factory.mktemp("clip")
    files(folder)
    published(folder / "weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call(*SMALL, "--no-compile", "--name", "a") == 0
    return folder


def published(folder):
    """A small random CLIP of transformers, with its tokenizer, whose pieces are those of the captions."""
    pieces = clip_pairs.train_clip_pairs(TEXTS * 2, 560).tokenizer
    merges = [tuple(pair) for pair in json.loads(pieces.to_str())["model"]["merges"]]
    tokenizer = transformers.CLIPTokenizer(pieces.get_vocab(), merges)
    size, end = len(tokenizer), tokenizer.eos_token_id
    text = TEXT | {"vocab_size": size, "eos_token_id": end, "bos_token_id": end - 1, "max_position_embeddings": 24}
    config = transformers.CLIPConfig(text_config=text, vision_config=IMAGE, projection_dim=24)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.CLIPModel(config).eval()
        for p in model.parameters():
            p.data += 0.05 * torch.randn_like(p)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def theirs(folder):
    return transformers.CLIPModel.from_pretrained(folder).eval(), transformers.CLIPTokenizer.from_pretrained(folder)


def pictures(count):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 3, 32, 32), np.uint8))


def test_embeddings_of_published_weights_equal_transformers(here):
    model, tokenizer = theirs("weights")
    own, images = picture_text.of_weights("weights"), pictures(3)
    pixels = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)(
        list(images.permute(0, 2, 3, 1).numpy()), return_tensors="pt", input_data_format="channels_last"
    )["pixel_values"]
    torch.testing.assert_close(picture_text.normalised(images, own.pixels), pixels, rtol=0, atol=1e-5)
    inputs = tokenizer(list(TEXTS), padding=True, return_tensors="pt")
    with torch.no_grad():
        out = model(**inputs, pixel_values=pixels)
    torch.testing.assert_close(picture_text.embed_pictures(own, images), out.image_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(picture_text.embed_texts(own, TEXTS), out.text_embeds, rtol=0, atol=1e-5)


def test_loss_equals_transformers(here):
    model, tokenizer = theirs("weights")
    own, images = (
        picture_text.of_weights("weights"),
        picture_text.normalised(pictures(3), picture_text.Pixels((0.5,) * 3, (0.5,) * 3)),
    )
    with torch.no_grad():
        expected = model(
            **tokenizer(list(TEXTS), padding=True, return_tensors="pt"), pixel_values=images, return_loss=True
        )
    tokens, _ = clip_pairs.encode(own.tokenizer, TEXTS, own.cfg.context)
    numbers = torch.arange(3)
    batch = images, tokens, numbers[:, None], numbers
    values, metrics = picture_pairs.loss({"clip": own.params}, batch, random.key(0), own.cfg)
    torch.testing.assert_close(values.mean(), expected.loss, rtol=0, atol=1e-5)
    torch.testing.assert_close(metrics["scale"], model.logit_scale.exp())


def test_a_caption_of_two_pictures_is_no_negative():
    """Two of four pictures have caption 7 alone, and a third has it beside its own."""
    text = {"vocabulary": 9, "context": 4, "text_layers": 1, "text_heads": 2, "text_width": 8}
    cfg = clip.Config(6, 8, patch=4, image_layers=1, image_heads=2, image_width=8, **text)
    params = spec.init(random.key(0), clip.spec(cfg))
    images, tokens = random.normal(random.key(1), (4, 3, 8, 8)), torch.tensor([[1, 8], [1, 8], [2, 8], [3, 8]])
    own, numbers = torch.tensor([[7, -1], [7, -1], [5, 7], [6, -1]]), torch.tensor([7, 7, 5, 6])
    values, metrics = picture_pairs.loss({"clip": params}, (images, tokens, own, numbers), random.key(0), cfg)
    out = clip.apply(params, (images, tokens), cfg)
    logits = clip.logits(params, out["image"], out["text"])
    for i in range(4):
        texts = [j for j in range(4) if j == i or int(numbers[j]) not in own[i].tolist()]
        others = [j for j in range(4) if j == i or int(numbers[i]) not in own[j].tolist()]
        expected = (logits[i, texts].logsumexp(0) + logits[others, i].logsumexp(0)) / 2 - logits[i, i]
        torch.testing.assert_close(values[i], expected, rtol=0, atol=1e-5)
    assert metrics["accuracy"] in (0, 0.25, 0.5, 0.75, 1)


def test_one_of_the_captions_is_taken_by_the_key(here):
    data = picture_pairs.open_data("things", 32, False)
    args = runs.config(RUN)["args"]
    model = picture_text.with_head(open_run(RUN, RUN.parent))[0]
    task = picture_pairs.task(type("Args", (), args), data, model)
    rows = torch.arange(8)
    batches = [task.batch(rows, random.key(seed)) for seed in (0, 0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(*batches[:2], strict=True))
    assert not torch.equal(batches[0][3], batches[2][3])
    for images, tokens, own, numbers in batches:
        assert (own == numbers[:, None]).any(1).all() and images.dtype == torch.float32
        assert torch.equal(tokens, picture_pairs.tabled(model, data.train).tokens[numbers])


def test_an_embedding_does_not_depend_on_its_batch(here, monkeypatch):
    model = picture_text.with_head(open_run(RUN, RUN.parent))[0]
    images, texts = pictures(5), [*TEXTS, "", "?"]
    whole = picture_text.embed_pictures(model, images), picture_text.embed_texts(model, texts)
    monkeypatch.setattr(picture_text, "BATCH", 2)
    torch.testing.assert_close(picture_text.embed_pictures(model, images), whole[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(picture_text.embed_texts(model, texts), whole[1], rtol=0, atol=1e-6)
    alone = torch.cat([picture_text.embed_texts(model, [text]) for text in texts])
    torch.testing.assert_close(alone, whole[1], rtol=0, atol=1e-6)


def test_bad_records_are_named_and_counted(here, capsys):
    assert call("evaluate", "--run", RUN, "--out", "out") == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped"))
    assert line.split()[1] == "4:" and "lonely.png is a picture without a caption" in line
    for reason in (
        "has a caption of no words",
        "names 'nowhere.png', which is not there",
        "cannot be read as a picture",
    ):
        assert reason in line
    result = runs.result(RUN)
    assert result["pictures"] in (3, 4) and result["scale"] <= 100
    assert {"image_to_text_recall_at_10", "chance_text_to_image_recall_at_1"} <= result.keys()


def test_search_and_predict_by_weights(here, capsys):
    assert call("search", "--weights", "weights", "--folder", "things", "something blue", "?", "--count", "2") == 0
    out, err = capsys.readouterr()
    rows = [line.split("\t") for line in out.splitlines() if "\t" in line]
    assert len(rows) == 2 and float(rows[0][0]) >= float(rows[1][0]) and "things/bad.png cannot be read" in out
    assert err == "'?' has no word; it is skipped\n" and Path("search.png").is_file()
    flags = ("predict", "--weights", "weights", "things/0.png", "things/1.png", "--labels", "red, blue")
    assert call(*flags) == 0
    table = list(csv.reader(Path("predictions/predictions.csv").read_text(encoding="utf-8").splitlines()))
    assert [row[0] for row in table] == ["picture", "things/0.png", "things/1.png"]
    assert all(float(row[2]) + float(row[4]) == pytest.approx(1, abs=2e-4) for row in table[1:])
    model, tokenizer = theirs("weights")
    own = picture_text.of_weights("weights")
    images, _ = picture_search.read([Path("things/0.png")], own)
    with torch.no_grad():
        logits = model(
            **tokenizer(["red", "blue"], return_tensors="pt", padding=True),
            pixel_values=picture_text.normalised(images, own.pixels),
        ).logits_per_image
    assert float(table[1][2]) == pytest.approx(float(logits.softmax(1).max()), abs=1e-3)


def test_fine_tuning_of_published_weights(here, capsys):
    flags = ("--weights", "weights", "--data", "things", "--batch", "8", "--steps", "4", "--no-compile", "--name", "b")
    assert call(*flags) == 0
    out = capsys.readouterr().out
    assert "weights" in out and "a guess has a loss of 2.079" in out
    assert runs.config(RUN.with_name("b"))["net"]["image"] == 32
    before, after = (
        picture_text.of_weights("weights"),
        picture_text.with_head(open_run(RUN.with_name("b"), RUN.parent))[0],
    )
    change = float((picture_text.embed_texts(before, TEXTS) - picture_text.embed_texts(after, TEXTS)).abs().max())
    assert 1e-6 < change < 0.1
    assert call("probe", "--run", RUN.with_name("b"), "--data", "classes") == 0
    assert "linear probe" in capsys.readouterr().out


def test_true_or_false(here, capsys):
    flags = ("--task", "true-false", "--data", ".", *SMALL[2:], "--no-compile", "--name", "c")
    assert call(*flags) == 0
    out, result = capsys.readouterr().out, runs.result(RUN.with_name("c"))
    assert (
        "the majority 66.7%" in out
        and result["statements"] == 12
        and result["majority_accuracy"] == pytest.approx(2 / 3)
    )
    for reason in ("has a sentence of no words", "has the label 'maybe', expected true or false", "is no JSON object"):
        assert reason in out
    assert call("evaluate", "--run", RUN.with_name("c")) == 0
    again = runs.result(RUN.with_name("c") / "evaluations/test")
    assert again["accuracy"] == result["accuracy"]
    assert call("search", "--run", RUN.with_name("c"), "--folder", "things", "a square") == 2
    assert "learned what is true or false; expected a run that learned pairs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (("search", "a square"), "expected either --run DIR or --weights SOURCE"),
        (("search", "--weights", "weights", "a square"), "name the pictures to search in with --folder"),
        (("search", "--run", RUN, "--folder", "nowhere", "a"), "nowhere does not exist"),
        (("search", "--run", RUN, "--folder", "nlvr/dev/dev.json", "a"), "no picture can be read; nlvr/dev/dev.json"),
        (("predict", "--run", RUN, "things", "--labels", "red"), "--labels has 1 class; expected at least two names"),
        (("predict", "--run", RUN, "things", "--labels", "red,red"), "--labels has 'red' twice"),
        (("predict", "--run", RUN, "--labels", "red,blue"), "no picture is named"),
        (("predict", "--weights", "weights", "things"), "name the classes with --labels"),
        (("probe", "--run", RUN, "--data", "things"), "has no sub-folders, expected one per class"),
        (("probe", "--run", RUN), "name a folder with one sub-folder of pictures per class with --data"),
        (("evaluate", "--weights", "weights"), "published weights have no data of their own"),
        (("--weights", "things", "--data", "things"), "things"),
    ],
)
def test_refusals(argv, error, here, capfd):
    assert error in runs.refused("clip", capfd, *argv)


def test_tokenizers_that_do_not_fit(here, capfd):
    path = Path("weights/config.json")
    config = json.loads(path.read_text())
    config["text_config"]["eos_token_id"] = 5
    path.write_text(json.dumps(config))
    line = runs.refused("clip", capfd, "search", "--weights", "weights", "--folder", "things", "a")
    assert "texts end with token 5, in its tokenizer they do not" in line
    Path("weights/tokenizer.json").unlink()
    line = runs.refused("clip", capfd, "search", "--weights", "weights", "--folder", "things", "a")
    assert "no tokenizer in weights" in line


def test_scenes():
    """No training picture shows a held-out pair; captions of pictures to test on are unique."""
    _, texts = caption_scenes.training(32, 400)
    held = {f"{colour} {caption_scenes.scenes.NUMBERS[digit]}" for colour, digit in caption_scenes.HELD}
    assert not any(pair in text for pair in held for text in texts)
    images, texts = caption_scenes.testing(32, 60)
    assert len(set(texts)) == len(texts) == len(images) == 60 and images.dtype == torch.uint8
    singles = caption_scenes.singles(32, 2, 40, True, True)
    assert {caption_scenes.PROMPTS[i].removeprefix("a ") for i in singles.numbers.tolist()} <= held
    others = caption_scenes.singles(32, 3, 40, False, True)
    assert not {caption_scenes.PROMPTS[i].removeprefix("a ") for i in others.numbers.tolist()} & held


@pytest.mark.slow
def test_128_pairs_are_learned_by_heart():
    """The loss leaves ln(batch), and the scale does not fall to 1."""
    images, texts = caption_scenes.testing(32, 128)
    args = type("Args", (), {"vocabulary": 600, "longest": 24, "size": 32, "net": "resnet", "fit": "cut"})
    args.learning_rate, args.weight_decay, args.steps, args.batch = 2e-3, 0.0, 40, 128
    model = picture_text.scratch(args, texts, images)
    pairs = picture_pairs.Pairs(images, tuple((text,) for text in texts), tuple(texts))
    task = picture_pairs.task(args, picture_pairs.Data(pairs, pairs, False, {}), model)
    optimizer, net = picture_task.adamw(args), {"clip": clip.spec(model.cfg)}
    state = start(random.key(1), spec.init(random.key(0), net), net, optimizer)
    step, losses = make_step(task.loss, optimizer, donate=True, compile=False), []
    for t in range(args.steps):
        state, metrics = step(state, task.batch(torch.arange(128), random.key(t)))
        losses.append(float(metrics["loss"]))
    assert losses[0] > 0.8 * math.log(128) and losses[-1] < 0.5, losses
    assert 10 < float(metrics["scale"]) < 100
    assert len(tree.leaves(state.stats))


@pytest.mark.long
def test_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("--name", "a", "--no-compile") == 0
    result = runs.result(RUN)
    assert min(result["image_to_text_recall_at_1"], result["text_to_image_recall_at_1"]) >= 0.8
    assert result["held_out_accuracy"] >= 0.7
