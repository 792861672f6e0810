# %% [markdown] lang="en"
# # T5 taken apart
#
# T5 (Raffel et al. 2020, arXiv:1910.10683) is a Transformer with encoder and decoder for any task of text to text. It
# differs from the first Transformer above all in four places: the norm, the scores of attention, the positions, and the
# task that it is trained on. We write them out, put them together, and compare the whole with transformers. At the end
# we look at what a head can learn about distance, and what it cannot.
#
# You need to know attention: queries, keys, values and a softmax. The comparison needs `pip install transformers`.

# %% [markdown] lang="zh"
# # 拆解 T5
#
# T5（Raffel 等 2020, arXiv:1910.10683）是带编码器和解码器的 Transformer，用于任何“文本到文本”的任务。
# 它与最初的 Transformer 主要有四处不同：归一化、注意力的得分、位置，以及预训练任务。本文逐一写出来，拼成整个网络，
# 与 transformers 对照。最后看一个注意力头能学到多少关于距离的知识，又有什么学不到。
#
# 读者需要知道注意力：查询、键、值和 softmax。对照部分需要 `pip install transformers`。

# %%
import math

import matplotlib.pyplot as plt
import torch
from torch.nn import functional as F

from core import initializers, random, spec, tree
from core.spec import Param
from nets.language import t5, t5_weights
from nets.weights import published_state
from train import optimizers
from train.data.text import masking

# %% [markdown] lang="en"
# ## RMS norm
#
# A layer norm subtracts the mean and divides by the standard deviation. The RMS norm does not subtract, and has no
# bias; neither has any linear layer of T5.
#
# $$\mathrm{norm}(x) = \frac{x}{\sqrt{\mathrm{mean}(x^2) + \varepsilon}} \odot w$$

# %% [markdown] lang="zh"
# ## RMS 归一化
#
# 层归一化减去均值，再除以标准差。RMS 归一化不减均值，也没有偏置项；T5 的线性层同样没有偏置项。
#
# $$\mathrm{norm}(x) = \frac{x}{\sqrt{\mathrm{mean}(x^2) + \varepsilon}} \odot w$$

# %%


def norm(p, x):
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6) * p["weight"]


x, weight = random.normal(random.key(0), (2, 3, 64)), random.normal(random.key(1), (64,))
torch.testing.assert_close(norm({"weight": weight}, x), F.rms_norm(x, (64,), weight, eps=1e-6))

# %% [markdown] lang="en"
# ## Positions are distances
#
# No position is added to the tokens. Instead each head adds a learned number to the score of a query $i$ and a key $j$,
# which depends on the distance $j - i$ alone. Distances share 32 numbers, the buckets. In the encoder half of them are
# for keys before the query and half for keys after it. Distances below 8 have a bucket each, farther ones share it, the
# more of them the farther they are, and the last bucket takes all the rest:
#
# $$\mathrm{bucket}(d) = \min\!\left(15, \; 8 + \left\lfloor 8 \, \frac{\ln(d / 8)}{\ln(128 / 8)} \right\rfloor\right)
# \quad \text{for } d \ge 8$$
#
# The decoder sees no keys after the query, and so has all buckets for those before it, 16 of them exact.

# %% [markdown] lang="zh"
# ## 位置就是距离
#
# T5 不在词元上加位置。每个头给查询 $i$ 和键 $j$ 的得分加上一个学出来的数，它只取决于距离 $j - i$。
# 所有距离共用 32 个数，即 32 个桶（bucket）。编码器里一半的桶给查询之前的键，一半给之后的键；
# 小于 8 的距离各占一个桶，更远的几个距离合用一个，越远合用的越多，剩下的全部落在最后一个桶里：
#
# $$\mathrm{bucket}(d) = \min\!\left(15, \; 8 + \left\lfloor 8 \, \frac{\ln(d / 8)}{\ln(128 / 8)} \right\rfloor\right)
# \quad \text{for } d \ge 8$$
#
# 解码器看不到查询之后的键，所以全部的桶都给之前的键，其中 16 个各对应一个距离。

