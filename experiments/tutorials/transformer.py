# %% [markdown] lang="en"
# # The Transformer taken apart
#
# "Attention Is All You Need" (Vaswani et al. 2017, arXiv:1706.03762) in small functions: attention, masks, heads,
# positions, the blocks of encoder and decoder. Attention and blocks are compared with PyTorch's own. Then a tiny
# Transformer learns to reverse sequences, writes with a cache and without, and shows where it looks.
#
# You need to know matrix products, softmax, and a little PyTorch.

# %% [markdown] lang="zh"
# # 拆解 Transformer
#
# 把《Attention Is All You Need》（Vaswani 等 2017, arXiv:1706.03762）拆成几个小函数：注意力、掩码、多头、位置编码、
# 编码器块和解码器块；注意力和块都与 PyTorch 自带的实现对照。然后训练一个很小的 Transformer 把序列倒过来写，
# 分别用缓存和不用缓存生成，最后看它在写每个词元时注意哪里。
#
# 读者需要知道矩阵乘法和 softmax，并了解一点 PyTorch。

# %%
import math

import matplotlib.pyplot as plt
import torch

from core import random, spec
from nets.language import decoding, transformer
from train import optimizers
from train.losses import token_cross_entropy
from train.optimizers import schedules
from train.step import create, make_step

# %% [markdown] lang="en"
# ## Attention
#
# Every position asks a question, the query; every position offers a key and a value. A query looks at the keys like its
# own, and gets the mean of their values, weighted by
#
# $$\mathrm{attention}(Q, K, V) = \mathrm{softmax}\!\left(\frac{Q K^\top}{\sqrt{d}}\right) V$$
#
# The product of two vectors of $d$ random numbers of variance 1 has the standard deviation $\sqrt{d}$; divided by it,
# the softmax is neither flat nor all on one key. A mask says which keys a query may see: the score of the others is
# $-\infty$, their weight 0.

# %% [markdown] lang="zh"
# ## 注意力
#
# 每个位置提出一个问题，即查询（query）；每个位置又提供一个键（key）和一个值（value）。
# 查询去找与自己相似的键，得到对应的值的加权平均：
#
# $$\mathrm{attention}(Q, K, V) = \mathrm{softmax}\!\left(\frac{Q K^\top}{\sqrt{d}}\right) V$$
#
# 两个 $d$ 维随机向量（各分量方差为 1）的内积，标准差是 $\sqrt{d}$；除以它，softmax 才不会过于平坦，
# 也不会全部集中在一个键上。
# 掩码（mask）规定查询能看到哪些键：看不到的键得分为 $-\infty$，权重为 0。

# %%


