"""Training of subwords beside byte pairs: WordPiece (BERT's), unigram pieces (T5's), pairs of characters.

None reproduces every text, so `tokenizers.load` reads them with `lossy=True`.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from train.data import DataError
from train.data.text.sentencepiece import SPACE
from train.data.text.tokenizers import BytePairTokenizer

BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""Tokens 0 to 4 of WordPiece: fill up a batch, replace what has no pieces, begin and end a text, hide a token."""
T5_SPECIAL = ("<pad>", "</s>", "<unk>")
"""Tokens 0 to 2 of unigram pieces: they fill up a batch, end a text, and replace an unknown character."""
SENTINELS = 100
"""Sentinels of T5, `<extra_id_0>` and so on."""
CONTINUED = "##"
"""Before a piece of WordPiece that does not begin a word."""


def train_word_piece(
    texts: Iterable[str], vocabulary_size: int, *, lower_case: bool = False, progress: bool = False
) -> BytePairTokenizer:
    """Learn the pieces of BERT's tokenizer; ids are `BERT_SPECIAL`, the characters, then longer pieces.

    Schuster and Nakajima 2012, "Japanese and Korean Voice Search"; Devlin et al. 2019, arXiv:1810.04805. Words end at
    white space and around punctuation and Chinese characters, and are then split into the longest known pieces from the
    left; a word with an unknown character is [UNK] as a whole. (The library learns pieces as byte pairs are learned, by
    the most frequent pair.) `tokenizers`' own `encode` adds [CLS] and [SEP].

    Args:
        vocabulary_size: largest number of ids.
        lower_case: without capitals and accents, as BERT's "uncased" vocabularies.

    Raises DataError if the vocabulary has no room for the special tokens.
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    _check_size(vocabulary_size, len(BERT_SPECIAL))
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower_case, strip_accents=lower_case)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words = Counter(word for text in texts for word in _words(tokenizer, text))
    letters, inside = Counter[str](), set[str]()
    for word, count in words.items():
        for letter in word:
            letters[letter] += count
        inside.update(word[1:])
    most = max(1000, vocabulary_size // 4)
    known = sorted(sorted(letters, key=lambda letter: (-letters[letter], letter))[:most])
    # The trainer numbers ## letters as it meets them, in an order that varies, and ties go by number: so number them.
    alphabet = [*known, *(CONTINUED + letter for letter in known if letter in inside)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[*BERT_SPECIAL, *alphabet][:vocabulary_size],
        continuing_subword_prefix=CONTINUED,
        limit_alphabet=0,
        show_progress=progress,
    )
    learner = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    learner.train_from_iterator((" ".join([word] * count) for word, count in sorted(words.items())), trainer)
    tokenizer.model = models.WordPiece(learner.get_vocab(), unk_token="[UNK]", continuing_subword_prefix=CONTINUED)
    tokenizer.add_special_tokens(list(BERT_SPECIAL))
    # The trainer sets neither: without them pieces are decoded with their ##, and no text has its [CLS].
    tokenizer.decoder = decoders.WordPiece(prefix=CONTINUED, cleanup=False)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return BytePairTokenizer(tokenizer)


def _words(tokenizer: Any, text: str) -> list[str]:
    normal = tokenizer.normalizer.normalize_str(text)
    return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal)]


def train_unigram(texts: Iterable[str], vocabulary_size: int, progress: bool = False) -> BytePairTokenizer:
    """Learn pieces with probabilities by EM; a text is split into its most probable pieces.

    Kudo 2018, "Subword Regularization", arXiv:1804.10959. As in SentencePiece, white space of any length is one space,
    which is part of the piece after it, and characters are in the normal form NFKC. `tokenizers`' own `encode` adds
    </s>.

    Args:
        vocabulary_size: largest number of ids, with room for all characters of the texts.

    Raises DataError if the vocabulary has no room for the special tokens and the characters.
    """
    import tokenizers
    from tokenizers import models, trainers

    _check_size(vocabulary_size, len(T5_SPECIAL))
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    _spaced(tokenizer)
    trainer = trainers.UnigramTrainer(
        vocab_size=vocabulary_size, special_tokens=list(T5_SPECIAL), unk_token="<unk>", show_progress=progress
    )
    try:
        tokenizer.train_from_iterator(texts, trainer)
    except Exception as error:  # the library raises bare Exceptions
        raise DataError(f"a vocabulary of {vocabulary_size} is too small for these texts: {error}") from None
    model = json.loads(tokenizer.to_str())["model"]
    tokenizer.model = models.Unigram(_in_order(model["vocab"], len(T5_SPECIAL)), model["unk_id"], byte_fallback=False)
    return _ended(tokenizer)


def train_character_pairs(texts: Iterable[str], vocabulary_size: int, progress: bool = False) -> BytePairTokenizer:
    """Learn pairs of characters, as byte pairs are learned, with the special tokens and spaces of `train_unigram`.

    Sennrich et al. 2016, arXiv:1508.07909. Each digit is a token of its own, as in Llama's (Touvron et al. 2023,
    arXiv:2302.13971). For texts of few different words: the library takes no unigram piece that is in one word alone.

    Args:
        vocabulary_size: largest number of ids, with room for all characters of the texts.

    Raises DataError if the vocabulary has no room for the special tokens and the characters.
    """
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    _check_size(vocabulary_size, len(T5_SPECIAL))
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    _spaced(tokenizer)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([tokenizer.pre_tokenizer, digits])
    options = {"vocab_size": vocabulary_size, "special_tokens": list(T5_SPECIAL), "show_progress": progress}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(**options))
    if tokenizer.get_vocab_size() > vocabulary_size:
        size = f"{tokenizer.get_vocab_size()} special tokens and characters"
        raise DataError(f"a vocabulary of {vocabulary_size} is too small: there are {size}")
    return _ended(tokenizer)


def _spaced(tokenizer: Any) -> None:
    """White space as SentencePiece has it: one space of any, which is part of the piece after it."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    parts = [normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")]
    tokenizer.normalizer = normalizers.Sequence(parts)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always")