# %%


def bucket(distance, both):
    """Bucket of the distance of a key from its query; `both`: keys after the query have half of the buckets."""
    count = 16 if both else 32
    far = abs(distance) if both else max(-distance, 0)
    exact = count // 2
    if far >= exact:
        far = min(exact + int(math.log(far / exact) / math.log(128 / exact) * exact), count - 1)
    return far + (16 if both and distance > 0 else 0)


distances = torch.arange(-200, 201)
buckets = {both: torch.tensor([bucket(d, both) for d in distances.tolist()]) for both in (True, False)}
for both, values in buckets.items():
    torch.testing.assert_close(values, t5.bucket(distances, 32, 128, both))
    print("encoder" if both else "decoder", [int(values[d + 200]) for d in (-100, -20, -9, -8, -2, -1, 0, 1, 2, 20)])

# %% [markdown] lang="en"
# ## Scores without a scale
#
# The scores are $q^\top k$ plus the bias, not divided by $\sqrt{d}$. The queries' matrix is drawn smaller instead, by
# that factor, so that the first scores have the same size.

# %% [markdown] lang="zh"
# ## 不做缩放的得分
#
# 得分是 $q^\top k$ 加上偏置，不除以 $\sqrt{d}$。作为补偿，查询矩阵的初始值按这个因子取得更小，所以初始得分大小相同。

# %%


def attention(p, x, memory, heads, allowed, bias):
    """x (batch, queries, width) looks at memory (batch, keys, width); bias (heads, queries, keys)."""
    q, k, v = x @ p["q"]["weight"].T, *(memory @ p["kv"]["weight"].T).chunk(2, -1)
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))  # (batch, heads, time, depth)
    weights = (q @ k.transpose(-1, -2) + bias).masked_fill(~allowed, -math.inf).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2) @ p["proj"]["weight"].T  # (batch, queries, width)


def position_bias(p, queries, keys, both):
    table = torch.tensor([[bucket(j - i, both) for j in range(keys)] for i in range(queries)])  # (queries, keys)
    return p["positions"]["weight"][table].movedim(-1, 0)  # (heads, queries, keys)


# %% [markdown] lang="en"
# ## The whole net
#
# Each part is $x + f(\mathrm{norm}(x))$, and a norm follows the last block. All blocks of a side share one table of
# biases; cross attention has none. The target begins with the padding token 0. The output layer is the embedding, and
# what it gets is divided by $\sqrt{\mathrm{width}}$. This is version 1.0; in 1.1 the MLP is gated, and the output layer
# has a matrix of its own.

# %% [markdown] lang="zh"
# ## 整个网络
#
# 每一部分都是 $x + f(\mathrm{norm}(x))$，最后一个块之后再做一次归一化。同一侧的所有块共用一张偏置表，
# 交叉注意力没有偏置。目标序列以填充词元 0 开头。输出层就是词嵌入，它的输入要除以 $\sqrt{\mathrm{width}}$。
# 这是 1.0 版；1.1 版的 MLP 带门，输出层有自己的矩阵。

# %%


def mlp(p, x):
    return (x @ p["up"]["weight"].T).relu() @ p["down"]["weight"].T


def whole(params, source, target, heads):
    """Logits of the next token: (batch, source time), (batch, time) integers -> (batch, time, vocabulary)."""
    table, encoder, decoder = params["tokens"]["weight"], params["encoder"], params["decoder"]
    real, x = (source != 0)[:, None, None, :], table[source]
    bias = position_bias(encoder, source.shape[1], source.shape[1], both=True)
    for p in encoder["blocks"]:
        y = norm(p["norm1"], x)
        x = x + attention(p["attn"], y, y, heads, real, bias)
        x = x + mlp(p["mlp"], norm(p["norm2"], x))
    memory, x, time = norm(encoder["norm"], x), table[target], target.shape[1]
    past, bias = torch.ones(time, time, dtype=torch.bool).tril(), position_bias(decoder, time, time, both=False)
    for p in decoder["blocks"]:
        y = norm(p["norm1"], x)
        x = x + attention(p["attn"], y, y, heads, past, bias)
        x = x + attention(p["cross"], norm(p["norm_cross"], x), memory, heads, real, torch.zeros(()))
        x = x + mlp(p["mlp"], norm(p["norm2"], x))
    return norm(decoder["norm"], x) / math.sqrt(table.shape[1]) @ table.T


