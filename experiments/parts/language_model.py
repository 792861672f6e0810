"""Parts of the experiments with language models: nets of a preset, run or file, and their tokenizers."""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from core.tree import Tree
from experiments.parts import translator
from nets import weights
from nets.language import gpt2, llama, rnn, t5, t5_weights, transformer
from train.data.text import tokenizers
from train.run import SavedRun, checkpoints, open_run

PRESETS = gpt2.PRESETS | {"llama-tiny" if name == "tiny" else name: cfg for name, cfg in llama.PRESETS.items()}
"""Every decoder that `experiments/gpt.py` trains."""
OWN = {"gpt": "params", "char_rnn": "state.params", "generate": "params", "pretrain": "params"}
"""Experiments whose runs write, and the part of their checkpoints with the parameters."""
KINDS = ("gpt2", "openai-gpt", *llama.KINDS, "t5", "marian")


def net_of(cfg: gpt2.Config | llama.Config) -> ModuleType:
    """The module of a configuration."""
    return llama if isinstance(cfg, llama.Config) else gpt2


def net_of_run(run: SavedRun) -> tuple[ModuleType, Any]:
    """(module, configuration) of a run of `experiments/gpt.py`."""
    stored = run.config.get("net") if isinstance(run.config, dict) else None
    net = llama if isinstance(stored, dict) and "kv_heads" in stored else gpt2
    return net, run.read("net", net.Config)


def from_pretrained(source: str) -> tuple[Tree, Any]:
    """(params, configuration) of a published GPT, Llama or kin of theirs, as its `config.json` says."""
    kind = weights.read_config(source).get("model_type")
    known = {"gpt2": gpt2, "openai-gpt": gpt2} | dict.fromkeys(llama.KINDS, llama)
    if kind not in known:
        raise weights.WeightsError(f"the configuration is of model_type '{kind}', expected one of {', '.join(known)}")
    return known[kind].from_pretrained(source)


def published_tokenizer(source: str) -> Any:
    """The tokenizer of published weights: tokenizer.json, or vocab.json and merges.txt, beside them."""
    folder = weights.beside(source)
    path = weights.locate(folder, ("tokenizer.json", "vocab.json"))
    if path.name == "tokenizer.json":
        return tokenizers.load(path)
    weights.locate(folder, ("merges.txt",))  # of a repository, fetched beside the other
    return tokenizers.load(path.parent)


def check_vocabulary(tokenizer, cfg) -> None:
    """Raise ValueError if the tokenizer has more tokens than the net of `cfg`."""
    if tokenizer.vocabulary_size > cfg.vocabulary:
        size = f"the tokenizer has {tokenizer.vocabulary_size} tokens"
        raise ValueError(f"{size}, expected up to the {cfg.vocabulary} of the net")


def opening(tokenizer) -> list[int]:
    """The tokens of an empty prompt: a line end, or any token where the vocabulary has none."""
    try:
        return tokenizer.encode("\n") or [0]
    except ValueError:
        return [0]


class Writer(NamedTuple):
    """A net, its tokenizer, and what its texts need.

    ends: tokens that end a text.
    first: token before a text of a net with an encoder, whose prompt is its source; None for a decoder alone.
    forbidden: tokens that no text has.
    published: whether the tokenizer says which special tokens surround a prompt.
    """

    net: ModuleType
    params: Tree
    cfg: Any
    tokenizer: Any
    ends: tuple[int, ...] = ()
    first: int | None = None
    forbidden: tuple[int, ...] = ()
    published: bool = False


def of_run(folder: Path, checkpoint: str = "latest", part: str = "target") -> Writer:
    """The net of a run of gpt.py, char_rnn.py, pretrain.py or generate.py. part: of the latter, target or draft.

    Raises ValueError: no such run, or one of another script.
    """
    saved = folder / "checkpoints"
    name = checkpoints.read_config(saved).get("experiment") if saved.is_dir() else "generate"
    if name in ("translate", "seq2seq"):
        raise ValueError(
            f"'{folder}' is a run of {name}.py; use: python experiments/{name}.py translate --run {folder}"
        )
    if name not in OWN:
        raise ValueError(f"'{folder}' is a run of {name}.py; expected one of gpt.py, char_rnn.py or generate.py")
    run, where = open_run(folder, Path("runs") / name, checkpoint), OWN[name]  # an error lists the runs that there are
    tokenizer = tokenizers.load(folder / "tokenizer.json", lossy=name == "pretrain")
    if name == "pretrain":
        return _of_pretrained(run, tokenizer)
    if name == "gpt":
        net, cfg = net_of_run(run)
    elif name == "char_rnn":
        net, cfg = rnn, run.read("net", rnn.Config)
    else:
        net, cfg, where = llama, run.read(part, llama.Config), f"{where}.{part}"
    return Writer(net, run.restore(net.spec(cfg), where), cfg, tokenizer)


