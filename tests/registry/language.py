"""Nets that read and write tokens."""

from nets.language import gpt2, transformer
from tests.registry.face import both, net, published, tokens

GPT = {"vocabulary": 31, "context": 10, "layers": 2, "heads": 2, "width": 8}
net("gpt2", gpt2, gpt2.Config(**GPT, dropout=0.2), tokens(31, 10), draws=True)
net("gpt2, no bias", gpt2, gpt2.Config(**GPT, dropout=0.0, bias=False), tokens(31, 10))
net("gpt2, norm last", gpt2, gpt2.Config(**GPT, dropout=0.1, norm_first=False), tokens(31, 10), draws=True)
published(
    gpt2,
    {
        # Radford et al. 2018 and 2019, as in the published weights (tests/nets/language/test_gpt2.py).
        "gpt": 116_534_784,
        "gpt2": 124_439_808,
        "gpt2-medium": 354_823_168,
        "gpt2-large": 774_030_080,
        "gpt2-xl": 1_557_611_200,
        # nanoGPT prints 0.80M and 10.65M, in which the positions are not counted.
        "nanogpt-cpu": 804_096,
        "nanogpt-gpu": 10_745_088,
    },
)

# Token 0 is padding, here also between others.
SENTENCES = {"source_vocabulary": 13, "target_vocabulary": 13, "heads": 2, "width": 8, "hidden": 12, "context": 9}
PAIRS = both(tokens(13, 7), tokens(13, 5))
PRENORM = transformer.Config(**SENTENCES, layers=2, dropout=0.2, norm_first=True, positions="halves", scale=False)
net("transformer, norm first", transformer, PRENORM, PAIRS, draws=True)
SENTENCES |= {"layers": 1}
net("transformer", transformer, transformer.Config(**SENTENCES, dropout=0.0), PAIRS)
net("transformer, dropout", transformer, transformer.Config(**SENTENCES, attention_dropout=0.2), PAIRS, draws=True)
SENTENCES |= {"target_vocabulary": 11, "shared": False, "output_bias": True, "positions": "learned"}
SEPARATE = transformer.Config(**SENTENCES, dropout=0.0, activation="silu", final_norms=True)
net("transformer, separate embeddings", transformer, SEPARATE, both(tokens(13, 7), tokens(11, 5)))
# The paper's table 3 has 65 and 213 million for a shared vocabulary of "about 37,000" tokens, which are counted here.
published(transformer, {"base": 63_082_496, "big": 214_245_376})
