# %% [markdown] lang="en"
# # GPT-2 taken apart
#
# GPT-2 (Radford et al. 2019) does one thing: it names the next token. We follow a batch through the net, shape by
# shape, and compare the result with transformers. A small GPT-2 then learns to count; we let it write, with a cache and
# without, at several temperatures, and look at what each layer would say already.
#
# You need to know matrix products, softmax, and a little PyTorch. The comparison needs `pip install transformers`.

# %% [markdown] lang="zh"
# # 拆解 GPT-2
#
# GPT-2（Radford 等 2019）只做一件事：说出下一个词元。本文跟着一批数据走过整个网络，逐一看形状，
# 结果与 transformers 对照。然后让一个小 GPT-2 学数数，用缓存和不用缓存生成，试不同的温度，
# 最后看每一层已经“想说”什么。
#
# 读者需要知道矩阵乘法和 softmax，并了解一点 PyTorch。对照部分需要 `pip install transformers`。

# %%
import math

import matplotlib.pyplot as plt
import torch

from core import initializers, random, spec, tree
from core.spec import Param
from nets.explained import gpt2 as plain
from nets.language import gpt2
from nets.language.sampling import filter_logits
from nets.language.to_transformers import published
from train import optimizers
from train.data.translation.number_words import english
from train.losses import cross_entropy
from train.optimizers import schedules
from train.step import create, make_step

# %% [markdown] lang="en"
# ## Tokens
#
# The text counts from one to ninety-nine, and begins again. Each word is a token, so that there are 27; GPT-2 has
# 50,257, pieces of words. A batch is a table of windows of the text.

# %% [markdown] lang="zh"
# ## 词元
#
# 文本从一数到九十九，然后重新开始。每个词是一个词元，共 27 个；GPT-2 有 50,257 个，都是词的片段。
# 一批数据就是从文本中截取的若干个窗口。

# %%
words = " ".join(english(i) for i in range(1, 100)).replace("-", " ").split()
names = sorted(set(words))
text = torch.tensor([names.index(word) for word in words])  # (words,)
TIME = 16


def windows(key, count, length=TIME + 1):
    first = random.randint(key, (count, 1), 0, len(text)).long()
    return text[(first + torch.arange(length)) % len(text)]  # (count, length)


tokens = windows(random.key(0), 3)[:, :TIME]
print(len(words), "words,", len(names), "tokens; a batch:", tuple(tokens.shape))
print(" ".join(names[i] for i in tokens[0].tolist()))

# %% [markdown] lang="en"
# ## Embeddings, and the parameters
#
# Each token has a vector, each position has one, and their sum enters the net. The vectors of one position from here to
# the end are called its residual stream: blocks read it and add to it.
#
# `linear`, `layer_norm` and `gelu` are a few lines of `nets/explained/gpt2.py`, with $\Phi$ the normal distribution
# function, for which GPT-2 takes an approximation by tanh:
#
# $$\mathrm{linear}(x) = W x + b, \qquad \mathrm{gelu}(x) = x\,\Phi(x)$$
#
# and the norm makes the numbers of a vector have mean 0 and variance 1, before it scales and shifts them.

# %% [markdown] lang="zh"
# ## 嵌入与参数
#
# 每个词元有一个向量，每个位置也有一个，两者之和进入网络。从这里到最后，一个位置上的向量叫做残差流（residual stream）：
# 各个块从中读取，再把结果加回去。
#
# `linear`、`layer_norm` 和 `gelu` 在 `nets/explained/gpt2.py` 里各只有几行。$\Phi$ 是正态分布函数，
# GPT-2 用含 tanh 的近似式代替它：
#
# $$\mathrm{linear}(x) = W x + b, \qquad \mathrm{gelu}(x) = x\,\Phi(x)$$
#
# 归一化先使一个向量的各个数均值为 0、方差为 1，再做缩放和平移。

