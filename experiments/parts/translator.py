"""A translator that translate.py, seq2seq.py or text2text.py has trained, or a published one, to be used: sentences in,
translations out, their figures, and pictures of where its attention looks."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from core import random, tree
from nets import weights
from nets.language import marian, seq2seq, t5, t5_attention, transformer
from nets.language.beam_search import beam_search
from nets.language.decoding import Decoded, greedy, sample
from train import plots
from train.data.text import tokenizers
from train.data.text.subwords import T5Tokenizer
from train.data.text.tokenizers import BOS, EOS, SentenceTokenizer
from train.data.translation import buckets, corpus, marian_tokenizer
from train.data.translation.files import Pair
from train.data.translation.marian_tokenizer import MarianTokenizer
from train.metrics import translation
from train.run import Count, Integer, NonNegative, Positive, Run, SavedRun, checkpoints, command_line

log = logging.getLogger(__name__)

RUNS = Path("runs/translate")
DECODED = 4000  # tokens of sentences that are translated at once
NETS: dict[type, ModuleType] = {transformer.Config: transformer, seq2seq.Config: seq2seq, t5.Config: t5}
LONGER = 50  # tokens by which a translation may be longer than its source (section 6.1 of the paper)


class Marks(NamedTuple):
    """Ids of the token before a translation and of that after a sentence, and those that no translation has; the most
    tokens of a sentence for a net without a context of its own."""

    start: int = BOS
    end: int = EOS
    forbidden: tuple[int, ...] = ()
    longest: int | None = None


class Translator(NamedTuple):
    params: tree.Tree
    cfg: transformer.Config | seq2seq.Config | t5.Config
    tokenizer: SentenceTokenizer | MarianTokenizer | T5Tokenizer
    marks: Marks = Marks()

    @property
    def context(self) -> int:
        """Positions of either side."""
        return self.marks.longest or self.cfg.context


class Translation(NamedTuple):
    text: str
    score: float
    ids: list[int]
    """The tokens that were decoded, without the end: the text may be cut into others."""


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """Decoding; flags of the sub-commands that translate."""

    beam: Count = 4
    """Beams of the search; 1 takes the most likely token at each position."""
    length_penalty: NonNegative = 0.6
    """Alpha: log-probabilities are divided by the length to this power."""
    temperature: Positive | None = None
    """Sample each token at this temperature instead of searching."""
    top_k: Count | None = None
    """Sample only from this many most likely tokens."""
    top_p: Positive | None = None
    """Sample only from the most likely tokens that together have this probability."""
    seed: Integer = 0
    """Seed of the samples."""

    def check(self) -> None:
        """Raise ValueError if flags contradict each other."""
        if self.temperature is None and (self.top_k is not None or self.top_p is not None):
            raise ValueError("--top-k and --top-p are for sampling; give --temperature too")


GREEDY = Decoder(beam=1)


def load(
    run: SavedRun, device: str, average_checkpoints: int | None = None, net: ModuleType = transformer
) -> Translator:
    """The translator of a run, its parameters averaged over the last checkpoints up to that of `run` (section 6.1).

    average_checkpoints: how many; what the run's --average-checkpoints says if None.

    Raises ValueError: there is no tokenizer, a checkpoint is of another net or damaged, or the run of an older form.
    """
    place, cfg = command_line.device(device), run.read("net", net.Config)
    tokenizer, model = tokenizers.load(run.folder / "tokenizer.json"), net.spec(cfg)
    saved, count = run.folder / "checkpoints", average_checkpoints or run.config["args"].get("average_checkpoints")
    if count is None:
        raise ValueError(f"the configuration of '{run.folder}' does not fit: it has no average_checkpoints")
    every = run.config["args"].get("common", {}).get("save_every", 1)
    # A stop saves one between the others, which the same run without a stop does not have.
    regular = [step for step in checkpoints.steps(saved) if step == run.step or not step % every]
    steps = [step for step in regular if step <= run.step][-count:]
    parts = [checkpoints.restore(saved, model, step, part="params") for step in steps]
    params = tree.map(lambda *leaves: torch.stack(leaves).mean(0), *parts)
    return Translator(tree.move(params, place), cfg, tokenizer)


def published(source: str, device: str) -> Translator:
    """The translator of published Marian weights: a folder or a hub repository, with config.json and tokenizer.

    Raises ValueError: a file is missing, or is another model or tokenizer than expected.
    """
    place = command_line.device(device)
    params, cfg = marian.from_pretrained(source)
    if not cfg.shared:
        raise ValueError(f"'{source}' has a vocabulary for each language; expected one for both")
    files = (weights.locate(weights.beside(source), (name,)) for name in ("source.spm", "vocab.json"))
    tokenizer = marian_tokenizer.load(*files)
    if tokenizer.vocabulary_size > cfg.source_vocabulary:
        size = f"the tokenizer of '{source}' has {tokenizer.vocabulary_size} tokens"
        raise ValueError(f"{size}, expected up to the {cfg.source_vocabulary} of the net")
    return Translator(tree.move(params, place), cfg, tokenizer, published_marks(source, cfg))


def published_marks(source: str, cfg: transformer.Config) -> Marks:
    """The marks of Marian weights, by their config.json and, where there is one, generation_config.json."""
    # Older repositories have config.json alone.
    settings = weights.read_config(source) | weights.read_config(source, "generation_config.json", optional=True)
    settings = {"decoder_start_token_id": cfg.padding_id, "eos_token_id": 0} | settings
    size = cfg.target_vocabulary
    start, end = (token_ids(settings, name, size) for name in ("decoder_start_token_id", "eos_token_id"))
    if len(start) != 1 or len(end) != 1:
        raise weights.WeightsError(
            f"the configuration has {len(start)} start and {len(end)} end tokens; expected one each"
        )
    words = settings.get("bad_words_ids") or []
    if not isinstance(words, list) or not all(isinstance(word, list) for word in words):
        raise weights.WeightsError(f"the configuration has bad_words_ids={words!r}; expected lists of ids")
    # Forbidden sequences of several tokens are ignored: Marian's files forbid the padding alone.
    single = {"bad_words_ids": [word[0] for word in words if len(word) == 1]}
    forbidden = {cfg.padding_id, *token_ids(single, "bad_words_ids", size)}
    return Marks(start[0], end[0], tuple(sorted(forbidden)))


def token_ids(settings: dict, name: str, vocabulary: int) -> tuple[int, ...]:
    """The ids of an entry of a published configuration: one, several or none. Raises WeightsError: no such tokens."""
    value = settings.get(name)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(type(token) is not int or not 0 <= token < vocabulary for token in ids):
        raise weights.WeightsError(f"the configuration has {name}={value!r}; expected ids below {vocabulary}")
    return tuple(ids)


def avoiding(step: Callable, forbidden: tuple[int, ...]) -> Callable:
    """The step of `nets.language.decoding` with the logits of these tokens at -inf."""
    if not forbidden:
        return step

    def call(cache: tree.Tree, tokens: Tensor, *others) -> tuple[Tensor, tree.Tree]:
        logits, cache = step(cache, tokens, *others)
        return logits.index_fill(-1, torch.tensor(forbidden, device=logits.device), -torch.inf), cache

    return call


@torch.no_grad()
def decode(
    translator: Translator, source: Tensor, decoder: Decoder, n_best: int = 1, keys: Tensor | None = None
) -> Decoded:
    """Translations of source (batch, time), padded: n_best of each, (batch, n_best, tokens).

    keys: (batch, 2), to sample with a temperature.
    """
    params, cfg, _, marks = translator
    net, most = NETS[type(cfg)], min(translator.context, source.shape[1] + LONGER)
    options = {"max_length": most, "end": marks.end, "padding": cfg.padding_id}
    if net is seq2seq:
        cache, step = seq2seq.start(params, seq2seq.encode(params, source, cfg), cfg), seq2seq.stepper(params, cfg)
    else:
        mask = source != cfg.padding_id
        memory = net.encode(params, source, cfg, mask=mask)
        cache = net.start(params, memory, mask, cfg, min(16, most))
        step = net.stepper(params, cfg, partial(net.step, donate=True))
        options["positions_axis"] = 2
    first = torch.full((len(source),), marks.start, device=source.device)
    step, options["shared"] = avoiding(step, marks.forbidden), cache["shared"]
    return search(step, cache["past"], first, decoder, n_best, keys, **options)


def search(
    step: Callable, cache: tree.Tree, first: Tensor, decoder: Decoder, n_best: int, keys: Tensor | None, **options
) -> Decoded:
    """Texts by the decoder's flags, beams, greedy or sampled: n_best of each, (batch, n_best, tokens)."""
    if decoder.temperature is None and decoder.beam > 1:
        options |= {"beams": decoder.beam, "n_best": n_best, "length_penalty": decoder.length_penalty}
        return beam_search(step, cache, first, **options)
    if decoder.temperature is None:
        out = greedy(step, cache, first, **options)
    else:
        options |= {"temperature": decoder.temperature, "top_k": decoder.top_k, "top_p": decoder.top_p}
        out = sample(step, cache, first, keys, **options)
    return Decoded(*(part[:, None] for part in out))  # tokens (batch, 1, time), scores (batch, 1)