def _ended(tokenizer: Any) -> BytePairTokenizer:
    """With </s> after each text that the library's own `encode` is given."""
    from tokenizers import processors

    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return BytePairTokenizer(tokenizer)


class T5Tokenizer(BytePairTokenizer):
    """Unigram pieces of texts for T5, learned or published, with the face of `tokenizers.SentenceTokenizer`.

    A text ends with </s>, and what is written begins with <pad>: `start` and `end` are their ids.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.

    Raises DataError if it does not have these two tokens.
    """

    def __init__(self, tokenizer: Any):
        super().__init__(tokenizer)
        self.start, self.end = (tokenizer.token_to_id(token) for token in T5_SPECIAL[:2])
        if self.start is None or self.end is None:
            raise DataError(f"the tokenizer has no {' and '.join(T5_SPECIAL[:2])}; expected unigram pieces as T5's")

    def decode(self, ids: Sequence[int]) -> str:
        """Without <pad> and </s>; an unknown character is written as <unk>."""
        return super().decode([i for i in ids if i not in (self.start, self.end)])

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The piece of each id, a space in it as an underscore."""
        return [self.tokenizer.id_to_token(i).replace(SPACE, "_") for i in ids]


def add_sentinels(tokenizer: BytePairTokenizer, count: int = SENTINELS) -> BytePairTokenizer:
    """The tokenizer with T5's sentinels after all other ids; `<extra_id_0>` is the last id, and they count down.

    A space before one is part of it, as a corrupted text has none there. The tokenizer that is passed in changes too.
    """
    import tokenizers

    names = (f"<extra_id_{i}>" for i in reversed(range(count)))
    tokenizer.tokenizer.add_special_tokens([tokenizers.AddedToken(name, lstrip=True) for name in names])
    return BytePairTokenizer(tokenizer.tokenizer)


def _in_order(vocabulary: list, special: int) -> list[tuple[str, float]]:
    """(piece, log-probability) after the special ones, the most probable first: the same each time.

    The trainer adds up in an order that varies, which six digits do not show. Characters that are no pieces of their
    own it puts last, each 0.0001 below another, in any order: here all have the lowest.
    """
    pieces = [(piece, round(score, 6)) for piece, score in vocabulary[special:]]
    lowest = min((score for _, score in pieces), default=0.0)
    reach = lowest + 1e-4 * sum(len(piece) == 1 for piece, _ in pieces)
    pieces = [(piece, lowest if len(piece) == 1 and score <= reach else score) for piece, score in pieces]
    return [(piece, score) for piece, score in vocabulary[:special]] + sorted(pieces, key=lambda p: (-p[1], p[0]))


def _check_size(size: int, special: int) -> None:
    if size <= special:
        raise DataError(f"a vocabulary of {size} is too small: expected more than the {special} special tokens")


class Merge(NamedTuple):
    """One merge of a word's byte pairs: the letters from `first` to `last` (excluded) from parts that meet at `middle`.

    rank: number of the merge in the order of training, from 0.
    """

    first: int
    middle: int
    last: int
    rank: int


def merges(tokenizer: BytePairTokenizer, word: str) -> tuple[list[str], list[Merge]]:
    """(letters, merges in order) of a word by byte pairs: always the pair that was learned first.

    Sennrich et al. 2016, arXiv:1508.07909. Letters are those of the file, one per byte for byte-level pairs.

    Raises DataError: the tokenizer has no merges, or the pre-tokenizer cuts the word.
    """
    model = json.loads(tokenizer.tokenizer.to_str())["model"]
    if model["type"] != "BPE":
        raise DataError(f"a tokenizer of the kind {model['type']} has no merges; expected byte pairs")
    ranks = {tuple(pair if isinstance(pair, list) else pair.split(" ")): i for i, pair in enumerate(model["merges"])}
    cut = tokenizer.tokenizer.pre_tokenizer.pre_tokenize_str(word)
    if len(cut) != 1:
        raise DataError(f"'{word}' is {len(cut)} words; expected one")
    letters = list(cut[0][0])
    spans, done = [(i, i + 1) for i in range(len(letters))], []
    while True:
        texts = ["".join(letters[a:b]) for a, b in spans]
        known = [(ranks[pair], i) for i, pair in enumerate(zip(texts, texts[1:], strict=False)) if pair in ranks]
        if not known:
            return letters, done
        rank, i = min(known)
        (first, middle), (_, last) = spans[i], spans[i + 1]
        spans[i : i + 2] = [(first, last)]
        done.append(Merge(first, middle, last, rank))


def inspect(tokenizer: Any, text: str) -> list[tuple[str, int, tuple[int, int], int | None]]:
    """(token, id, (first, last + 1) character, number of the word) of each token of a text, without special tokens.

    Args:
        tokenizer: a `BytePairTokenizer`.
    """
    encoding = tokenizer.tokenizer.encode(text, add_special_tokens=False)
    return list(zip(encoding.tokens, encoding.ids, encoding.offsets, encoding.word_ids, strict=True))