# %%
cfg = gpt2.Config(len(names), context=64, layers=3, heads=4, width=64, dropout=0.0)
random_model = tree.map(lambda leaf: Param(leaf.shape, initializers.normal(0.3)), gpt2.spec(cfg))
params = spec.init(random.key(1), random_model)  # biases and norms too, so that no mistake is hidden by a zero
print(tree.table({name: params[name] for name in ("positions", "tokens")}))
print(tree.table(params["blocks"][0]))
x = params["tokens"]["weight"][tokens] + params["positions"]["weight"][:TIME]
print("embedded:", tuple(x.shape))

# %% [markdown] lang="en"
# ## A block
#
# Attention is the only place where positions meet. Each makes a query, a key and a value; a query is compared with the
# keys of its own and all earlier positions, never with later ones, as those would give the answer away:
#
# $$\mathrm{softmax}\!\left(\frac{Q K^\top}{\sqrt{d}} + M\right) V, \qquad M_{ij} = 0 \;(j \le i), -\infty \;(j > i)$$
#
# Four heads do so side by side, each with a quarter of the width. Then the MLP works on every position by itself. Both
# read a normalised copy of the stream, and add to it.

# %% [markdown] lang="zh"
# ## 一个块
#
# 只有在注意力里，不同位置才会相遇。每个位置产生查询、键和值；查询只与自己和之前位置的键比较，
# 绝不与后面的比较，否则答案就泄露了：
#
# $$\mathrm{softmax}\!\left(\frac{Q K^\top}{\sqrt{d}} + M\right) V, \qquad M_{ij} = 0 \;(j \le i), -\infty \;(j > i)$$
#
# 四个头并排工作，各占宽度的四分之一。之后 MLP 单独处理每个位置。两者读的都是残差流归一化后的副本，结果再加回残差流。

# %%
p = params["blocks"][0]
q, k, v = plain.linear(p["attn"]["qkv"], plain.layer_norm(p["norm1"], x)).chunk(3, -1)
print("q, k, v:", tuple(q.shape), end="")
q, k, v = (part.unflatten(-1, (cfg.heads, -1)).transpose(1, 2) for part in (q, k, v))
print(" -> by head", tuple(q.shape))
future = torch.ones(TIME, TIME, dtype=torch.bool).triu(1)
weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(future, -math.inf).softmax(-1)
print("weights:", tuple(weights.shape), " of the future:", float(weights[..., future].sum()))
x = x + plain.linear(p["attn"]["proj"], (weights @ v).transpose(1, 2).flatten(2))
hidden = plain.gelu(plain.linear(p["mlp"]["up"], plain.layer_norm(p["norm2"], x)))
x = x + plain.linear(p["mlp"]["down"], hidden)
print("hidden units of the MLP:", tuple(hidden.shape), " after the block:", tuple(x.shape))

# %% [markdown] lang="en"
# After the last block comes a norm, and the embedding once more: the logit of a token is the product of the stream with
# its vector. Our steps, the 60 lines of `nets/explained`, the full net and transformers give the same numbers.

# %% [markdown] lang="zh"
# 最后一个块之后是归一化，然后再次用到词嵌入：一个词元的 logit 是残差流与它的向量的内积。
# 我们的步骤、`nets/explained` 的 60 行、完整的网络和 transformers，得到的数相同。

# %%


def stream(params, tokens):
    """The residual stream after the embedding and after each block, (layers + 1, batch, time, width)."""
    x = params["tokens"]["weight"][tokens] + params["positions"]["weight"][: tokens.shape[1]]
    states = [x]
    for p in params["blocks"]:
        x = x + plain.attention(p["attn"], plain.layer_norm(p["norm1"], x), cfg.heads)
        x = x + plain.mlp(p["mlp"], plain.layer_norm(p["norm2"], x))
        states.append(x)
    return torch.stack(states)


def read_out(params, x):
    return plain.layer_norm(params["norm"], x) @ params["tokens"]["weight"].T  # (..., vocabulary)


torch.testing.assert_close(stream(params, tokens)[1], x)
logits = read_out(params, stream(params, tokens)[-1])
print("logits:", tuple(logits.shape))
torch.testing.assert_close(logits, plain.gpt2(params, tokens, cfg.heads))
torch.testing.assert_close(logits, gpt2.apply(params, tokens, cfg), rtol=1e-4, atol=1e-4)
try:
    from transformers import GPT2Config, GPT2LMHeadModel
