import json
import time

import numpy as np
import pytest
import torch

from train.data import DataError
from train.data.text import tokenizers
from train.data.text.text import embedded_text, open_text
from train.data.text.tokenizers import BOS, EOS, PAD, SPECIAL, UNK, BytePairTokenizer, CharTokenizer, SentenceTokenizer


@pytest.fixture(scope="module")
def byte_pairs() -> BytePairTokenizer:
    return tokenizers.train_byte_pairs([embedded_text()[:100_000]], 500)


def test_characters_match_the_plain_dictionary():
    text = "hello wörld 🙂\n\x00"
    tokenizer = CharTokenizer.from_text(text)
    table = {c: i for i, c in enumerate(sorted(set(text)))}
    assert tokenizer.encode(text) == [table[c] for c in text]
    assert tokenizer.decode(torch.tensor(tokenizer.encode(text))) == text
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == "" and tokenizer.vocabulary_size == len(table)


@pytest.mark.parametrize(
    ("text", "character", "position"), [("abx", "'x'", 2), ("a🙂🙂", "'🙂'", 1), ("\0ab", "'.x00'", 0)]
)
def test_character_outside_the_vocabulary(text, character, position):
    message = f"character {character} at position {position} is not among the 3 of the vocabulary"
    with pytest.raises(DataError, match=message):
        CharTokenizer(("a", "b", "c")).encode(text)


def test_a_million_characters_take_a_moment():
    text = embedded_text() * 3
    tokenizer = CharTokenizer.from_text(text)
    started = time.process_time()
    ids = tokenizer.encode(text)
    assert len(ids) == len(text) and time.process_time() - started < 2


@pytest.mark.parametrize("chars", [(), ("a", "a"), ("ab",)])
def test_bad_vocabularies(chars):
    with pytest.raises(DataError, match="single characters, each once"):
        CharTokenizer(chars)


@pytest.mark.parametrize("ids", [[0, 10**6], [-1], np.array([3, 10**6])])
def test_ids_outside_the_vocabulary(ids, byte_pairs):
    for tokenizer in (CharTokenizer.from_text("abcd"), byte_pairs):
        with pytest.raises(DataError, match=f"token id {ids[-1]} is outside the vocabulary of"):
            tokenizer.decode(ids)


def test_byte_pairs_encode_anything(byte_pairs):
    for text in ("The value of x.", "naïve 你好 🙂\r\n\t  end ", ""):
        assert byte_pairs.decode(byte_pairs.encode(text)) == text
    assert byte_pairs.vocabulary_size == 500 and byte_pairs.token_id("<|endoftext|>") == 0
    assert len(byte_pairs.encode("the statement")) < 6


