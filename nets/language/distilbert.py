"""DistilBERT: a BERT of half the layers, without token types and pooler, taught by a BERT.

Sanh et al. 2019, "DistilBERT, a distilled version of BERT: smaller, faster, cheaper and lighter" (arXiv:1910.01108).
It is `nets.language.bert` with other choices; a hidden layer with relu takes the place of the pooler before the classes
of a sequence.
"""

from torch import Tensor

from nets.language import bert_weights
from nets.language.bert import Config, apply, features, hidden_states, outputs, sentence_embeddings, spec, token_logits
from nets.weights import Rename, config_of

__all__ = ["Config", "apply", "features", "hidden_states", "outputs", "sentence_embeddings", "spec", "token_logits"]

PRESETS = {"distilbert": Config(layers=6, types=0, head="features", pooler_activation="relu")}

LAYER = {
    "attn.proj": ("attention.out_lin",),
    "attn.qkv": ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    "mlp.down": ("ffn.lin2",),
    "mlp.up": ("ffn.lin1",),
    "norm1": ("sa_layer_norm",),
    "norm2": ("output_layer_norm",),
}
PARTS = {
    "classifier": "classifier",
    "masked_tokens.dense": "vocab_transform",
    "masked_tokens.norm": "vocab_layer_norm",
    "norm": "embeddings.LayerNorm",
    "pooler": "pre_classifier",
    "spans": "qa_outputs",
}


def rename_table(cfg: Config) -> dict[str, Rename]:
    """Our names -> those of transformers' DistilBert models, without the prefix "distilbert." of the encoder."""
    tables = {"positions": "position", "tokens": "word"}
    table = {f"{ours}.weight": Rename(f"embeddings.{theirs}_embeddings.weight") for ours, theirs in tables.items()}
    table |= {f"masked_tokens.{leaf}": Rename(f"vocab_projector.{leaf}") for leaf in ("bias", "weight")}
    return bert_weights.entries(spec(cfg), table, PARTS, "transformer.layer", LAYER)


def published_config(config: dict, head: str | None = None) -> Config:
    """Our configuration from the `config.json` of transformers; head: by default the architecture's.

    Raises:
        WeightsError: another kind of model, or an entry with a value that makes another function, by name.
    """
    bert_weights.check_kind(config, FAMILY.kind, {"pruned_heads": {}})
    fields = bert_weights.shared_fields(config, head, FAMILY)
    sizes = {"dim": "width", "hidden_dim": "hidden", "max_position_embeddings": "context", "n_heads": "heads"}
    sizes |= {"n_layers": "layers", "pad_token_id": "padding_id", "vocab_size": "vocabulary"}
    fields |= bert_weights.numbers(config, sizes, int, "an integer")
    rates = {"attention_dropout": "attention_dropout", "dropout": "dropout"}
    fields |= bert_weights.numbers(config, rates, (int, float), "a number")
    # Each head has a dropout rate of its own: that of the tokens is `dropout`.
    if fields["head"] in ("sequence", "spans"):
        name, default = {"sequence": ("seq_classif_dropout", 0.2), "spans": ("qa_dropout", 0.1)}[fields["head"]]
        fields |= bert_weights.numbers({name: default} | config, {name: "head_dropout"}, (int, float), "a number")
    return config_of(PRESETS["distilbert"], **fields, activation=bert_weights.activation(config, "activation"))


CLASSES = {
    "features": "Model",
    "masked_tokens": "ForMaskedLM",
    "sequence": "ForSequenceClassification",
    "spans": "ForQuestionAnswering",
    "tokens": "ForTokenClassification",
}
FAMILY = bert_weights.Family(
    "DistilBERT", "DistilBert", CLASSES, "vocab_projector", spec=spec, table=rename_table, config=published_config
)


def from_published(state: dict[str, Tensor], cfg: Config, key: Tensor | None = None) -> dict:
    """Parameters from the tensors of a published DistilBERT, as `nets.language.bert.from_published`."""
    return bert_weights.fit(state, cfg, FAMILY, key)


def from_pretrained(
    source: str, head: str | None = None, *, classes: int | None = None, key: Tensor | None = None
) -> tuple[dict, Config]:
    """(params, config) of a published DistilBERT, as `nets.language.bert.from_pretrained`."""
    return bert_weights.load(source, FAMILY, head, classes, key)
