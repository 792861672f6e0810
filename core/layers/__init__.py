"""Layers: pairs of a spec and a pure function, `linear_spec(d_in, d_out)` and `linear(p, x)`."""

from core.layers.activations import ACTIVATIONS, activation, geglu, prelu, prelu_spec, swiglu
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

__all__ = [
    "ACTIVATIONS",
    "activation",
    "adaptive_average_pool",
    "adaptive_max_pool",
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
    "geglu",
    "global_average_pool",
    "group_norm",
    "group_norm_spec",
    "instance_norm",
    "instance_norm_spec",
    "layer_norm",
    "layer_norm_spec",
    "linear",
    "linear_spec",
    "max_pool",
    "prelu",
    "prelu_spec",
    "rms_norm",
    "rms_norm_spec",
    "stochastic_depth",
    "swiglu",
]
