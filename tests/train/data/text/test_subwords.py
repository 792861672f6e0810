"""WordPiece and unigram pieces: special tokens, capitals, Chinese, unknown words, offsets; the merges of byte pairs."""

import pytest

from train.data import DataError
from train.data.text import subwords, tokenizers
from train.data.text.subwords import BERT_SPECIAL, T5_SPECIAL
from train.data.text.text import embedded_text

TEXT = embedded_text()[:100_000].splitlines(keepends=True)
TRAINERS = {"WordPiece": subwords.train_word_piece, "unigram": subwords.train_unigram}


@pytest.fixture(scope="module")
def kinds():
    return {kind: train(TEXT, 1000) for kind, train in TRAINERS.items()}


@pytest.fixture(scope="module")
def pairs():
    return tokenizers.train_byte_pairs(TEXT, 1000)


@pytest.mark.parametrize("kind", TRAINERS)
def test_vocabulary_special_tokens_and_ends(kind, kinds):
    tokenizer = kinds[kind]
    special = {"WordPiece": BERT_SPECIAL, "unigram": T5_SPECIAL}[kind]
    assert tokenizer.vocabulary_size == 1000 == len(tokenizer.tokenizer.get_vocab())
    assert [tokenizer.tokenizer.id_to_token(i) for i in range(len(special))] == list(special)
    whole, plain = tokenizer.tokenizer.encode("The value"), tokenizer.encode("The value")
    assert whole.ids == ([2, *plain, 3] if kind == "WordPiece" else [*plain, 1])
    pair = tokenizer.tokenizer.encode("The value", "of it")
    assert pair.tokens.count(special[3 if kind == "WordPiece" else 1]) == 2
    assert kind != "WordPiece" or set(pair.type_ids) == {0, 1}
    assert tokenizers.kind_of(tokenizer) == kind


def test_words_are_decoded_whole(kinds):
    for tokenizer in kinds.values():
        text = "The interpreter evaluates expressions"
        ids = tokenizer.encode(text)
        assert len(ids) > len(text.split()) and tokenizer.decode(ids) == text


def test_word_piece_takes_the_longest_known_piece(kinds):
    vocabulary = kinds["WordPiece"].tokenizer.get_vocab()
    for word in ("interpreter", "unparenthesized", "x", "Statements"):
        pieces, rest, prefix = [], word, ""
        while rest:
            piece = next(prefix + rest[:n] for n in range(len(rest), 0, -1) if prefix + rest[:n] in vocabulary)
            pieces.append(piece)
            rest, prefix = rest[len(piece) - len(prefix) :], "##"
        assert [token for token, *_ in subwords.inspect(kinds["WordPiece"], word)] == pieces


@pytest.mark.parametrize("kind", TRAINERS)
def test_tokenizers_are_functions_of_the_text(kind, kinds):
    assert TRAINERS[kind](iter(TEXT), 1000).fingerprint == kinds[kind].fingerprint


def test_capitals_and_accents_stay_unless_asked():
    texts = ["The naïve Cat saw the cat"] * 5
    cased = subwords.train_word_piece(texts, 100)
    uncased = subwords.train_word_piece(texts, 100, lower_case=True)
    assert cased.encode("Cat") != cased.encode("cat") and cased.decode(cased.encode("naïve Cat")) == "naïve Cat"
    assert uncased.decode(uncased.encode("naïve Cat")) == "naive cat"


def test_chinese_characters_are_words_of_their_own():
    tokenizer = subwords.train_word_piece(["你好世界 hello"] * 5, 100)
    assert [row[0] for row in subwords.inspect(tokenizer, "世界hello")] == ["世", "界", "hello"]


def test_a_word_with_an_unknown_character_is_unknown(kinds):
    text = "The 猫咪x end"
    rows = subwords.inspect(kinds["unigram"], text)
    assert [row[1] for row in subwords.inspect(kinds["WordPiece"], text)].count(BERT_SPECIAL.index("[UNK]")) >= 1
    assert [row for row in rows if row[1] == T5_SPECIAL.index("<unk>")]


