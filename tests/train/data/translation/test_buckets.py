import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from core import random
from train.data import DataError
from train.data.text import tokenizers
from train.data.text.token_files import TokenFile
from train.data.text.tokenizers import BOS, EOS, PAD
from train.data.translation import dates
from train.data.translation.buckets import batch_at, evaluation_batches, make_buckets
from train.data.translation.corpus import Corpus, fitting, of_sentences, open_corpus
from train.data.translation.files import PairFiles
from train.data.translation.sets import open_pairs

KEY = random.key(7)
PAIRS = dates.pairs(600, 0, 0)[0]

DATA = os.environ.get("FUNCTREE_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="FUNCTREE_DATA does not name a folder with real data sets")


@pytest.fixture(scope="module")
def tokenizer() -> tokenizers.SentenceTokenizer:
    return tokenizers.train_sentences((s for pair in PAIRS for s in pair), 400)


@pytest.fixture(scope="module")
def corpus(tokenizer) -> Corpus:
    return open_corpus(PAIRS, tokenizer, progress=False)


def of_lengths(lengths: list[tuple[int, int]]) -> Corpus:
    """A corpus in which pair i consists of the token 10 + i."""
    lengths = np.array(lengths, np.int32).reshape(-1, 2)
    ends = lengths.cumsum().reshape(-1, 2)
    return Corpus(TokenFile(np.repeat(np.arange(len(lengths)) + 10, lengths.sum(1))), lengths, ends - lengths)


def test_a_corpus_has_the_ids_of_each_sentence(corpus, tokenizer):
    assert len(corpus) == 600 and corpus.empty == 0
    for i in (0, 1, 299, 599):
        for side in (0, 1):
            assert corpus.ids(i, side) == tokenizer.encode(PAIRS[i][side])


@pytest.mark.parametrize("count", [4096, 4097, 5])
def test_chunks_are_joined(count, tokenizer, tmp_path):
    pairs = list(itertools.islice(itertools.cycle(PAIRS), count))
    for cache in (None, tmp_path):
        corpus = open_corpus(pairs, tokenizer, cache, progress=False)
        assert len(corpus) == count and corpus.ids(count - 1, 1) == tokenizer.encode(pairs[-1][1])


def test_a_corpus_is_kept_on_disk(tokenizer, tmp_path, caplog, monkeypatch):
    pairs = [("", "one"), *PAIRS[:40], ("zwei", "")]
    first = open_corpus(pairs, tokenizer, tmp_path / "cache", progress=False)
    monkeypatch.setattr(tokenizers.SentenceTokenizer, "encode_batch", None)  # nothing is tokenized again
    again = open_corpus(pairs, tokenizer, tmp_path / "cache", progress=False)
    assert isinstance(again.tokens.ids, np.memmap) and again.tokens.ids.dtype == np.uint16
    for a, b in ((first.tokens.ids, again.tokens.ids), (first.lengths, again.lengths), (first.starts, again.starts)):
        assert np.array_equal(a, b)
    assert len(again) == 40 and first.empty == again.empty == 2
    assert caplog.text.count("2 lines are empty") == 2


def test_another_tokenizer_or_text_is_another_corpus(tokenizer, tmp_path):
    other = tokenizers.train_sentences((s for pair in PAIRS for s in pair), 300)
    for pairs, used in ((PAIRS[:9], tokenizer), (PAIRS[:8], tokenizer), (PAIRS[:9], other)):
        corpus = open_corpus(pairs, used, tmp_path, progress=False)
        assert corpus.ids(0, 0) == used.encode(PAIRS[0][0]) and len(corpus) == len(pairs)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("name", ["tokens", "lengths.npy", "corpus.json"])
def test_a_damaged_corpus_is_made_anew(name, tokenizer, tmp_path, caplog):
    before = open_corpus(PAIRS, tokenizer, tmp_path, progress=False)
    (path,) = tmp_path.rglob(name)
    path.write_bytes(path.read_bytes()[:-10])
    again = open_corpus(PAIRS, tokenizer, tmp_path, progress=False)
    assert np.array_equal(before.lengths, again.lengths) and "is damaged" in caplog.text
    caplog.clear()
    assert len(open_corpus(PAIRS, tokenizer, tmp_path, progress=False)) == 600 and not caplog.text


def test_a_corpus_of_files_that_fail_leaves_nothing(tokenizer, tmp_path):
    (tmp_path / "a.de").write_text("eins\nzwei\n")
    (tmp_path / "a.en").write_text("one\n")
    with pytest.raises(DataError, match="a.de has 2 sentences and .*a.en has 1 sentences"):
        files = PairFiles((tmp_path / "a.de",), (tmp_path / "a.en",))
        open_corpus(files, tokenizer, tmp_path / "cache", progress=False)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    message = "the sentences: there is not one pair of sentences, as all of the sources is empty"
    for cache in (None, tmp_path / "cache"):
        with pytest.raises(DataError, match=message):
            open_corpus([("", "one")], tokenizer, cache, progress=False)


def test_sentences_to_translate(tokenizer):
    sentences = ["drei", "", "Heute ist Montag."]
    corpus = of_sentences(sentences, tokenizer, 64)
    assert [corpus.ids(i, 0) for i in range(3)] == [tokenizer.encode(s) for s in sentences]
    (batch,) = evaluation_batches(corpus, 1000, 64)
    order, source, target = batch
    assert target.tolist() == [[BOS, EOS]] * 3
    for row, i in enumerate(order.tolist()):
        ids = tokenizer.encode(sentences[i]) + [EOS]
        assert source[row].tolist() == ids + [PAD] * (source.shape[1] - len(ids))
    (only,) = evaluation_batches(of_sentences([""], tokenizer, 64), 10, 64)
    assert only[1].tolist() == [[EOS]]


def test_a_sentence_longer_than_the_positions(tokenizer):
    count = len(tokenizer.encode(PAIRS[0][0])) + 1
    assert len(of_sentences([PAIRS[0][0]], tokenizer, count)) == 1
    with pytest.raises(DataError, match=f"sentence 2 has {count} tokens, the network positions for {count - 1}: '"):
        of_sentences(["drei", PAIRS[0][0]], tokenizer, count - 1)


def test_pairs_that_are_too_long_are_left_out_by_one_rule(tokenizer, caplog):
    lengths = [max(len(tokenizer.encode(text)) + 1 for text in pair) for pair in PAIRS]
    longest = sorted(lengths)[500]
    short = [pair for pair, length in zip(PAIRS, lengths, strict=True) if length <= longest]
    too_long = tuple(i for i, length in enumerate(lengths) if length > longest)
    assert 0 < len(too_long) < 100
    corpus = open_corpus(PAIRS, tokenizer, progress=False, longest=longest)
    assert corpus.left_out == too_long and len(corpus) == 600 - len(too_long)
    assert all(corpus.ids(i, 1) == tokenizer.encode(short[i][1]) for i in (0, 300, len(corpus) - 1))
    assert f"{len(too_long)} pairs with over {longest} tokens, such as" in caplog.text and corpus.notes
    assert sum(len(indices) for indices, _, _ in evaluation_batches(corpus, 512, longest)) == len(corpus)
    assert make_buckets(corpus, 512, longest).too_long == 0
    assert make_buckets(open_corpus(PAIRS, tokenizer, progress=False), 512, longest).too_long == len(too_long)
    pairs, left_out = fitting(PAIRS, tokenizer, longest)
    assert tuple(left_out) == too_long and pairs == short
    assert fitting([], tokenizer, longest) == ([], [])
    with pytest.raises(DataError, match="the sentences: not one of 600 pairs has up to 2 tokens on both sides"):
        open_corpus(PAIRS, tokenizer, progress=False, longest=2)


def test_sentences_that_are_too_long_are_left_empty(tokenizer, caplog):
    longest = len(tokenizer.encode("drei")) + 1
    corpus = of_sentences(["drei", PAIRS[0][0], "", "drei"], tokenizer, longest, skip=True)
    assert corpus.left_out == (1,) and corpus.lengths[:, 0].tolist() == [longest - 1, 0, 0, longest - 1]
    assert corpus.ids(3, 0) == tokenizer.encode("drei") and len(corpus.notes) == 1
    assert "sentence 2 has" in caplog.text and "it is left empty" in caplog.text and PAIRS[0][0][:20] in caplog.text
    bad = of_sentences(["drei", "\udcff", "vier"], tokenizer, 64, skip=True)  # a byte of another encoding
    assert bad.left_out == (1,) and bad.ids(2, 0) == tokenizer.encode("vier") and not bad.lengths[1].any()
    assert "sentence 2 cannot be encoded (character '\\udcff' at position 0 is no Unicode text)" in caplog.text
    with pytest.raises(DataError, match="sentence 2 cannot be encoded"):
        of_sentences(["drei", "\udcff"], tokenizer, 64)
    assert of_sentences(["drei"], tokenizer, longest, skip=True).left_out == ()


def test_batches_hold_whole_pairs(corpus, tokenizer):
    buckets = make_buckets(corpus, 512, 64, shapes=4)
    pairs = set()
    for step in range(buckets.batches):
        source, target = batch_at(corpus, buckets, KEY, step)
        assert source.dtype == target.dtype == torch.int64 and len(source) == len(target)
        assert max(source.numel(), target[:, 1:].numel()) <= 512
        for s, t in zip(source.tolist(), target.tolist(), strict=True):
            s_end, t_end = s.index(EOS), t.index(EOS)
            assert t[0] == BOS and not any(s[s_end + 1 :]) and not any(t[t_end + 1 :])
            pair = (tokenizer.decode(s[:s_end]), tokenizer.decode(t[1:t_end]))
            assert pair in PAIRS and pair not in pairs
            pairs.add(pair)
    assert len(pairs) >= 600 - buckets.batches  # hardly any are left out of an epoch


def test_there_are_as_many_shapes_as_said(corpus):
    for shapes in (1, 3, 6):
        buckets = make_buckets(corpus, 256, 64, shapes=shapes)
        steps = range(2 * buckets.batches)
        sizes = {tuple(x.shape for x in batch_at(corpus, buckets, KEY, step)) for step in steps}
        assert len(sizes) == len(buckets.buckets) == shapes
        assert f"in {shapes} shapes" in str(buckets)


def test_the_batch_is_a_function_of_key_and_step(corpus):
    buckets = make_buckets(corpus, 256, 64)
    steps = [0, 3, buckets.batches - 1, buckets.batches, 5 * buckets.batches + 2]
    forwards = [batch_at(corpus, buckets, KEY, step) for step in steps]
    for step, expected in reversed(list(zip(steps, forwards, strict=True))):
        actual = batch_at(corpus, buckets, KEY, torch.tensor(step))
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))

    def epoch(key, number):
        batches = range(number * buckets.batches, (number + 1) * buckets.batches)
        return [batch_at(corpus, buckets, key, step)[0].tolist() for step in batches]

    assert epoch(KEY, 0) != epoch(KEY, 1) != epoch(random.key(8), 1)
    shapes = [[len(rows) for rows in epoch(KEY, number)] for number in (0, 1)]
    assert shapes[0] != shapes[1] and sorted(shapes[0]) == sorted(shapes[1])