def translations(
    translator: Translator, sentences: Sequence[str], decoder: Decoder = GREEDY, n_best: int = 1
) -> list[list[Translation]]:
    """The best translations of each sentence, best first; that of an empty sentence is empty.

    With a temperature they are n_best samples, sentence i with the key `fold_in(fold_in(seed, sample), i)`.

    Raises DataError naming the first sentence that is too long or no Unicode text.
    """
    params, cfg, tokenizer, marks = translator
    device = tree.leaves(params)[0].device
    pairs = corpus.of_sentences(sentences, tokenizer, translator.context)
    best: list[list[Translation]] = [[] for _ in sentences]
    for indices, *_ in buckets.evaluation_batches(pairs, DECODED, translator.context):
        rows = [torch.tensor([*pairs.ids(i, 0), marks.end]) for i in indices.tolist()]
        source = pad_sequence(rows, batch_first=True, padding_value=cfg.padding_id).to(device)  # (sentences, time)
        for number in range(1 if decoder.temperature is None else n_best):
            key = random.fold_in(random.key(decoder.seed), number)
            keys = random.fold_in(key, indices).to(device)
            out = decode(translator, source, decoder, n_best, keys)
            for i, rows, scores in zip(indices.tolist(), out.tokens.tolist(), out.scores.tolist(), strict=True):
                written = [[token for token in row if token not in (marks.end, cfg.padding_id)] for row in rows]
                rated = zip(written, scores, strict=True)
                best[i] += [Translation(tokenizer.decode(ids), s, ids) for ids, s in rated if s > -math.inf]
    empty = [Translation("", 0.0, [])]
    return [rows if sentence.strip() else empty for sentence, rows in zip(sentences, best, strict=True)]


