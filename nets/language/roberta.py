"""RoBERTa: BERT trained longer, on masked tokens alone.

Liu et al. 2019, "RoBERTa: A Robustly Optimized BERT Pretraining Approach" (arXiv:1907.11692). It is
`nets.language.bert` with other choices: one token type, and positions that are counted over the tokens that are no
padding, from padding_id + 1 = 2 on. The classes of a sequence are read at <s> by a hidden layer with tanh, as from
BERT's pooler, with dropout before it too.
"""

from dataclasses import replace

from torch import Tensor

from nets.language import bert_weights
from nets.language.bert import (
    LAYER,
    Config,
    apply,
    features,
    hidden_states,
    outputs,
    sentence_embeddings,
    spec,
    token_logits,
)
from nets.weights import Rename, WeightsError, config_of

__all__ = ["Config", "apply", "features", "hidden_states", "outputs", "sentence_embeddings", "spec", "token_logits"]

BASE = Config(vocabulary=50265, types=1, eps=1e-5, padding_id=1, positions="tokens", pooler_dropout=0.1)
PRESETS = {
    "distilroberta": replace(BASE, layers=6),
    "roberta-base": BASE,
    "roberta-large": replace(BASE, layers=24, heads=16, width=1024, hidden=4096),
}
PARTS = {
    "masked_tokens.dense": "lm_head.dense",
    "masked_tokens.norm": "lm_head.layer_norm",
    "norm": "embeddings.LayerNorm",
    "spans": "qa_outputs",
}


def rename_table(cfg: Config) -> dict[str, Rename]:
    """Our names -> those of transformers' Roberta models, without the prefix "roberta." of the encoder."""
    tables = {"positions": "position", "tokens": "word", "types": "token_type"}
    table = {f"{ours}.weight": Rename(f"embeddings.{theirs}_embeddings.weight") for ours, theirs in tables.items()}
    table |= {"masked_tokens.bias": Rename("lm_head.bias"), "masked_tokens.weight": Rename("lm_head.decoder.weight")}
    sequence = cfg.head == "sequence"
    parts = PARTS | {"classifier": "classifier.out_proj" if sequence else "classifier"}
    parts |= {"pooler": "classifier.dense" if sequence else "pooler.dense"}
    return bert_weights.entries(spec(cfg), table, parts, "encoder.layer", LAYER)


def published_config(config: dict, head: str | None = None) -> Config:
    """Our configuration from the `config.json` of transformers; head: by default the architecture's.

    Raises:
        WeightsError: another kind of model, or an entry with a value that makes another function, by name.
    """
    # What the file leaves out is as in transformers' RobertaConfig, not as in its published models.
    defaults = {"max_position_embeddings": 512, "pad_token_id": 1, "type_vocab_size": 2, "vocab_size": 50265}
    fields = bert_weights.encoder_fields(defaults | {"layer_norm_eps": 1e-12} | config, head, FAMILY)
    if fields["head"] == "masked_tokens" and fields["activation"] != "gelu":
        theirs = config["hidden_act"]
        raise WeightsError(f"the configuration has hidden_act={theirs!r}; only 'gelu' is supported with masked_tokens")
    fields["context"] -= fields["padding_id"] + 1  # rows of the table -> tokens
    rate = fields.get("head_dropout", fields.get("dropout", BASE.dropout))
    return config_of(BASE, **fields, pooler_dropout=rate)


CLASSES = {
    "pooler": "Model",
    "features": "Model",
    "masked_tokens": "ForMaskedLM",
    "sequence": "ForSequenceClassification",
    "spans": "ForQuestionAnswering",
    "tokens": "ForTokenClassification",
}
FAMILY = bert_weights.Family(
    "RoBERTa", "Roberta", CLASSES, "lm_head.decoder", spec=spec, table=rename_table, config=published_config
)


def from_published(state: dict[str, Tensor], cfg: Config, key: Tensor | None = None) -> dict:
    """Parameters from the tensors of a published RoBERTa, as `nets.language.bert.from_published`."""
    return bert_weights.fit(state, cfg, FAMILY, key)


def from_pretrained(
    source: str, head: str | None = None, *, classes: int | None = None, key: Tensor | None = None
) -> tuple[dict, Config]:
    """(params, config) of a published RoBERTa, as `nets.language.bert.from_pretrained`."""
    return bert_weights.load(source, FAMILY, head, classes, key)
