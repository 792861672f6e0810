"""Parts of the experiments with language models: nets of a preset, run or file, and texts that go on from a prompt."""

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from core import random, tree
from core.tree import Tree
from nets import weights
from nets.language import gpt2, llama
from train.data.text import tokenizers
from train.run import SavedRun

PRESETS = gpt2.PRESETS | {"llama-tiny" if name == "tiny" else name: cfg for name, cfg in llama.PRESETS.items()}
"""Every decoder that `experiments/gpt.py` trains."""


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


@torch.no_grad()
def write(
    net: ModuleType, params: Tree, cfg, tokenizer, prompt: str, tokens: int, show=None, *, key: Tensor, **options
) -> list[str]:
    """The prompt and what the model writes after it, one text per key, (2,) or (texts, 2).

    Args:
        tokens: number of tokens after the prompt, at most.
        show: called with each new piece of the first text.
        options: those of `net.stream`, such as `temperature`, `top_k` and `end`.

    Raises ValueError: the prompt has a character outside the vocabulary, or an option is outside its range.
    """
    ids, keys, shown = tokenizer.encode(prompt) if prompt else opening(tokenizer), key.reshape(-1, 2), 0
    rows, ended = [list(ids) for _ in keys], [False] * len(keys)
    start = torch.tensor([ids], device=tree.leaves(params)[0].device)
    for token in net.stream(params, start, cfg, tokens, key=keys, **options):
        for i, number in enumerate(token.tolist()):
            if not ended[i]:
                rows[i].append(number)
            ended[i] = ended[i] or number == options.get("end")
        written = tokenizer.decode(rows[0])
        if show and not written.endswith("\ufffd"):  # the first bytes of a character are not shown before the last
            show(written[shown:])
            shown = len(written)
    return [tokenizer.decode(row) for row in rows]


def write_samples(net: ModuleType, params: Tree, cfg, tokenizer, args) -> None:
    """Print what `net` writes after a prompt, the first text while it is written; the flags are those of `sample`."""
    end = None if args.end is None else tokenizer.encode(args.end)
    if end is not None and len(end) != 1:
        raise ValueError(f"--end {args.end!r} is {len(end)} tokens; expected a text of one")
    options = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "repetition_penalty")}
    options |= {
        "end": end and end[0],
        "key": random.split(random.key(args.seed, tree.leaves(params)[0].device), args.count),
    }
    show = functools.partial(print, end="", flush=True)
    texts = write(net, params, cfg, tokenizer, args.prompt, args.max_new_tokens, show, **options)
    print("".join(f"\n\n--- sample {number}\n{other}" for number, other in enumerate(texts[1:], 2)))
