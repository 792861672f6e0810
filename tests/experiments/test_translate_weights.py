"""experiments/translate.py translate --weights: ids and translations of a small Marian are those of transformers."""

import functools
import json
import shutil
import types
from pathlib import Path

import pytest
import torch

from experiments.parts import translator
from tests.experiments import runs
from tests.experiments.runs import flag_id, is_png
from tests.nets.language.test_marian import model_of
from tests.train.data.text.sentencepiece_files import write_model
from train.data import DataError
from train.data.translation import marian_tokenizer

call, refused = (functools.partial(function, "translate") for function in (runs.call, runs.refused))
PIECES = ["▁", "▁der", "▁die", "▁das", "▁Bus", "▁fährt", "▁am", "▁Montag", "ag", "en", "er", *"abdefhimnorstuä.,"]
SENTENCES = [
    "der Bus fährt am Montag.",
    "die  Bahn",
    "",
    ">>fra<< das Boot",
    "Ö der 東京",
    "am Montag fährt der Bus",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """`weights`, a Marian as the hub has them: config.json, generation_config.json, model, source.spm, vocab.json."""
    folder = tmp_path_factory.mktemp("marian")
    scores = [-2.0 - 0.1 * i if len(piece) > 1 else -8.0 - 0.1 * i for i, piece in enumerate(PIECES)]
    pieces = {"<unk>": (0.0, 2), "<s>": (0.0, 3), "</s>": (0.0, 3)} | dict(zip(PIECES, scores, strict=True))
    write_model(folder / "weights" / "source.spm", pieces)
    shutil.copy(folder / "weights" / "source.spm", folder / "weights" / "target.spm")
    # Ids in an order of their own, with pieces of the other language and without some of this one.
    tokens = ["</s>", "<unk>", *sorted(set(PIECES) - {"▁am"}), "▁bus", "東京", ">>fra<<", "<pad>"]
    ids = {token: i for i, token in enumerate(tokens)}
    (folder / "weights" / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    marks = {name: len(ids) - 1 for name in ("pad_token_id", "decoder_start_token_id")}
    model = model_of(vocab_size=len(ids), bos_token_id=0, max_position_embeddings=64, **marks)
    model.generation_config.update(bad_words_ids=[[len(ids) - 1]], renormalize_logits=True, forced_eos_token_id=None)
    model.save_pretrained(folder / "weights")
    return folder


@pytest.fixture(scope="module")
def theirs(place):
    from transformers import MarianMTModel

    return MarianMTModel.from_pretrained(place / "weights").eval()


def test_pieces_are_those_of_sentencepiece(place):
    """Written down: the best pieces of a sentence; text without pieces in one, and all text, even </s>."""
    tokenizer = marian_tokenizer.load(place / "weights" / "source.spm", place / "weights" / "vocab.json")
    ids = tokenizer.encode("der Bus fährt am Montag.")
    assert tokenizer.tokens(ids) == ["▁der", "▁Bus", "▁fährt", "<unk>", "▁Montag", "."]
    pieces = tokenizer.tokens(tokenizer.encode(">>fra<< 東京 </s>"))
    assert pieces == [">>fra<<", "▁", "東京", "▁", "<unk>", "s", "<unk>"]
    assert tokenizer.decode([*ids, 0, tokenizer.ids["<pad>"]]) == "der Bus fährt Montag."
    assert tokenizer.encode("") == tokenizer.encode("  ") == []
    with pytest.raises(DataError, match="token id 99 is outside the vocabulary"):
        tokenizer.decode([99])


def test_ids_are_those_of_transformers(place):
    """With a model that SentencePiece has trained: its normaliser of white space and of Unicode's forms too."""
    trainer = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed").SentencePieceTrainer
    transformers = pytest.importorskip("transformers")
    folder = place / "trained"
    shutil.copytree(place / "weights", folder)
    pages = [path.read_text(encoding="utf-8") for path in sorted(runs.ROOT.glob("core/*.md"))]
    lines = [line[:200] for page in pages for line in page.splitlines() if line.strip()]
    options = {"vocab_size": 300, "hard_vocab_limit": False, "minloglevel": 2}
    for name in ("source", "target"):
        trainer.train(sentence_iterator=iter(lines), model_prefix=str(folder / name), **options)
        (folder / f"{name}.model").rename(folder / f"{name}.spm")
    pieces = [line.split("\t")[0] for line in (folder / "source.vocab").read_text(encoding="utf-8").splitlines()]
    ids = {piece: i for i, piece in enumerate(["</s>", "<unk>", *pieces[3::2], ">>fra<<", "<pad>"])}
    (folder / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    with pytest.warns(UserWarning, match="sacremoses"):
        library = transformers.MarianTokenizer.from_pretrained(folder)
    ours = marian_tokenizer.load(folder / "source.spm", folder / "vocab.json")
    odd = ["ﬁne\u3000ＡＢ①  \t é e\u0301", ">>fra<< a net", "\u200bzero", "naïve 🙂🙂 東京", " a "]
    for text in (*lines[:100], *odd, *SENTENCES):
        expected = library(text).input_ids
        assert [*ours.encode(text), 0] == expected, text
        assert ours.decode(expected) == library.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        (("--beam", "1"), {"num_beams": 1}),
        (("--beam", "3", "--length-penalty", "1"), {"num_beams": 3, "length_penalty": 1.0}),
    ],
    ids=["greedy", "beams"],
)
def test_translations_are_those_of_transformers(flags, options, here, theirs, capsys):
    tokenizer = marian_tokenizer.load("weights/source.spm", "weights/vocab.json")
    sources, expected = [[*tokenizer.encode(sentence), 0] for sentence in SENTENCES], []
    longest = max(map(len, sources)) + translator.LONGER  # all sentences are one batch
    for sentence, ids in zip(SENTENCES, sources, strict=True):
        out = theirs.generate(torch.tensor([ids]), max_new_tokens=min(64, longest), **options)
        expected.append(tokenizer.decode(out[0].tolist()) if sentence else "")
    (here / "lines").write_text("\n".join(SENTENCES) + "\n", encoding="utf-8")
    assert call("translate", "--weights", "weights", "--file", "lines", *flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == expected and len(set(map(len, expected))) > 3


def test_attention(here, capsys):
    """The weights are named by their file here, beside which the others are."""
    flags = ("--weights", "weights/model.safetensors", "--beam", "2", "--attention", "maps")
    assert call("translate", *flags, "der Bus") == 0
    assert is_png(here / "maps" / "cross.png") and len(capsys.readouterr().out.splitlines()) == 1


def test_older_repositories_have_one_configuration(here):
    """bad_words_ids is in config.json; the padding is never written, even where no file forbids it."""
    settings = json.loads(Path("weights/generation_config.json").read_text())
    Path("weights/generation_config.json").unlink()
    cfg = types.SimpleNamespace(padding_id=settings["pad_token_id"], target_vocabulary=settings["pad_token_id"] + 1)
    assert translator.published_marks("weights", cfg) == translator.Marks(cfg.padding_id, 0, (cfg.padding_id,))
    config = json.loads(Path("weights/config.json").read_text())
    Path("weights/config.json").write_text(json.dumps(config | {"bad_words_ids": [[1], [2, 3]]}))
    assert translator.published_marks("weights", cfg).forbidden == (1, cfg.padding_id)


def forget(name):
    return lambda: Path("weights", name).unlink()


def write(name, text):
    return lambda: Path("weights", name).write_text(text)


def change_config(**entries):
    def change():
        path = Path("weights/config.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    return change


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (forget("source.spm"), "'weights' has none of the files source.spm"),
        (forget("vocab.json"), "'weights' has none of the files vocab.json"),
        (forget("model.safetensors"), "'weights' has none of the files model.safetensors"),
        (write("source.spm", "text"), "source.spm is not a SentencePiece model"),
        (write("source.spm", ""), "source.spm is not a SentencePiece model: it has no pieces"),
        (write("vocab.json", "[1]"), "vocab.json is not a vocabulary: expected pieces with their ids"),
        (write("vocab.json", '{"</s>": 0, "<unk>": 1}'), "the vocabulary has no <pad>; expected </s>, <unk>, <pad>"),
        (
            write("vocab.json", '{"</s>": 0, "<unk>": 1, "<pad>": 99}'),
            "has 100 tokens, expected up to the 33 of the net",
        ),
        (change_config(model_type="bart"), "the configuration is of model_type 'bart', expected 'marian'"),
    ],
    ids=["spm", "vocab", "weights", "no-spm", "empty-spm", "list", "no-pad", "larger", "bart"],
)
def test_weights_that_do_not_fit_are_refused_in_one_line(spoil, message, here, capfd):
    spoil()
    assert message in refused(capfd, "translate", "--weights", "weights", "der Bus")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "expected either --run DIR or --weights SOURCE"),
        (["--run", "weights", "--weights", "weights"], "expected either --run DIR or --weights SOURCE"),
        (["--run", "weights"], "'weights' is not the folder of a run"),
        (["--weights", "weights", "--out", "weights"], "--out 'weights' exists already"),
    ],
    ids=flag_id,
)
def test_refused_in_one_line(flags, message, here, capfd):
    assert message in refused(capfd, "translate", "der Bus", *flags)