cfg = t5.Config(31, layers=2, decoder_layers=2, heads=4, depth=8, width=24, hidden=48, dropout=0.0)
random_model = tree.map(lambda leaf: Param(leaf.shape, initializers.normal(0.3)), t5.spec(cfg))
params = spec.init(random.key(2), random_model)  # norms and biases of positions too, so that no mistake is hidden
source = random.randint(random.key(3), (2, 150), 1, 31).long()
source = torch.where(torch.arange(150) < torch.tensor([[150], [60]]), source, 0)  # the second is shorter
target = torch.cat([torch.zeros(2, 1).long(), random.randint(random.key(4), (2, 49), 1, 31).long()], 1)
logits = whole(params, source, target, cfg.heads)
print("source:", tuple(source.shape), " target:", tuple(target.shape), " logits:", tuple(logits.shape))
torch.testing.assert_close(logits, t5.apply(params, (source, target), cfg), rtol=1e-4, atol=1e-4)
try:
    from transformers import T5Config, T5ForConditionalGeneration
except ImportError:
    print("not compared with transformers: pip install transformers")
else:
    config = {"vocab_size": 31, "d_model": 24, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    theirs = T5ForConditionalGeneration(T5Config(**config, decoder_start_token_id=0)).eval()
    state = published_state(params, t5_weights.rename_table(cfg))  # our tensors by their names
    theirs.load_state_dict(state, strict=False)  # without three copies of the embedding
    with torch.no_grad():
        expected = theirs(input_ids=source, attention_mask=(source != 0).long(), decoder_input_ids=target).logits
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    print("the same logits as transformers' T5ForConditionalGeneration")

# %% [markdown] lang="en"
# ## Span corruption
#
# T5 learns from plain text by repairing it: 15 % of the tokens are hidden, in spans of 3 on average. In the input each
# span is one sentinel, `<0>`, `<1>` and so on; the target lists the sentinels with what they stand for. It is much
# shorter than the text, so that the decoder has little to do. Text of 568 tokens becomes an input of 512.

# %% [markdown] lang="zh"
# ## 遮盖片段（span corruption）
#
# T5 靠修复文本来学习：遮住 15% 的词元，平均 3 个连成一段。输入中每一段变成一个哨兵词元 `<0>`、`<1>` 等等；
# 目标依次列出哨兵和它们所代表的内容。目标比原文短得多，解码器的工作量就小。568 个词元的文本变成 512 个词元的输入。

# %%
text = "the ferry to the island leaves at seven in the morning and takes an hour and a half unless there is fog on the "
text += "bay or a storm which is rare in summer but not at all in spring"
words = ["</s>", *sorted(set(text.split()))]
tokens = torch.tensor([[words.index(word) for word in text.split()]])  # (1, words)
last = len(words) + 9  # the first sentinel has the last id; the next ones count down


def names(ids):
    return " ".join(words[i] if i < len(words) else f"<{last - i}>" for i in ids)


def restore(inputs, targets):
    """The text of an input and its target."""
    spans, out = {}, []
    for i in targets:
        if i >= len(words):
            spans[i] = here = []
        else:
            here.append(i)
    for i in inputs:
        out += spans.get(i, [i])
    return [i for i in out if words[i] != "</s>"]


for seed in range(3):
    inputs, targets = masking.corrupt_spans(random.key(seed)[None], tokens, sentinel=last, end=0)
    print("input: ", names(inputs[0].tolist()), "\ntarget:", names(targets[0].tolist()))
    assert restore(inputs[0].tolist(), targets[0].tolist()) == tokens[0].tolist()
print(masking.span_sizes(568))

# %% [markdown] lang="en"
# ## What a head can learn about distance
#
# Take one layer of attention with nothing but the bias: every head must find the token a fixed number of places before
# the query. The only parameters are the 32 numbers per head; the loss is $-\ln$ of the weight on the right key. We
# train on sequences of 160 tokens and test on 400.

# %% [markdown] lang="zh"
# ## 一个头能学到多少关于距离的知识
#
# 取一层只有偏置的注意力：每个头要找到查询之前固定步数的那个词元。参数只有每个头的 32 个数，
# 损失是正确的键所得权重的 $-\ln$。用长度 160 的序列训练，用长度 400 的序列测试。

# %%
BACK = [1, 5, 10, 40]  # each a head


def weights_of(table, time):
    """Attention (heads, time, time) of a table of biases (buckets, heads)."""
    positions = torch.arange(time)
    return table[t5.bucket(positions - positions[:, None], 32, 128, True)].movedim(-1, 0).softmax(-1)


def on_right_key(table, time):
    """Logarithm of the weight on the right key, (heads,), a mean over the queries that have one."""
    weights = weights_of(table, time)
    return torch.stack([weights[head].diagonal(-back).log().mean() for head, back in enumerate(BACK)])


table, optimizer = torch.zeros(32, len(BACK)), optimizers.adam(0.3)
opt_state = optimizer.init(table)
for _ in range(100):
    gradient = torch.func.grad(lambda table: -on_right_key(table, 160).mean())(table)
    updates, opt_state = optimizer.update(gradient, opt_state, table)
    table = table + updates
for back in BACK:
    same = distances[(buckets[True] == bucket(-back, True)) & (distances <= 0)].abs()
    print(f"{back} places before: its bucket has the distances {int(same.min())} to {int(same.max())}")
for time in (160, 400):
    print(f"{time} tokens: weight on the right key", [round(p, 3) for p in on_right_key(table, time).exp().tolist()])

# %% [markdown] lang="en"
# Near keys are found exactly, and just as well in sequences longer than any in training: a distance is the same
# everywhere. Of far keys a head knows no more than the bucket, and divides its weight among all in it: it can look some
# forty words back, but not at the 40th. The left picture has the buckets, the right one the weights by distance.

# %% [markdown] lang="zh"
# 近处的键可以精确找到，序列比训练时长也一样：同样的距离在哪里都一样。对远处的键，头只知道它在哪个桶里，
# 权重平分给桶里的所有键：它能看向前面四十来个词的地方，却找不准第 40 个。左图是桶，右图是权重随距离的分布。

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.3), layout="constrained")
for both, values in buckets.items():
    left.step(distances.numpy(), values.numpy(), where="mid", label="encoder" if both else "decoder")
left.set(title="Buckets", xlabel="position of the key - position of the query", ylabel="bucket", xlim=(-140, 140))
left.legend(loc="lower left", bbox_to_anchor=(0.02, 0.02))
weights = weights_of(table, 200)[:, 150]  # of the query at position 150
for head, back in enumerate(BACK):
    right.step(torch.arange(-70, 11).numpy(), weights[head, 80:161].numpy(), where="mid", label=f"{back} before")
right.set(title="Attention after training", xlabel="position of the key - position of the query", ylabel="weight")
right.legend(title="must find the key")
plt.show()

# %% [markdown] lang="en"
# ## Where to go from here
#
# - [text2text](../README.md#text2text): a T5 learns numbers and dates, or starts from published weights.
# - [pretrain](../README.md#pretrain): `--objective span` on texts of your own.
# - [transformer.py](../tutorials/transformer.py): the first Transformer, with its positions and cache.

# %% [markdown] lang="zh"
# ## 接下来
#
# - [text2text](../README.md#text2text)：T5 学习数字和日期，也可以从公开权重开始。
# - [pretrain](../README.md#pretrain)：`--objective span`，用您自己的文本。
# - [transformer.py](../tutorials/transformer.py)：最初的 Transformer，包括它的位置编码和缓存。