except ImportError:
    print("not compared with transformers: pip install transformers")
else:
    values, config = published(params, cfg)  # in transformers' names
    theirs = GPT2LMHeadModel(GPT2Config(**config, bos_token_id=None, eos_token_id=None)).eval()
    theirs.load_state_dict(values, strict=False)  # without the output layer, which is the embedding
    with torch.no_grad():
        torch.testing.assert_close(logits, theirs(tokens).logits, rtol=1e-4, atol=1e-4)
    print("the same logits as transformers' GPT2LMHeadModel")

# %% [markdown] lang="en"
# ## Training
#
# Every position of a window is a task: name the word after it. The causal mask lets all of them be computed at once.

# %% [markdown] lang="zh"
# ## 训练
#
# 窗口里的每个位置都是一道题：说出下一个词。有了因果掩码，所有题目可以一次算完。

# %%


def losses(params, batch, keys):
    return cross_entropy(gpt2.apply(params, batch[:, :-1], cfg), batch[:, 1:], reduction="none").mean(1)


UPDATES = 120
optimizer = optimizers.adamw(schedules.warmup_cosine(5e-3, 20, UPDATES))
state, step = create(random.key(2), gpt2.spec(cfg), optimizer), make_step(losses, optimizer, compile=False)
for at in range(UPDATES):
    state, metrics = step(state, windows(random.fold_in(random.key(3), at), 32))
    if at % 40 == 39:
        print(f"update {at + 1}: {float(metrics['loss']):.3f} nats per word")
params = state.params

# %% [markdown] lang="en"
# ## Writing, with a cache and without
#
# To write, the net reads what it has written. Keys and values of earlier positions do not change when a token is added,
# because nothing there sees it. So a cache keeps them, and a step computes one position instead of all.

# %% [markdown] lang="zh"
# ## 生成：用缓存与不用缓存
#
# 生成时，网络读自己写过的内容。新加一个词元并不改变前面位置的键和值，因为它们看不到它。
# 所以把键和值存进缓存，每一步只算一个位置，而不是全部重算。

# %%
prompt = torch.tensor([[names.index(word) for word in "forty seven forty eight".split()]])
written, caches, position = prompt, gpt2.empty_caches(params, cfg, batch=1, positions=TIME), 0
while written.shape[1] < TIME:
    by_all = plain.gpt2(params, written, cfg.heads)[:, -1]
    new = written[:, position:]  # the prompt at first, later one token
    by_cache, caches = gpt2.decode(params, new, caches, torch.tensor([position]), cfg)
    torch.testing.assert_close(by_cache[:, -1], by_all, rtol=1e-3, atol=1e-3)
    position, written = written.shape[1], torch.cat([written, by_all.argmax(-1, keepdim=True)], 1)
print(" ".join(names[i] for i in written[0].tolist()))
print("keys in the cache of a layer:", tuple(caches[0].keys.shape))  # (batch, heads, positions, depth)

# %% [markdown] lang="en"
# ## Temperature, top-k, top-p
#
# Sampling draws a token from $\mathrm{softmax}(\mathrm{logits} / T)$: a low temperature $T$ sharpens it, a high one
# flattens it. Top-k keeps the $k$ most likely tokens; top-p keeps the fewest most likely ones that together have the
# probability $p$ (Holtzman et al. 2020), few where the net is sure and many where it is not.

# %% [markdown] lang="zh"
# ## 温度、top-k、top-p
#
# 采样从 $\mathrm{softmax}(\mathrm{logits} / T)$ 中抽取词元：温度 $T$ 低，分布更尖锐；温度高，分布更平坦。
# Top-k 只留概率最大的 $k$ 个词元；top-p 从最可能的开始留，直到概率之和达到 $p$（Holtzman 等 2020）：
# 网络有把握时留得少，没把握时留得多。

# %%


