"""Small BERTs, DistilBERTs and RoBERTas: transformers' models with random weights, and batches for them."""

from dataclasses import dataclass
from types import ModuleType

import torch
import transformers

from core import random
from nets.language import bert, distilbert, roberta


@dataclass(frozen=True)
class Family:
    module: ModuleType
    classes: str
    config: dict
    padding: int = 0


SIZES = {"vocab_size": 31, "max_position_embeddings": 24, "bos_token_id": None, "eos_token_id": None}
NAMES = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 24}
FAMILIES = {
    "bert": Family(bert, "Bert", SIZES | NAMES),
    "distilbert": Family(distilbert, "DistilBert", SIZES | {"n_layers": 2, "n_heads": 2, "dim": 16, "hidden_dim": 24}),
    "roberta": Family(
        roberta, "Roberta", SIZES | NAMES | {"type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1}, padding=1
    ),
}
CASES = [(name, head) for name, family in FAMILIES.items() for head in family.module.CLASSES if head != "features"]
CASES = [("distilbert", "features"), *CASES]


def model_of(name, head, **options):
    """transformers' model with weights far from their start, in evaluation mode."""
    family = FAMILIES[name]
    end = family.module.CLASSES[head]
    config = getattr(transformers, f"{family.classes}Config")(**family.config | options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, family.classes + end)(config).eval()
    keys = random.split(random.key(7), 100).unbind(0)
    with torch.no_grad():
        for key, p in zip(keys, model.parameters(), strict=False):
            p += (0.3 if p.ndim > 1 else 0.1) * random.normal(key, p.shape)
    # torch's embeddings would leave the row of the padding without its gradient.
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None
    return model


def ids(name, batch=4, time=9, seed=1):
    """(batch, time) tokens, padded to the lengths 9, 4, 6, 1 ..."""
    padding = FAMILIES[name].padding
    tokens = random.randint(random.key(seed), (batch, time), 2, 31).long()
    lengths = torch.tensor([9, 4, 6, 1])[torch.arange(batch) % 4][:, None]
    return torch.where(torch.arange(time) < lengths, tokens, padding)


def types_of(tokens):
    return (torch.arange(tokens.shape[1]) >= 3).long().expand_as(tokens)


def outputs(name, model, tokens, types=None):
    """transformers' hidden states, and its output in our form."""
    options = {} if types is None else {"token_type_ids": types}
    mask = (tokens != FAMILIES[name].padding).long()
    out = model(tokens, attention_mask=mask, output_hidden_states=True, **options)
    return out.hidden_states, ours(out)


def ours(out):
    """The output of a model of transformers, in the form of `bert.apply`."""
    if "start_logits" in out:
        return torch.stack([out.start_logits, out.end_logits], -1)
    if "prediction_logits" in out:
        return {"masked_tokens": out.prediction_logits, "next_sentence": out.seq_relationship_logits}
    if "logits" in out:
        return out.logits
    if out.get("pooler_output") is None:
        return out.last_hidden_state
    return {"features": out.last_hidden_state, "pooled": out.pooler_output}