def _of_pretrained(run: SavedRun, tokenizer: Any) -> Writer:
    """The net of a run of pretrain.py, causal or of corrupted spans."""
    nets = {"gpt2": gpt2, "llama": llama, "t5": t5}
    if run.config.get("kind") not in nets:
        raise ValueError(f"'{run.folder}' writes no text; use: python experiments/pretrain.py fill --run {run.folder}")
    net = nets[run.config["kind"]]
    cfg = run.read("net", net.Config)
    ends = (tokenizer.token_id("</s>"),) if net is t5 else ()
    params = run.restore(net.spec(cfg), "params")
    return Writer(net, params, cfg, tokenizer, ends, cfg.padding_id if net is t5 else None)


def of_weights(source: str) -> Writer:
    """Published weights of a GPT, Llama, T5 or Marian: a folder or repository with config.json and the tokenizer."""
    config = weights.read_config(source)
    kind = config.get("model_type")
    if kind not in KINDS:
        raise weights.WeightsError(f"the configuration is of model_type '{kind}', expected one of {', '.join(KINDS)}")
    if kind == "marian":
        params, cfg, tokenizer, marks = translator.published(source, "cpu")
        return Writer(transformer, params, cfg, tokenizer, (marks.end,), marks.start, marks.forbidden)
    settings = config | weights.read_config(source, "generation_config.json", optional=True)
    if kind == "t5":
        params, cfg = t5_weights.from_pretrained(source)
        path = weights.locate(weights.beside(source), ("tokenizer.json",))
        tokenizer, net, first = tokenizers.load(path, lossy=True), t5, cfg.padding_id
    else:
        params, cfg = from_pretrained(source)
        tokenizer, net, first = published_tokenizer(source), net_of(cfg), None
    check_vocabulary(tokenizer, cfg)
    ends = translator.token_ids(settings, "eos_token_id", cfg.vocabulary)
    return Writer(net, params, cfg, tokenizer, ends, first, published=True)


def load(source: str) -> Writer:
    """A run's folder, or published weights; a run of generate.py gives its draft."""
    folder = Path(source)
    return of_run(folder, part="draft") if (folder / "checkpoints").is_dir() else of_weights(source)


def check_draft(draft: Writer, writer: Writer) -> None:
    """Raise ValueError unless a number is the same token to both, as far as both have it."""
    if draft.tokenizer is writer.tokenizer:
        return
    theirs, ours = _tokens(draft.tokenizer), _tokens(writer.tokenizer)
    for i in sorted(theirs.keys() & ours.keys()):
        if theirs[i] != ours[i]:
            pair = f"token {i} is {theirs[i]!r} to the draft and {ours[i]!r} to the net"
            raise ValueError(f"the draft has another vocabulary: {pair}")


def _tokens(tokenizer: Any) -> dict[int, str]:
    if isinstance(tokenizer, tokenizers.CharTokenizer):
        return dict(enumerate(tokenizer.chars))
    return {i: token for token, i in tokenizer.tokenizer.get_vocab().items()}


def ids_of(writer: Writer, prompt: str) -> list[int]:
    """The tokens of a prompt, with those that the tokenizer puts around it, such as Llama's <s> and T5's </s>."""
    if writer.published:
        ids, around = (writer.tokenizer.encode(text, special=True) for text in (prompt, ""))
        if around and ids[:2] == around[:1] * 2:  # the prompt begins with its own <s>
            ids = ids[1:]
        return ids or list(writer.ends[:1]) or opening(writer.tokenizer)
    if writer.first is not None:
        return [*writer.tokenizer.encode(prompt), *writer.ends]
    return writer.tokenizer.encode(prompt) if prompt else opening(writer.tokenizer)


def text_of(writer: Writer, ids: Sequence[int]) -> str:
    """Without special tokens."""
    if writer.published:
        return writer.tokenizer.tokenizer.decode(list(ids), skip_special_tokens=True)
    hidden = {*writer.ends, *writer.forbidden}
    return writer.tokenizer.decode([token for token in ids if token not in hidden])
