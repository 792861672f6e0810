"""experiments/caption.py: what is written and drawn, published weights, bad pictures and captions."""

import csv
import functools
import itertools
import json

import pytest
import torch
import transformers

from core import random, spec
from experiments.parts import caption_figures as figures
from experiments.parts import captioner as parts
from experiments.parts.translator import Decoder, Marks
from nets.multimodal import captioner
from tests.experiments import runs
from tests.registry.experiments.captions import SMALL, files
from train.data import DataError
from train.data.images import scenes
from train.data.text import tokenizers

call = functools.partial(runs.call, "caption")
FLAGS = (*SMALL, "--no-compile", "--name", "a")
WORDS = ("a red square", "a blue square", "one square, blue")


@pytest.fixture
def here(tmp_path, monkeypatch):
    files(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pictures(count=6, side=8):
    images = random.randint(random.key(1), (count, 3, side, side), 0, 256).to(torch.uint8)
    own = tuple((WORDS[i % 3],) if i % 2 else WORDS[:2] for i in range(count))
    return parts.Pictures(images, own, tuple(f"{i}.png" for i in range(count)))


def tiny(context=9):
    tokenizer = tokenizers.train_sentences(WORDS, 40, True)
    sizes = {"image_layers": 1, "image_heads": 2, "image_width": 8, "image_hidden": 8, "context": context}
    sizes |= {"text_layers": 1, "text_heads": 2, "text_width": 8, "text_hidden": 8}
    cfg = captioner.Config(8, patch=4, vocabulary=tokenizer.vocabulary_size, **sizes)
    params = spec.init(random.key(0), captioner.spec(cfg))
    return parts.Captioner(params, cfg, tokenizer, parts.marks_of(tokenizer, cfg))


@pytest.mark.parametrize("decoder", [Decoder(beam=1), Decoder(beam=3), Decoder(temperature=1.0, top_k=5)])
def test_captions_do_not_depend_on_their_batch(decoder, monkeypatch):
    model, images = tiny(), pictures(5).images
    together = parts.write(model, images, decoder)
    monkeypatch.setattr(parts, "BATCH", 2)
    apart = parts.write(model, images, decoder)
    assert [one.ids for one in together] == [one.ids for one in apart]
    assert torch.allclose(*(torch.tensor([one.score for one in several]) for several in (together, apart)))


def test_no_special_token_and_no_unknown_word_is_written():
    model = tiny()
    assert model.marks == Marks(1, 2, (0, 1, 3))
    for one in parts.write(model, pictures().images, Decoder(temperature=2.0)):
        assert not {0, 1, 2, 3} & set(one.ids) and len(one.ids) <= 9


def test_table_goes_from_start_to_end_and_leaves_out_what_is_too_long():
    model, data = tiny(), pictures()
    rows, owners, left_out = parts.table(data, model)
    assert not left_out and owners.tolist() == [0, 0, 1, 2, 2, 3, 4, 4, 5]
    assert rows[0].tolist()[:1] == [1] and (rows == 2).sum(1).tolist() == [1] * 9
    ids = model.tokenizer.encode(WORDS[0])
    assert rows[0].tolist() == [1, *ids, 2, -1]
    short, _, left_out = parts.table(data, tiny(4))  # room for three tokens; "one square, blue" has four
    assert len(short) == 8 and left_out == [("a caption of 5.png", "has 4 tokens, expected less than 4")]
    with pytest.raises(DataError, match="a caption of 0.png has 3 tokens, expected less than 2, as all 9; --longest"):
        parts.table(data, tiny(2))


def test_baselines():
    data = pictures()
    assert figures.commonest(data) == "a red square"
    changed = (data.images.int() + 3).clamp(max=255).to(torch.uint8)
    assert figures.nearest(changed, data, 8) == [own[0] for own in data.captions]
    values = figures.baselines(data, data, "en")
    assert values["nearest_exact_match"] == 1.0 and 0.5 < values["commonest_exact_match"] < 1.0


def test_scenes_have_captions_that_a_tokenizer_of_words_writes():
    data = parts._of_scenes(random.key(0), 16, parts.digits()[0], 64)
    assert data.images.dtype == torch.uint8 and data.images.shape == (len(data.captions), 3, 64, 64)
    content = scenes.scenes(random.key(0), 18, parts.digits()[0], most=parts.MOST, sizes=(16, 30))
    clear = []
    for boxes, labels, text in zip(content.boxes, content.labels, scenes.captions(content), strict=True):
        centres = sorted(float(box[0] + box[2]) / 2 for box, label in zip(boxes, labels, strict=True) if label >= 0)
        if all(b - a >= 4 for a, b in itertools.pairwise(centres)):
            clear.append((text,))
    assert 8 < len(clear) < 18 and data.captions == tuple(clear[:16])
    large = parts._of_scenes(random.key(0), 16, parts.digits()[0], 128)
    assert large.captions == data.captions
    small = torch.nn.functional.avg_pool2d(large.images.float(), 2)
    assert float((small - data.images.float()).abs().mean()) < 10
    tokenizer = parts.learn_tokenizer(data, "words", 200)
    for (text,) in data.captions:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bad_records_and_pictures_are_named_and_counted(here, capfd, monkeypatch):
    runs.coarse(monkeypatch)
    assert call(*FLAGS, "--steps", "2") == 0
    out = capfd.readouterr().out
    for reason in ("has a caption of no words", "names '99.png', which is not there", "garbled.png"):
        assert reason in out, reason
    assert "is a picture without a caption" in out
    assert runs.result(here / "runs/caption/a")["skipped"] == 4
    (here / "more").mkdir()
    (here / "more/1.png").write_bytes((here / "squares/1.png").read_bytes())
    assert call("predict", "--run", "runs/caption/a", "more", "squares/garbled.png", "--beam", "1", "--maps") == 0
    out = capfd.readouterr().out
    assert "garbled.png" in out and "cannot be read as a picture" in out
    (record,) = json.loads((here / "captions/captions.json").read_text())
    with open(here / "captions/captions.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert record["picture"] == row["picture"] == "more/1.png" and record["caption"] == row["caption"]
    bad = ("predict", "--run", "runs/caption/a", "squares/garbled.png")
    assert "no picture can be read; squares/garbled.png" in runs.refused("caption", capfd, *bad)
    assert (here / "captions/attention_1.png").is_file() and (here / "captions/captions_1.png").is_file()


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (("predict", "squares"), "expected either --run DIR or --weights SOURCE"),
        (("evaluate", "--run", "x", "--weights", "y"), "expected either --run DIR or --weights SOURCE"),
        (("predict", "--run", "runs/caption/a", "squares", "--top-k", "3"), "give --temperature too"),
    ],
)
def test_refusals_of_the_sub_commands(here, capfd, argv, error):
    assert error in runs.refused("caption", capfd, *argv)