def usable(translator: Translator, parts: Iterable[list[str]]) -> Iterator[list[str]]:
    """The sentences part by part, empty where one is too long or no Unicode text: each of these is logged with its
    number, and their count at the end."""
    bad, total = 0, 0
    for sentences in parts:
        options = {"skip": True, "first": total + 1}
        checked = corpus.of_sentences(sentences, translator.tokenizer, translator.context, **options)
        bad, total = bad + len(checked.left_out), total + len(sentences)
        yield ["" if i in checked.left_out else sentence for i, sentence in enumerate(sentences)]
    if bad:
        log.warning("%d of %d sentences are left empty: too long or no text", bad, total)


def write_samples(run: Run, translator: Translator, pairs: Sequence[Pair]) -> None:
    """Append translations of a few sentences, below their references, to the run's `samples.txt`."""
    texts = [best[0].text for best in translations(translator, [source for source, _ in pairs])]
    with open(run.folder / "samples.txt", "a", encoding="utf-8") as file:
        file.write(f"step {run.at}\n")
        file.writelines(f"  {s}\n  = {r}\n  > {t}\n" for (s, r), t in zip(pairs, texts, strict=True))
        file.write("\n")


def copy_baseline(pairs: Sequence[Pair], language: str) -> dict[str, float]:
    """The figures of translations that are the source sentences themselves: a baseline without a net."""
    figures = translation.scores(*zip(*pairs, strict=True), language)
    return {"copy_bleu": figures["bleu"], "copy_chrf": figures["chrf"]}