def filtered(logits, temperature=1.0, top_k=None, top_p=None):
    """Probabilities (vocabulary,) of the tokens that may be drawn, by a loop over the most likely ones."""
    p = (logits / temperature).softmax(-1)
    order = p.argsort(descending=True)[:top_k]
    out, total = torch.zeros_like(p), 0.0
    for i in order.tolist():
        if top_p is None or total < top_p:
            out[i] = p[i]
            total += float(p[i] / p[order].sum())
    return out / out.sum()


after = gpt2.apply(params, prompt[:, 1:2], cfg)[0, -1]  # "seven" alone: it may be that of 7, 27, 37, ...
for options in ({}, {"temperature": 0.5}, {"temperature": 2.0}, {"top_k": 4}, {"top_p": 0.6}):
    p = filtered(after, **options)
    torch.testing.assert_close(p, filter_logits(after, **options).softmax(-1))
    likely = " ".join(f"{names[i]} {float(p[i]):.2f}" for i in p.topk(5).indices.tolist() if p[i] > 0)
    print(f"{options}\n   {int((p > 0).sum())} tokens: {likely}")
for temperature in (1.0, 2.0, 4.0):
    out = gpt2.generate(params, prompt, cfg, 12, temperature=temperature, key=random.key(4))
    print(f"T = {temperature}:", " ".join(names[i] for i in out[0].tolist()))

# %% [markdown] lang="en"
# ## What each layer would say
#
# All blocks write into one stream, so the output layer can read it after any of them: the logit lens (nostalgebraist
# 2020). A cell shows the best guess for the next word there; the colour is its probability of the right one. The
# embedding alone names the word just read, as the output layer is the embedding again; the blocks turn it into the next
# one. After the first word nobody can know what follows.

# %% [markdown] lang="zh"
# ## 每一层会说什么
#
# 所有块都写进同一个残差流，所以在任何一个块之后都可以用输出层去读它：这叫 logit lens（nostalgebraist 2020）。
# 每个格子写着此处对下一个词的最佳猜测，颜色是正确的词的概率。只经过嵌入时，说出的就是刚读到的词，
# 因为输出层就是词嵌入；是各个块把它变成了下一个词。读到第一个词之后，谁也无法知道接下来是什么。

# %%
line = text[32:43]  # the last word is only a target
p = read_out(params, stream(params, line[None, :-1]))[:, 0].softmax(-1)  # (layers + 1, time, vocabulary)
right = torch.take_along_dim(p, line[None, 1:, None], -1).squeeze(-1)  # (layers + 1, time)
figure, axis = plt.subplots(figsize=(9, 2.6), layout="constrained")
image = axis.imshow(right.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto", origin="lower")
for layer, row in enumerate(p.argmax(-1).tolist()):
    for at, guess in enumerate(row):
        colour = "white" if right[layer, at] > 0.5 else "black"
        axis.text(at, layer, names[guess], ha="center", va="center", fontsize=8, color=colour)
axis.set_xticks(range(len(line) - 1), [names[i] for i in line[:-1].tolist()], fontsize=8)
axis.set_yticks(range(cfg.layers + 1), ["embedding", *(f"block {i + 1}" for i in range(cfg.layers))])
axis.set(xlabel="word that is read", ylabel="read out after")
figure.colorbar(image, label="p(right word)")
plt.show()

# %% [markdown] lang="en"
# ## Where to go from here
#
# - [nets/explained/gpt2.py](../../nets/explained/gpt2.py): the net in 60 lines; it also runs published weights.
# - [gpt](../README.md#gpt): training on real text, and writing; [generate](../README.md#generate): beams and drafts.
# - [transformer.py](../tutorials/transformer.py): encoder and decoder.
# - [bert.py](../tutorials/bert.py): a net that sees both sides.

# %% [markdown] lang="zh"
# ## 接下来
#
# - [nets/explained/gpt2.py](../../nets/explained/gpt2.py)：60 行的网络，也能运行公开的权重。
# - [gpt](../README.md#gpt)：用真实文本训练和写作；[generate](../README.md#generate)：束搜索和投机解码。
# - [transformer.py](../tutorials/transformer.py)：编码器和解码器。
# - [bert.py](../tutorials/bert.py)：能看到两侧的网络。
