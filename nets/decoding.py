"""From scores to tokens: pure functions that any decoder can use."""

import torch
from torch import Tensor

from core import random


def filter_logits(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Scores with every token that may not be drawn at -inf.

    Args:
        logits: (..., vocabulary).
        temperature: the scores are divided by it; above 0.
        top_k: only the k best tokens stay (Fan et al. 2018).
        top_p: of these, only the smallest set of best tokens whose probability reaches p (Holtzman et al. 2020).

    Raises:
        ValueError: an option outside its range.
    """
    if not temperature > 0.0:
        raise ValueError(f"temperature {temperature} is not above 0; the limit of 0 is greedy decoding")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k {top_k} is not at least 1")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p {top_p} is outside (0, 1]")
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = torch.where(logits < least, -torch.inf, logits)
    if top_p is not None and top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = torch.softmax(ordered, dim=-1)
        # A token stays if the tokens before it have not yet reached p; so the best one always does.
        ordered = torch.where(probabilities.cumsum(-1) - probabilities < top_p, ordered, -torch.inf)
        logits = ordered.gather(-1, order.argsort(dim=-1))
    return logits


def choose(
    logits: Tensor,
    key: Tensor | None = None,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """The next token of each example: the best one at temperature 0, otherwise drawn from the filtered scores.

    Args:
        logits: (batch, vocabulary).
        key: (2,); example i draws from `fold_in(key, i)`, so that it gets the same token in a batch of any size. Or one
            key an example, (batch, 2).

    Returns:
        (batch,) int64.

    Raises:
        ValueError: no key, or keys of another shape, at a temperature above 0; an option outside its range.
    """
    if temperature == 0.0:
        return logits.argmax(-1)
    if key is None:
        raise ValueError("drawing a token at a temperature above 0 needs key=")
    if key.ndim > 2 or (key.ndim == 2 and key.shape[0] != logits.shape[0]):
        raise ValueError(f"expected a key (2,) or ({logits.shape[0]}, 2), found {tuple(key.shape)}")
    keys = random.sites(key, logits.shape[0]) if key.ndim == 1 else key
    # argmax(logits + Gumbel noise) is a draw from softmax(logits).
    noise = random.gumbel(keys, (logits.shape[-1],), torch.float32)
    return (filter_logits(logits.float(), temperature, top_k, top_p) + noise).argmax(-1)
