"""Layers: pairs of a spec and a pure function, `linear_spec(d_in, d_out)` and `linear(p, x)`."""

from core.layers.activations import ACTIVATIONS, activation, geglu, prelu, prelu_spec, swiglu
from core.layers.adaptive_softmax import adaptive_cross_entropy, adaptive_log_softmax, adaptive_softmax_spec
from core.layers.convolution import conv, conv_spec, conv_transpose
from core.layers.dropout import dropout, dropout_channels, dropout_sites, stochastic_depth
from core.layers.embedding import embedding, embedding_spec
from core.layers.linear import linear, linear_spec
from core.layers.normalization import (
    batch_norm,
    batch_norm_spec,
    freeze_batch_norms,
    group_norm,
    group_norm_spec,
    instance_norm,
    instance_norm_spec,
    layer_norm,
    layer_norm_spec,
    rms_norm,
    rms_norm_spec,
)
from core.layers.pooling import (
    adaptive_average_pool,
    adaptive_max_pool,
    average_pool,
    global_average_pool,
    max_pool,
)
from core.layers.recurrent import (
    gru,
    gru_spec,
    layer_norm_lstm,
    layer_norm_lstm_spec,
    lstm,
    lstm_spec,
    rnn,
    rnn_spec,
)
from core.layers.recurrent_stack import empty_state, recurrent, recurrent_spec
from core.layers.resize import upsample_nearest

__all__ = [
    "ACTIVATIONS",
    "activation",
    "adaptive_average_pool",
    "adaptive_cross_entropy",
    "adaptive_log_softmax",
    "adaptive_max_pool",
    "adaptive_softmax_spec",
    "average_pool",
    "batch_norm",
    "batch_norm_spec",
    "conv",
    "conv_spec",
    "conv_transpose",
    "dropout",
    "dropout_channels",
    "dropout_sites",
    "embedding",
    "embedding_spec",
    "freeze_batch_norms",
    "empty_state",
    "geglu",
    "global_average_pool",
    "group_norm",
    "group_norm_spec",
    "gru",
    "gru_spec",
    "instance_norm",
    "instance_norm_spec",
    "layer_norm",
    "layer_norm_lstm",
    "layer_norm_lstm_spec",
    "layer_norm_spec",
    "linear",
    "linear_spec",
    "lstm",
    "lstm_spec",
    "max_pool",
    "prelu",
    "prelu_spec",
    "rms_norm",
    "recurrent",
    "recurrent_spec",
    "rms_norm_spec",
    "rnn",
    "rnn_spec",
    "stochastic_depth",
    "swiglu",
    "upsample_nearest",
]