def evaluate(
    translator: Translator, pairs: Sequence[Pair], language: str, decoder: Decoder = GREEDY
) -> tuple[dict[str, float | str], list[Translation]]:
    """(The figures of the translations into a language beside those of `copy_baseline`, the translations)."""
    sources, references = zip(*pairs, strict=True)
    best = [rows[0] for rows in translations(translator, sources, decoder)]
    figures = translation.scores([one.text for one in best], references, language)
    return {**figures, **copy_baseline(pairs, language)}, best


SUMMARY = """\
{test}: BLEU {bleu:.2f}, chrF {chrf:.2f}, {exact_match:.2%} word for word (copied: BLEU {copy_bleu:.2f}, \
chrF {copy_chrf:.2f})
BLEU|{bleu_signature}"""


def maps(translator: Translator, sentence: str, ids: list[int]) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """(The net's `attention_maps` of one pair, its source tokens, its target tokens), each with the end token."""
    params, cfg, tokenizer, marks = translator
    source, target = [*tokenizer.encode(sentence), marks.end], ids[: translator.context - 1]
    x = torch.tensor([source]), torch.tensor([[marks.start, *target]])
    net = t5_attention if isinstance(cfg, t5.Config) else NETS[type(cfg)]
    maps = net.attention_maps(tree.move(params, "cpu"), x, cfg)
    return maps, tokenizer.tokens(source), tokenizer.tokens([*target, marks.end])


def draw_attention(folder: Path, translator: Translator, sentence: str, ids: list[int]) -> None:
    """`cross.png`, and of a transformer `encoder.png` and `decoder.png`, each as `draw_maps`."""
    layers, read, written = maps(translator, sentence, ids)
    (first,) = translator.tokenizer.tokens([translator.marks.start])
    sides = {"encoder": (read, read), "decoder": (written, [first, *written[:-1]]), "cross": (written, read)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, of_layers in layers.items():
        draw_maps(folder / f"{name}.png", of_layers, *sides[name])


def draw_maps(path: Path, weights: Tensor, rows: Sequence[str], columns: Sequence[str]) -> None:
    """Attention weights (1, layers, heads, rows, columns): a row of panels per layer, a column per head; the tokens
    stand beside the outer ones."""
    (layers, heads), size = weights.shape[1:3], {"width": 1.6 + 0.17 * len(columns), "height": 1.6 + 0.17 * len(rows)}
    with plots.panels(path, layers, heads, **size) as axes:
        for i, panel in enumerate(axes):
            layer, head = divmod(i, heads)
            names = rows if head == 0 else None, columns if layer == layers - 1 else None
            title = f"layer {layer + 1}, head {head + 1}" if layers * heads > 1 else "attention weights"
            plots.matrix(panel, weights[0, layer, head], *names, title=title, numbers=False)
            if head:
                panel.set_yticks([])
            if layer < layers - 1:
                panel.set_xticks([])