def attention(q, k, v, allowed):
    """q, k, v (batch, heads, time, depth); `allowed` is True where a query may look at a key."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (batch, heads, queries, keys)
    weights = scores.masked_fill(~allowed, -math.inf).softmax(-1)
    return weights @ v, weights


q, k, v = random.normal(random.key(0), (3, 2, 1, 5, 8)).unbind(0)  # two examples, one head, 5 positions, depth 8
past = torch.ones(5, 5, dtype=torch.bool).tril()  # a decoder's position sees none after itself
real = torch.tensor([5, 3])[:, None] > torch.arange(5)  # (batch, keys): the second example has 3 tokens and padding
out, weights = attention(q, k, v, past & real[:, None, None, :])
print("q, k, v:", tuple(q.shape), " weights:", tuple(weights.shape), " output:", tuple(out.shape))
print((weights[1, 0] * 100).round().int())  # in percent
expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=past & real[:, None, None, :])
torch.testing.assert_close(out, expected)

# %% [markdown] lang="en"
# ## Heads
#
# One softmax makes one choice. So the width is cut into several heads, each with queries, keys and values of its own,
# computed by one matrix from the same vectors; a last matrix, `proj`, mixes their results. In cross attention the
# queries come from the target, keys and values from the source, the memory.

# %% [markdown] lang="zh"
# ## 多头
#
# 一次 softmax 只做一种选择。所以把宽度切成若干个头，每个头有自己的查询、键和值，由同一个矩阵从同样的向量算出；
# 最后再用矩阵 `proj` 把各头的结果混合。交叉注意力里，查询来自目标序列，键和值来自源序列，即 memory。

# %%


def linear(p, x):
    return x @ p["weight"].T + p["bias"]  # y = W x + b


def split(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # (batch, time, width) -> (batch, heads, time, depth)


def heads_of(q, k, v, p, heads, allowed):
    y, weights = attention(split(q, heads), split(k, heads), split(v, heads), allowed)
    return linear(p["proj"], y.transpose(1, 2).flatten(2)), weights  # (batch, time, width)


def self_attention(p, x, heads, allowed):
    return heads_of(*linear(p["qkv"], x).chunk(3, -1), p, heads, allowed)


def cross_attention(p, x, memory, heads, allowed):
    return heads_of(linear(p["q"], x), *linear(p["kv"], memory).chunk(2, -1), p, heads, allowed)


# %% [markdown] lang="en"
# ## Blocks
#
# A block of the encoder is attention among the source's positions and an MLP at each position; a block of the decoder
# has attention to the memory between the two. Each of these parts is added to its input and normalised:
# $x \leftarrow \mathrm{norm}(x + f(x))$. The same parameters in `torch.nn`'s layers give the same numbers.

# %% [markdown] lang="zh"
# ## 块
#
# 编码器块由源序列各位置之间的注意力和逐位置的 MLP 组成；解码器块在两者之间还有对 memory 的注意力。
# 每一部分的输出都与输入相加，再做归一化：$x \leftarrow \mathrm{norm}(x + f(x))$。
# 把同样的参数放进 `torch.nn` 的层，结果相同。

# %%


def norm(p, x):
    mean, var = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
    return (x - mean) / torch.sqrt(var + 1e-5) * p["weight"] + p["bias"]


def mlp(p, x):
    return linear(p["down"], linear(p["up"], x).relu())


def encoder_block(p, x, heads, real):
    x = norm(p["norm1"], x + self_attention(p["attn"], x, heads, real)[0])
    return norm(p["norm2"], x + mlp(p["mlp"], x))


def decoder_block(p, x, memory, heads, past, real):
    x = norm(p["norm1"], x + self_attention(p["attn"], x, heads, past)[0])
    y, weights = cross_attention(p["cross"], x, memory, heads, real)
    x = norm(p["norm_cross"], x + y)
    return norm(p["norm2"], x + mlp(p["mlp"], x)), weights


# %%
cfg = transformer.Config(12, 12, layers=1, heads=4, width=64, hidden=128, dropout=0.0, context=16)
params = spec.init(random.key(1), transformer.spec(cfg))
encoder, decoder = params["encoder"]["blocks"][0], params["decoder"]["blocks"][0]
sizes = {"dim_feedforward": cfg.hidden, "dropout": 0.0, "batch_first": True}


def load(layer, p, names):
    state = {f"{theirs}.{leaf}": x for theirs, ours in names.items() for leaf, x in p[ours].items()}
    state |= {f"linear{i + 1}.{leaf}": x for i, part in enumerate(("up", "down")) for leaf, x in p["mlp"][part].items()}
    state |= {f"self_attn.in_proj_{leaf}": x for leaf, x in p["attn"]["qkv"].items()}
    state |= {f"self_attn.out_proj.{leaf}": x for leaf, x in p["attn"]["proj"].items()}
    for leaf in ("weight", "bias") if "cross" in p else ():
        state[f"multihead_attn.in_proj_{leaf}"] = torch.cat([p["cross"]["q"][leaf], p["cross"]["kv"][leaf]])
        state[f"multihead_attn.out_proj.{leaf}"] = p["cross"]["proj"][leaf]
    layer.load_state_dict(state)
    return layer


x, y = random.normal(random.key(2), (2, 2, 5, cfg.width)).unbind(0)  # a source and a target, (batch, time, width)
memory = encoder_block(encoder, x, cfg.heads, real[:, None, None, :])
theirs = load(torch.nn.TransformerEncoderLayer(64, 4, **sizes), encoder, {"norm1": "norm1", "norm2": "norm2"})
torch.testing.assert_close(memory, theirs(x, src_key_padding_mask=~real))
out, weights = decoder_block(decoder, y, memory, cfg.heads, past, real[:, None, None, :])
names = {"norm1": "norm1", "norm2": "norm_cross", "norm3": "norm2"}
theirs = load(torch.nn.TransformerDecoderLayer(64, 4, **sizes), decoder, names)
torch.testing.assert_close(out, theirs(y, memory, tgt_mask=~past, memory_key_padding_mask=~real))
print("memory:", tuple(memory.shape), " output:", tuple(out.shape), " cross attention:", tuple(weights.shape))

# %% [markdown] lang="en"
# ## Positions
#
# Attention is a weighted mean and does not know the order: if the positions change places, so do the results, and
# nothing else changes. So the order is added to the embedded tokens, as sines and cosines of many wavelengths:
#
# $$p_{t, 2i} = \sin(t / 10000^{2i/w}), \qquad p_{t, 2i+1} = \cos(t / 10000^{2i/w})$$

# %% [markdown] lang="zh"
# ## 位置
#
# 注意力是加权平均，不知道顺序：交换各个位置，结果也只是跟着交换，别无变化。
# 所以要把顺序加到词元的嵌入上，用许多不同波长的正弦和余弦：
#
# $$p_{t, 2i} = \sin(t / 10000^{2i/w}), \qquad p_{t, 2i+1} = \cos(t / 10000^{2i/w})$$

# %%
everything, order = torch.ones(5, 5, dtype=torch.bool), torch.tensor([3, 0, 4, 1, 2])
shuffled = self_attention(encoder["attn"], x[:, order], cfg.heads, everything)[0]
torch.testing.assert_close(shuffled, self_attention(encoder["attn"], x, cfg.heads, everything)[0][:, order])


def embed(params, ids):
    table = params["tokens"]["weight"]  # (vocabulary, width), for source, target and output layer
    angles = torch.arange(ids.shape[1])[:, None] * 10000.0 ** (-torch.arange(0, cfg.width, 2) / cfg.width)
    positions = torch.stack([angles.sin(), angles.cos()], -1).flatten(1)  # (time, width)
    return math.sqrt(cfg.width) * table[ids] + positions


def whole(params, source, target):
    """Logits (batch, target time, vocabulary) and cross attention of the last block; token 0 is padding."""
    real, x = (source != 0)[:, None, None, :], embed(params, source)
    for p in params["encoder"]["blocks"]:
        x = encoder_block(p, x, cfg.heads, real)
    past, y = torch.ones(target.shape[1], target.shape[1], dtype=torch.bool).tril(), embed(params, target)
    for p in params["decoder"]["blocks"]:
        y, weights = decoder_block(p, y, x, cfg.heads, past, real)
    return y @ params["tokens"]["weight"].T, weights


# %% [markdown] lang="en"
# ## A task: write it backwards
#
# A source has 5 tokens of ten kinds, 2 to 11; its target is the same from the end, after a start token 1. The decoder
# reads the target up to a position and must name the token after it. `nets.language.transformer` is the same function
# as `whole`, so we train with it.

# %% [markdown] lang="zh"
# ## 任务：倒着写
#
# 源序列有 5 个词元，取自 2 到 11 这十种；目标是倒过来的源序列，前面加一个起始词元 1。
# 解码器读目标的前一段，要说出下一个词元。`nets.language.transformer` 与 `whole` 是同一个函数，训练就用它。

# %%
UPDATES, PER_UPDATE, LENGTH = 160, 64, 5
source = random.randint(random.key(3), ((UPDATES + 4) * PER_UPDATE, LENGTH), 2, 12).long()  # the last 256 are for later
after = source.flip(1)  # (sequences, 5), what the decoder must name
target = torch.cat([torch.ones_like(after[:, :1]), after[:, :-1]], 1)  # (sequences, 5), what it reads
print("source", source[0].tolist(), " target", target[0].tolist(), " next tokens", after[0].tolist())
torch.testing.assert_close(
    whole(params, source[:2], target[:2])[0], transformer.apply(params, (source[:2], target[:2]), cfg)
)


def loss(params, batch, keys):
    source, target, after = batch
    return token_cross_entropy(transformer.apply(params, (source, target), cfg), after)


optimizer = optimizers.adam(schedules.warmup_cosine(5e-3, 20, UPDATES))
state, step = create(random.key(4), transformer.spec(cfg), optimizer), make_step(loss, optimizer, compile=False)
for at in range(UPDATES):
    state, metrics = step(state, [x[at * PER_UPDATE : (at + 1) * PER_UPDATE] for x in (source, target, after)])
    if at % 40 == 39:
        print(f"update {at + 1}: {float(metrics['loss']):.3f} nats per token")
params = state.params

# %% [markdown] lang="en"
# ## Writing, with a cache and without
#
# To write, the decoder reads its own tokens. Done plainly, every step reads all of them again. But as no position sees
# those after it, the keys and values of the past do not change: a cache keeps them, and a step computes one position.
# Greedy decoding takes the most likely token at each step. Sampling draws one from the softmax of the logits divided by
# a temperature: the higher it is, the more often an unlikely token is taken.

# %% [markdown] lang="zh"
# ## 生成：用缓存与不用缓存
#
# 生成时，解码器读的是自己写出的词元。最直接的做法是每一步都把它们全部重读一遍。但任何位置都看不到后面的位置，
# 所以过去的键和值不会再变：把它们存进缓存，每一步只需计算一个位置。
# 贪心解码每一步取概率最大的词元；采样则把 logits 除以温度，做 softmax，再按概率抽取：
# 温度越高，越常抽到不太可能的词元。

# %%
new = source[-256:]
cache = transformer.start(params, transformer.encode(params, new, cfg), None, cfg, positions=LENGTH)
beginning, shared = cache["past"], cache["shared"]
print("keys in the cache:", tuple(beginning[0].keys.shape))  # (batch, heads, positions, depth)
written = torch.ones(len(new), 1).long()
for t in range(LENGTH):
    by_all = whole(params, new, written)[0][:, -1]  # all positions so far
    by_cache, cache = transformer.step(params, cache, written[:, -1], torch.tensor(t), cfg)  # one position
    torch.testing.assert_close(by_all, by_cache, rtol=1e-3, atol=1e-3)
    written = torch.cat([written, by_cache.argmax(-1, keepdim=True)], 1)
print(new[0].tolist(), "->", written[0, 1:].tolist())

# %%
step = transformer.stepper(params, cfg)
for temperature in (0.0, 0.5, 1.0, 2.0):
    options = {"max_length": LENGTH, "shared": shared, "temperature": temperature}
    tokens = decoding.sample(step, beginning, target[-256:, 0], random.key(5), **options).tokens
    right = (tokens == after[-256:]).all(1).float().mean()
    print(f"temperature {temperature}: {right:.0%} of {len(new)} new sequences reversed without a mistake")
    assert temperature > 0 or torch.equal(tokens, written[:, 1:])

# %% [markdown] lang="en"
# ## Where does it look?
#
# The cross attention of the four heads for one sequence, a row per token written. Nobody told the net where to look.

# %% [markdown] lang="zh"
# ## 它在看哪里？
#
# 一个序列上四个头的交叉注意力，每行对应写出的一个词元。该看哪里，没有人告诉过网络。

# %%
_, weights = whole(params, new[:1], written[:1, :-1])  # (1, heads, 5, 5)
figure, axes = plt.subplots(1, 4, figsize=(9, 2.7), sharey=True, layout="constrained")
for head, axis in enumerate(axes):
    image = axis.imshow(weights[0, head].numpy(), cmap="viridis", vmin=0, vmax=1)
    axis.set_xticks(range(LENGTH), [str(i) for i in new[0].tolist()])
    axis.set_yticks(range(LENGTH), [str(i) for i in written[0, 1:].tolist()])
    axis.set(title=f"head {head + 1}", xlabel="token of the source")
axes[0].set_ylabel("token written")
figure.colorbar(image, ax=axes, label="attention weight")
plt.show()

# %% [markdown] lang="en"
# ## Where to go from here
#
# - [nets/explained/transformer.py](../../nets/explained/transformer.py): these functions as one file of 100 lines.
# - [translate](../README.md#translate): the same net translates German, with byte pairs, beams and BLEU.
# - [nets/README.md](../../nets/README.md#translation): encode, decode, start, step and the beam search.

# %% [markdown] lang="zh"
# ## 接下来
#
# - [nets/explained/transformer.py](../../nets/explained/transformer.py)：把这些函数写成一个 100 行的文件。
# - [translate](../README.md#translate)：同一个网络翻译德语，包括字节对编码（BPE）、束搜索和 BLEU。
# - [nets/README.md](../../nets/README.md#translation)：encode、decode、start、step 以及束搜索。