@pytest.mark.parametrize("parts", [1, 3, 7])
def test_batches_are_filled_up_for_micro_batches(parts, corpus):
    """By rows in which no token counts."""
    buckets = make_buckets(corpus, 256, 64)
    for step in range(3):
        source, target = batch_at(corpus, buckets, KEY, step)
        rows = len(source)
        filled = batch_at(corpus, buckets, KEY, step, parts)
        assert len(filled[0]) == len(filled[1]) == -(-rows // parts) * parts
        assert torch.equal(filled[0][:rows], source) and torch.equal(filled[1][:rows], target)
        assert (filled[0][rows:, 0] == EOS).all() and (filled[0][rows:, 1:] == PAD).all()
        assert (filled[1][rows:, 0] == BOS).all() and (filled[1][rows:, 1:] == PAD).all()


def test_the_order_is_that_of_the_keys():
    corpus = of_lengths([(3, 3)] * 12)
    buckets = make_buckets(corpus, 20, 10)
    assert [bucket[:3] for bucket in buckets.buckets] == [(4, 4, 5)]
    keys = random.split(random.fold_in(KEY, 1), 2)
    order, pairs = random.permutation(keys[0], 3), random.permutation(keys[1], 12)
    for place in range(3):
        source, target = batch_at(corpus, buckets, KEY, 3 + place)
        words = pairs[4 * order[place] : 4 * (order[place] + 1)] + 10
        assert torch.equal(source, torch.stack([words] * 3 + [torch.full((4,), EOS)], 1))
        assert torch.equal(target[:, 1:], source) and (target[:, 0] == BOS).all()


def padded(lengths: np.ndarray, cuts: tuple[int, ...]) -> int:
    """Entries when pairs in this order are cut there."""
    return sum(len(part) * int(part.max(0).sum()) for part in np.split(lengths, cuts))


@pytest.mark.parametrize("shapes", [1, 2, 3, 4])
def test_no_division_pads_less(shapes):
    numbers = random.randint(random.key(shapes), (200, 2), 1, 9).tolist()
    corpus = of_lengths([(a, max(1, a + b - 5)) for a, b in numbers])
    buckets = make_buckets(corpus, 12, 64, shapes=shapes)
    lengths = corpus.lengths + [1, 2]
    lengths = lengths[np.argsort(lengths.max(1), kind="stable")]
    edges = [i for i in range(1, 200) if lengths[i].max() != lengths[i - 1].max()]
    least = min(padded(lengths, cuts) for n in range(shapes) for cuts in itertools.combinations(edges, n))
    assert buckets.efficiency == int(lengths.sum()) / least
    assert sum(len(b.members) for b in buckets.buckets) == 200


def test_too_long_pairs_are_left_out_and_counted():
    corpus = of_lengths([(3, 3)] * 10 + [(9, 3), (3, 9)] + [(8, 8)])
    buckets = make_buckets(corpus, 100, 9)
    assert buckets.too_long == 2
    members = np.sort(np.concatenate([bucket.members for bucket in buckets.buckets]))
    assert members.tolist() == [*range(10), 12]
    assert make_buckets(corpus, 100, 10).too_long == 0
    with pytest.raises(DataError, match="not one of 13 pairs has up to 3 tokens on both sides"):
        make_buckets(corpus, 100, 3)
    with pytest.raises(DataError, match="a batch of 9 tokens has no room for a sentence of 10"):
        make_buckets(corpus, 9, 20)
    with pytest.raises(DataError, match="sentence 11 has 10 tokens, the network positions for 9"):
        list(evaluation_batches(corpus, 100, 9))


@pytest.mark.parametrize("options", [{"shapes": 0}, {"tokens": 0}, {"longest": 1}, {"multiple": 0}])
def test_impossible_buckets(options, corpus):
    with pytest.raises(DataError, match="cannot make"):
        make_buckets(corpus, **{"tokens": 100, "longest": 64, **options})


def test_a_few_long_pairs_get_no_bucket_of_their_own():
    corpus = of_lengths([(3, 3)] * 100 + [(20, 20)])
    assert len(make_buckets(corpus, 200, 64).buckets) == 1  # one sentence would be a batch
    assert len(make_buckets(corpus, 20 + 1, 64).buckets) == 2
    assert make_buckets(of_lengths([(3, 3)] * 3), 200, 64).buckets[0].rows == 3


def test_lengths_in_multiples(corpus):
    buckets = make_buckets(corpus, 512, 64, shapes=4, multiple=8)
    assert len(buckets.buckets) > 1
    assert all(bucket.source % 8 == (bucket.target - 1) % 8 == 0 for bucket in buckets.buckets)
    assert all(bucket.rows * max(bucket.source, bucket.target - 1) <= 512 for bucket in buckets.buckets)
    source, target = batch_at(corpus, buckets, KEY, 0)
    assert source.shape[1] % 8 == (target.shape[1] - 1) % 8 == 0 and (target == EOS).sum(1).eq(1).all()
    # Never more than there are positions.
    assert make_buckets(of_lengths([(9, 9)] * 9), 99, 10, multiple=8).buckets[0][1:3] == (10, 11)


@pytest.mark.parametrize("shapes", [None, 1, 3])
def test_evaluation_covers_all_pairs_once(shapes, corpus, tokenizer):
    results: list = [None] * len(corpus)
    sizes, widths = set(), []
    for indices, source, target in evaluation_batches(corpus, 512, 64, shapes):
        assert max(source.numel(), target[:, 1:].numel()) <= 512
        rows = len(indices)
        assert rows == len(source) or (shapes and rows < len(source))
        assert source[rows:].tolist() == [[EOS] + [PAD] * (source.shape[1] - 1)] * (len(source) - rows)
        assert target[rows:].tolist() == [[BOS] + [PAD] * (target.shape[1] - 1)] * (len(source) - rows)
        for i, s, t in zip(indices.tolist(), source.tolist(), target.tolist(), strict=False):
            assert results[i] is None
            results[i] = tokenizer.decode(s), tokenizer.decode(t)
        sizes.add((source.shape, target.shape))
        widths.append(max(source.shape[1], target.shape[1]))
    assert results == PAIRS and widths == sorted(widths)
    assert shapes is None or len(sizes) <= shapes


def test_a_sentence_larger_than_the_budget_is_a_batch_of_its_own():
    batches = list(evaluation_batches(of_lengths([(3, 3), (30, 3), (4, 4)]), 12, 64))
    assert [indices.tolist() for indices, _, _ in batches] == [[0, 2], [1]]


@needs_data
def test_multi30k_is_tokenized_once(tmp_path, monkeypatch):
    pairs = open_pairs(str(Path(DATA) / "multi30k_de_en")).train
    tokenizer = tokenizers.train_sentences((s for pair in pairs for s in pair), 8000)
    first = open_corpus(pairs, tokenizer, tmp_path, progress=False)
    monkeypatch.setattr(type(tokenizer), "encode_batch", None)
    corpus = open_corpus(pairs, tokenizer, tmp_path, progress=False)
    buckets = make_buckets(corpus, 4096, 256, shapes=8)
    batch_at(corpus, buckets, KEY, 0)
    assert len(corpus) == len(first) == 29_000
    assert buckets.efficiency > 0.85 and len(buckets.buckets) == 8
    assert sum(b.rows * (len(b.members) // b.rows) for b in buckets.buckets) > 28_900