@pytest.mark.parametrize("kind", [*TRAINERS, "pairs"])
def test_offsets_and_words_point_into_the_text(kind, kinds, pairs):
    text = "The value,  of naïve\nexpressions (12)."
    tokenizer = pairs if kind == "pairs" else kinds[kind]
    rows = subwords.inspect(tokenizer, text)
    assert [row[1] for row in rows] == tokenizer.encode(text)
    covered = {i for _, _, (first, last), _ in rows for i in range(first, last)}
    assert covered >= {i for i, letter in enumerate(text) if not letter.isspace()}
    words = [word for *_, word in rows]
    assert words == sorted(words) and len(set(words)) > 4
    start = next(first for token, _, (first, _), _ in rows if token.endswith("The"))
    assert start == 0


def test_files_are_read_again(kinds, tmp_path):
    for kind, tokenizer in kinds.items():
        tokenizer.save(tmp_path / f"{kind}.json")
        with pytest.raises(DataError, match="does not reproduce text"):
            tokenizers.load(tmp_path / f"{kind}.json")
        again = tokenizers.load(tmp_path / f"{kind}.json", lossy=True)
        assert again.fingerprint == tokenizer.fingerprint


def test_merges_of_a_word_give_its_tokens(pairs):
    for word in (" function", " expressions", "x", " naïve"):
        letters, merges = subwords.merges(pairs, word)
        spans = [(i, i + 1) for i in range(len(letters))]
        for first, middle, last, _ in merges:
            spans[spans.index((first, middle)) : spans.index((middle, last)) + 1] = [(first, last)]
        assert ["".join(letters[a:b]) for a, b in spans] == [token for token, *_ in subwords.inspect(pairs, word)]
        assert len(merges) == len(letters) - len(spans)


def test_merges_need_byte_pairs_and_one_word(kinds, pairs):
    with pytest.raises(DataError, match="Unigram has no merges"):
        subwords.merges(kinds["unigram"], "word")
    with pytest.raises(DataError, match="'two words' is 2 words"):
        subwords.merges(pairs, "two words")


@pytest.mark.parametrize(("kind", "size"), [("WordPiece", 5), ("unigram", 3)])
def test_vocabularies_without_room(kind, size):
    with pytest.raises(DataError, match=f"a vocabulary of {size} is too small"):
        TRAINERS[kind](["a"], size)


def test_t5_tokenizer_has_the_face_of_those_of_sentences(kinds):
    tokenizer = subwords.T5Tokenizer(kinds["unigram"].tokenizer)
    assert (tokenizer.start, tokenizer.end) == (0, 1)
    ids = tokenizer.encode("The value  of it")
    assert tokenizer.encode_batch(["The value of it", ""]) == [ids, []]
    assert (
        tokenizer.decode([0, *ids, 1, 0]) == "The value of it" == "".join(tokenizer.tokens(ids)).replace("_", " ")[1:]
    )
    assert "<unk>" in tokenizer.decode(tokenizer.encode("a 東京 b"))
    with pytest.raises(DataError, match="is no Unicode text"):
        tokenizer.encode_batch(["The value", "\ud800"])
    with pytest.raises(DataError, match="has no <pad> and </s>; expected unigram pieces"):
        subwords.T5Tokenizer(kinds["WordPiece"].tokenizer)


def test_character_pairs_have_whole_words_and_single_digits():
    """In a text of few words, the library's unigram pieces would spell those that have no part in common."""
    texts = [f"number {i} of a thousand" for i in range(200)]
    tokenizer = subwords.T5Tokenizer(subwords.train_character_pairs(texts, 60).tokenizer)
    assert tokenizer.tokens(tokenizer.encode("number 194")) == ["_number", "_", "1", "9", "4"]
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(texts[:3])] == texts[:3]
    assert [tokenizer.token_id(token) for token in T5_SPECIAL] == [0, 1, 2] and tokenizer.vocabulary_size <= 60
    again = subwords.train_character_pairs(iter(texts), 60)
    assert again.fingerprint == tokenizer.fingerprint
    assert tokenizer.tokenizer.encode("number").ids[-1] == 1


@pytest.mark.parametrize("train", [subwords.train_character_pairs, subwords.train_unigram])
def test_a_vocabulary_without_room_for_the_characters(train):
    with pytest.raises(DataError, match="a vocabulary of 5 is too small"):
        train(["many characters"] * 3, 5)