@pytest.fixture
def published(here):
    """A folder of transformers with a tokenizer of GPT-2's kind."""
    tokenizer = tokenizers.train_byte_pairs([" ".join(WORDS)], 260)
    image = {"image_size": 16, "patch_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    text = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 30, "vocab_size": 260}
    text |= {"add_cross_attention": True, "is_decoder": True, "eos_token_id": 0, "bos_token_id": 0}
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(**image, num_attention_heads=2), transformers.GPT2Config(**text)
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.VisionEncoderDecoderModel(config=config).save_pretrained(here / "vit-gpt2")
    tokenizer.save(here / "vit-gpt2/tokenizer.json")
    return here


@pytest.mark.slow
def test_published_weights_caption_are_evaluated_and_trained_on(published, capsys, monkeypatch):
    runs.coarse(monkeypatch)
    weights = ("--weights", "vit-gpt2")
    assert call("predict", *weights, "squares/1.png", "squares/2.png", "--beam", "2", "--maps") == 0
    assert len(json.loads((published / "captions/captions.json").read_text())) == 2
    assert call("evaluate", *weights, "--data", "squares", "--beam", "1") == 0
    assert "word for word" in capsys.readouterr().out and (published / "evaluations/squares/result.json").is_file()
    few = ("--data", "squares", "--steps", "4", "--batch", "4", "--no-compile", "--name", "b", "--shift", "1")
    assert call(*weights, *few) == 0
    assert call("predict", "--run", "runs/caption/b", "squares/1.png", "--out", "others", "--beam", "1") == 0
    assert call("evaluate", *weights) == 2
    assert "published weights have no data of their own" in capsys.readouterr().err


@pytest.mark.long
def test_default_writes_captions_word_for_word(here):
    assert call("--name", "whole") == 0
    result = runs.result(here / "runs/caption/whole")
    assert result["exact_match"] >= 0.9 and result["nearest_exact_match"] < 0.1