def test_byte_pairs_match_transformers(byte_pairs, tmp_path):
    """A folder in GPT-2's own layout, read by transformers' GPT-2 tokenizer and by ours."""
    from transformers import GPT2TokenizerFast

    model = json.loads(byte_pairs.tokenizer.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    ours, theirs = tokenizers.load(tmp_path), GPT2TokenizerFast.from_pretrained(tmp_path)
    for text in ("The  statement's\n\n value<|endoftext|> über 12345!", " leading and trailing "):
        assert ours.encode(text) == theirs.encode(text) == byte_pairs.encode(text)
        assert ours.decode(ours.encode(text)) == text
    theirs.save_pretrained(tmp_path / "fast")
    assert tokenizers.load(tmp_path / "fast").encode("a value") == theirs.encode("a value")


@pytest.mark.parametrize("kind", ["characters", "byte pairs"])
def test_save_and_load(kind, byte_pairs, tmp_path):
    tokenizer = byte_pairs if kind == "byte pairs" else CharTokenizer.from_text('aä"\n\\ \u2028🙂')
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = tokenizers.load(tmp_path / "tokenizer.json")
    assert type(loaded) is type(tokenizer) and loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode("aa") == tokenizer.encode("aa")
    assert loaded.fingerprint != CharTokenizer.from_text("xyz").fingerprint


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.json", None, "not a tokenizer: cannot read .*No such file"),
        ("t.json", "{", "not a tokenizer: .* is not valid JSON"),
        ("t.json", '{"a": 1}', "is not a tokenizer"),
        ("t.json", "[1]", "is not a tokenizer"),
        ("folder/vocab.json", "{}", "no tokenizer in .*: expected tokenizer.json, or vocab.json and merges.txt"),
        ("folder/tokenizer.json", "nonsense", "is not valid JSON"),
    ],
)
def test_not_a_tokenizer(name, content, message, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        tokenizers.load(path if path.parent == tmp_path else path.parent)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("setting", ["truncation", "padding", "dropout"])
@pytest.mark.parametrize("sentences", [False, True], ids=["text", "sentences"])
def test_settings_of_a_file_that_change_texts_are_switched_off(setting, sentences, tmp_path, caplog):
    """A file saved from a classifier cuts every text to 512 tokens, or fills it up; dropout merges at random."""
    if sentences:
        tokenizer = tokenizers.train_sentences(SENTENCES, 300)
    else:
        tokenizer = tokenizers.train_byte_pairs([embedded_text()[:20_000]], 300)
    text = "short" if setting == "padding" else embedded_text()[:3000]
    expected = tokenizer.encode(text)
    tokenizer.save(tmp_path / "plain.json")
    if setting == "truncation":
        tokenizer.tokenizer.enable_truncation(16)
    elif setting == "padding":
        tokenizer.tokenizer.enable_padding(length=64)
    else:
        tokenizer.tokenizer.model.dropout = 0.5
    tokenizer.save(tmp_path / "tokenizer.json")
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    assert content["model" if setting == "dropout" else setting] and (content | content["model"])[setting]
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = tokenizers.load(path)
        assert loaded.encode(text) == expected
        assert loaded.fingerprint == tokenizers.load(tmp_path / "plain.json").fingerprint
    details = {"truncation": " to 16 tokens", "padding": " to 64", "dropout": " of merges, 0.5"}[setting]
    assert f"tokenizer.json carries {setting}{details}, which is switched off" in caplog.text


def other_kinds() -> dict:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    def trained(model, trainer, **parts):
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        for name, part in parts.items():
            setattr(tokenizer, name, part)
        tokenizer.train_from_iterator([embedded_text()[:20_000]], trainer)
        return tokenizer

    unknown = {"special_tokens": ["[UNK]"], "show_progress": False}
    return {
        "WordPiece": trained(
            models.WordPiece(unk_token="[UNK]"),
            trainers.WordPieceTrainer(vocab_size=400, **unknown),
            normalizer=normalizers.BertNormalizer(),
            decoder=decoders.WordPiece(),
        ),
        "words": trained(models.WordLevel(unk_token="[UNK]"), trainers.WordLevelTrainer(vocab_size=400, **unknown)),
        "unigram": trained(models.Unigram(), trainers.UnigramTrainer(vocab_size=400, unk_token="[UNK]", **unknown)),
        "byte pairs": trained(models.BPE(), trainers.BpeTrainer(vocab_size=400, show_progress=False)),
    }


def test_tokenizers_that_lose_text_are_refused_by_name(tmp_path):
    for kind, tokenizer in other_kinds().items():
        path = tmp_path / f"{kind}.json"
        tokenizer.save(str(path))
        with pytest.raises(DataError, match=rf"{kind}.json does not reproduce text: '.*' comes back as .* \({kind}\)"):
            tokenizers.load(path)
        loaded = tokenizers.load(path, lossy=True)
        assert tokenizers.kind_of(loaded) == kind and tokenizers.loss_of(loaded)
        assert loaded.encode("the value") == tokenizer.encode("the value", add_special_tokens=False).ids
        with pytest.raises(DataError, match=r"does not reproduce text: .*expected byte-level byte pairs"):
            open_text(None, loaded, tmp_path)


def test_tokenizers_that_lose_nothing(byte_pairs):
    for tokenizer in (byte_pairs, None, CharTokenizer(("a",)), tokenizers.train_sentences(SENTENCES, 300)):
        assert tokenizers.loss_of(tokenizer) is None
    words = tokenizers.train_sentences(SENTENCES, 100, words=True)
    assert (tokenizers.kind_of(byte_pairs), tokenizers.kind_of(words)) == ("byte pairs", "words")
    with pytest.raises(DataError, match="does not reproduce text: .*<unk>"):  # though a translator may use it
        open_text(None, words, "nowhere")


def test_garbled_merges(tmp_path):
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\nx y z\n")
    with pytest.raises(DataError, match="cannot read the tokenizer in"):
        tokenizers.load(tmp_path)


def test_vocabulary_without_room_for_the_bytes():
    with pytest.raises(DataError, match="a vocabulary of 100 is too small: expected at least 257"):
        tokenizers.train_byte_pairs(["abc"], 100)


SENTENCES = [f"Ein Satz über {i} Bäume, mit „Zeichen“." for i in range(50)] + ["A sentence's trees. It is here!"] * 20


@pytest.fixture(scope="module", params=["byte pairs", "words"])
def sentences(request) -> SentenceTokenizer:
    return tokenizers.train_sentences(SENTENCES, 320, words=request.param == "words")


def test_sentences_have_the_special_tokens_first(sentences):
    assert [sentences.token_id(token) for token in SPECIAL] == [PAD, BOS, EOS, UNK] == [0, 1, 2, 3]
    assert sentences.vocabulary_size <= 320
    for text in SENTENCES:
        ids = sentences.encode(text)
        assert min(ids) > UNK and sentences.decode(ids) == text
        assert sentences.decode([BOS, *ids, EOS, PAD, PAD]) == sentences.decode(torch.tensor(ids)) == text
    assert sentences.encode_batch(SENTENCES) == [sentences.encode(text) for text in SENTENCES]
    assert sentences.encode("") == [] and sentences.decode([]) == "" and sentences.encode_batch([]) == []


def test_special_tokens_in_a_sentence_are_text(sentences, tmp_path):
    sentences.save(tmp_path / "tokenizer.json")
    for tokenizer in (sentences, tokenizers.load(tmp_path / "tokenizer.json")):
        ids = tokenizer.encode("Ein <eos> Satz<pad>")
        assert not {PAD, BOS, EOS} & set(ids)


def test_first_word_as_any_other(sentences):
    assert sentences.encode("Ein Satz über") == sentences.encode("Ein") + sentences.encode("Satz über")


def test_unknown_words_are_shown():
    words = tokenizers.train_sentences(SENTENCES, 100, words=True)
    ids = words.encode("Ein Quark über Bäume, mit Quark")
    assert ids.count(UNK) == 2 and words.decode(ids) == "Ein <unk> über Bäume, mit <unk>"
    assert words.tokens([BOS, *ids[:4], EOS, PAD]) == ["<bos>", "Ein", "<unk>", "über", "Bäume", "<eos>", "<pad>"]
    few = tokenizers.train_sentences(SENTENCES, 10, words=True)
    assert few.vocabulary_size == 10 and UNK in few.encode(SENTENCES[0])


def test_labels_of_bytes_and_spaces():
    """A character in several tokens has its bytes as labels; one in a single token, and U+FFFD itself, as it is."""
    tokenizer = tokenizers.train_sentences(["你 \ufffd é "] * 9 + ["a b"], 280)
    labels = tokenizer.tokens(tokenizer.encode("你 \ufffd é 好â"))
    assert labels == ["你", "\ufffd", "é", "␣", *(f"\\x{byte:02x}" for byte in "好â".encode())]


def test_byte_pairs_of_sentences_encode_anything():
    tokenizer = tokenizers.train_sentences(SENTENCES, 270)
    for text in ("naïve 你好 🙂", "no such words", "<unk>", "two  spaces and a tab\t."):
        ids = tokenizer.encode(text)
        assert UNK not in ids and tokenizer.decode(ids) == text
    with pytest.raises(DataError, match="character '.udc80' at position 1 is no Unicode text"):
        tokenizer.encode_batch(["good", "a\udc80"])
    with pytest.raises(DataError, match="token id 270 is outside the vocabulary of 270"):
        tokenizer.decode([5, 270])


def test_sentences_save_and_load(sentences, tmp_path):
    sentences.save(tmp_path / "tokenizer.json")
    for place in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = tokenizers.load(place)
        assert type(loaded) is SentenceTokenizer and loaded.fingerprint == sentences.fingerprint
        assert loaded.encode_batch(SENTENCES) == sentences.encode_batch(SENTENCES)


def test_the_same_sentences_give_the_same_tokenizer():
    for words in (False, True):
        fingerprints = [tokenizers.train_sentences(SENTENCES, 300, words=words).fingerprint for _ in range(3)]
        assert len(set(fingerprints)) == 1


def test_sentences_need_their_special_tokens(byte_pairs):
    with pytest.raises(DataError, match=r"the tokenizer begins with .*<\|endoftext\|>.*, expected .*<pad>"):
        SentenceTokenizer(byte_pairs.tokenizer)
    for words, least in ((False, 260), (True, 5)):
        with pytest.raises(DataError, match=f"a vocabulary of {least - 1} is too small: expected at least {least}"):
            tokenizers.train_sentences(SENTENCES, least - 1, words=words)
