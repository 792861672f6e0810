# %% [markdown] lang="en"
# # BERT taken apart
#
# BERT (Devlin et al. 2019, arXiv:1810.04805) reads a text from both sides and fills in words that were hidden. We write
# each part as a small function, embeddings, blocks, pooler and the head for masked tokens, compare all with
# transformers, hide words as BERT does, and train a tiny one until it guesses almost as well as anyone could.
#
# You need to know matrix products, softmax, and a little PyTorch. The comparison needs `pip install transformers`.

# %% [markdown] lang="zh"
# # 拆解 BERT
#
# BERT（Devlin 等 2019, arXiv:1810.04805）同时从左右两侧读文本，填出被遮住的词。本文把各部分写成小函数：
# 嵌入、块、pooler 和掩码词元的输出头，全部与 transformers 对照；再按 BERT 的办法遮词，
# 训练一个很小的 BERT，直到它猜得接近理论上的最好结果。
#
# 读者需要知道矩阵乘法和 softmax，并了解一点 PyTorch。对照部分需要 `pip install transformers`。

# %%
import math

import matplotlib.pyplot as plt
import torch

from core import initializers, random, spec, tree
from core.spec import Param
from nets.language import bert
from nets.weights import published_state
from train import optimizers
from train.data.text import masking
from train.losses import token_cross_entropy
from train.optimizers import schedules
from train.step import create, make_step

# %% [markdown] lang="en"
# ## Tokens
#
# A tiny language: a person drank or ate something. A text begins with `[CLS]` and ends with `[SEP]`; of two texts, each
# ends with `[SEP]`, and the token types 0 and 1 tell them apart. `[PAD]` fills up the shorter rows of a batch. The
# published English BERT in lower case has 30,522 tokens, words and pieces of words.

# %% [markdown] lang="zh"
# ## 词元
#
# 一种很小的语言：某人喝了或吃了某样东西。文本以 `[CLS]` 开头、以 `[SEP]` 结尾；两段文本各以 `[SEP]` 结尾，
# 用词元类型 0 和 1 区分。`[PAD]` 把一批中较短的行补齐。公开的英语 BERT（小写版）有 30,522 个词元，
# 即词和词的片段。

# %%
WOMEN, MEN = ["Anna", "Clara", "Julia", "Maria"], ["Jonas", "Paul", "Peter", "Simon"]
DRINKS, MEALS, TIMES = ["coffee", "milk", "tea"], ["bread", "rice", "soup"], ["today", "yesterday"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
NAMES = [*SPECIAL, *WOMEN, *MEN, "her", "his", "drank", "ate", *DRINKS, *MEALS, *TIMES]
NUMBER = {name: i for i, name in enumerate(NAMES)}


def ids(text):
    return [NUMBER[word] for word in text.split()]


tokens = torch.tensor(
    [
        ids("[CLS] Anna drank her tea today [SEP] Paul ate his soup [SEP]"),
        ids("[CLS] Peter ate his rice [SEP]") + [0] * 6,
    ]
)
types = torch.tensor([[0] * 7 + [1] * 5, [0] * 12])  # (batch, time), as the tokens
print(len(NAMES), "tokens; a batch:", tuple(tokens.shape))

# %% [markdown] lang="en"
# ## Embeddings
#
# A token's vector is the sum of three: one of the word, one of the position, one of the type, all learned; then a layer
# norm. Here every parameter, also the biases and norms, is random, so that no mistake is hidden by a zero.

# %% [markdown] lang="zh"
# ## 嵌入
#
# 词元的向量是三个向量之和：词、位置、类型，都是学出来的；之后是层归一化。这里所有参数都取随机值，
# 偏置和归一化参数也不例外，以免错误被零掩盖。

# %%
sizes = {"layers": 2, "heads": 4, "width": 64, "hidden": 128, "context": 16, "dropout": 0.0, "attention_dropout": 0.0}
cfg = bert.Config(len(NAMES), head="pretraining", **sizes)
random_model = tree.map(lambda leaf: Param(leaf.shape, initializers.normal(0.3)), bert.spec(cfg))
params = spec.init(random.key(0), random_model)


def linear(p, x):
    return x @ p["weight"].T + p["bias"]


def norm(p, x):
    mean, var = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
    return (x - mean) / torch.sqrt(var + 1e-12) * p["weight"] + p["bias"]


def embed(params, tokens, types):
    positions = params["positions"]["weight"][: tokens.shape[1]]  # (time, width)
    x = params["tokens"]["weight"][tokens] + positions + params["types"]["weight"][types]
    return norm(params["norm"], x)  # (batch, time, width)


print("embedded:", tuple(embed(params, tokens, types).shape))

# %% [markdown] lang="en"
# ## Blocks
#
# A block is attention and an MLP. In attention each position makes a query $q$, a key $k$ and a value $v$ per head, and
# gets the mean of the values of all positions, weighted by $\mathrm{softmax}(q^\top k / \sqrt{d})$. Nothing but padding
# is masked: a word sees those before it *and* those after it, which is what GPT cannot do. The norm follows each sum,
# and the activation is $\mathrm{gelu}(x) = x\,\Phi(x)$, $\Phi$ the normal distribution function.

# %% [markdown] lang="zh"
# ## 块
#
# 一个块由注意力和 MLP 组成。注意力中每个位置在每个头上产生查询 $q$、键 $k$ 和值 $v$，
# 得到所有位置的值的加权平均，权重为 $\mathrm{softmax}(q^\top k / \sqrt{d})$。除了填充什么都不遮：
# 一个词既看得到前面的词，*也*看得到后面的词，这是 GPT 做不到的。每次相加之后做归一化，
# 激活函数是 $\mathrm{gelu}(x) = x\,\Phi(x)$，其中 $\Phi$ 是正态分布函数。

# %%


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def attention(p, x, real):
    q, k, v = (part.unflatten(-1, (cfg.heads, -1)).transpose(1, 2) for part in linear(p["qkv"], x).chunk(3, -1))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (batch, heads, queries, keys)
    weights = scores.masked_fill(~real[:, None, None, :], -math.inf).softmax(-1)
    return linear(p["proj"], (weights @ v).transpose(1, 2).flatten(2))  # (batch, time, width)


def encode(params, tokens, types):
    x, real = embed(params, tokens, types), tokens != 0
    for p in params["blocks"]:
        x = norm(p["norm1"], x + attention(p["attn"], x, real))
        x = norm(p["norm2"], x + linear(p["mlp"]["down"], gelu(linear(p["mlp"]["up"], x))))
    return x  # (batch, time, width)


# %% [markdown] lang="en"
# ## Pooler and heads
#
# For a whole text there is the pooler, a linear layer and tanh on the state of `[CLS]`; in pretraining, a linear layer
# on it says whether the second text follows the first. For a masked token the state of its position goes through a
# linear layer, gelu and norm, and meets the embedding again: the logit of a word is the product with its vector, plus a
# bias.

# %% [markdown] lang="zh"
# ## Pooler 与输出头
#
# 整段文本用 pooler：取 `[CLS]` 处的状态，经过线性层和 tanh；预训练时再用一个线性层判断第二段是否接着第一段。
# 掩码词元则取它所在位置的状态，经过线性层、gelu 和归一化，再次遇到词嵌入：
# 一个词的 logit 就是与它的向量的内积，再加一个偏置。

# %%


def pool(params, x):
    return torch.tanh(linear(params["pooler"], x[:, 0]))  # (batch, width)


def token_logits(params, x):
    p = params["masked_tokens"]
    x = norm(p["norm"], gelu(linear(p["dense"], x)))
    return x @ params["tokens"]["weight"].T + p["bias"]  # (batch, time, vocabulary)


x = encode(params, tokens, types)
logits, pooled = token_logits(params, x), pool(params, x)
follows = linear(params["next_sentence"], pooled)  # (batch, 2)
print("states:", tuple(x.shape), " logits:", tuple(logits.shape), " pooled:", tuple(pooled.shape))
torch.testing.assert_close(logits, bert.apply(params, (tokens, types), cfg)["masked_tokens"])
try:
    from transformers import BertConfig, BertForPreTraining
except ImportError:
    print("not compared with transformers: pip install transformers")
else:
    config = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "intermediate_size": 128}
    config |= {"vocab_size": len(NAMES), "max_position_embeddings": 16}
    theirs = BertForPreTraining(BertConfig(**config)).eval()
    state = published_state(params, bert.rename_table(cfg))  # our tensors by their names; the encoder's get a prefix
    state = {name if name.startswith("cls.") else f"bert.{name}": x for name, x in state.items()}
    theirs.load_state_dict(state, strict=False)  # without the output layer, which is the embedding
    with torch.no_grad():
        expected = theirs(tokens, tokens != 0, types)
    torch.testing.assert_close(logits, expected.prediction_logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(follows, expected.seq_relationship_logits, rtol=1e-4, atol=1e-4)
    print("the same logits as transformers' BertForPreTraining")

# %% [markdown] lang="en"
# ## Hiding words
#
# Of the tokens, 15 % must be predicted. Of these 80 % become `[MASK]`, 10 % a random word, and 10 % stay as they are.
# Texts in later use have no `[MASK]`: so the net must have something to say about words that it sees, too. Special
# tokens are never predicted.

# %% [markdown] lang="zh"
# ## 遮词
#
# 15% 的词元需要预测。其中 80% 换成 `[MASK]`，10% 换成随机的词，10% 保持原样：
# 以后使用的文本里没有 `[MASK]`，所以网络对看得见的词也必须有所判断。特殊词元从不需要预测。

# %%
everything = [(WOMEN, "her"), (MEN, "his")], [("drank", DRINKS), ("ate", MEALS)]
texts = [
    f"[CLS] {name} {verb} {pronoun} {thing} {time} [SEP]"
    for people, pronoun in everything[0]
    for verb, things in everything[1]
    for name in people
    for thing in things
    for time in TIMES
]
language = torch.tensor([ids(text) for text in texts])  # (sentences, 7)


def hide(key, tokens):
    """Corrupted tokens, and the positions where a word must be predicted."""
    place_key, kind_key, word_key = random.split(key, 3).unbind(0)
    hidden = (random.uniform(place_key, tokens.shape) < 0.15) & (tokens >= len(SPECIAL))
    kind = random.uniform(kind_key, tokens.shape)
    words = random.randint(word_key, tokens.shape, len(SPECIAL), len(NAMES)).long()
    new = torch.where(kind < 0.8, NUMBER["[MASK]"], torch.where(kind < 0.9, words, tokens))
    return torch.where(hidden, new, tokens), hidden


many = language.repeat(200, 1)
corrupted, hidden = hide(random.key(1), many)
print(f"{len(texts)} sentences; {hidden[:, 1:-1].float().mean():.1%} of the words are predicted, of which")
print(f"  {(corrupted == NUMBER['[MASK]'])[hidden].float().mean():.1%} are [MASK]")
print(f"  {(corrupted == many)[hidden].float().mean():.1%} are themselves, a few of them by chance")
print(" ".join(NAMES[i] for i in corrupted[0].tolist()))

# %% [markdown] lang="en"
# ## Training
#
# The library's `mask_tokens` does the same with one key per example, for at least one word of each text, and gives the
# positions to predict in a table of fixed size, so that logits are computed there alone.

# %% [markdown] lang="zh"
# ## 训练
#
# 库里的 `mask_tokens` 做同样的事：每个样本一个 key，每段文本至少遮一个词，
# 并把要预测的位置放进一个固定大小的表里，只在这些位置计算 logits。

# %%
cfg = bert.Config(len(NAMES), head="masked_tokens", types=0, **sizes)
special = torch.arange(len(SPECIAL))
marks = masking.Marks(*(NUMBER[x] for x in ("[CLS]", "[SEP]", "[MASK]", "[PAD]")), special, torch.arange(5, len(NAMES)))


def loss(params, batch, keys):
    masked = masking.mask_tokens(keys, batch, marks)
    x = bert.features(params, masked.tokens, cfg)  # (batch, time, width)
    x = torch.take_along_dim(x, masked.positions[..., None], 1)  # (batch, most, width)
    targets = torch.where(masked.counted, masked.targets, 0)
    return token_cross_entropy(bert.token_logits(params, x, cfg), targets, ignore_id=0)


UPDATES = 120
optimizer = optimizers.adam(schedules.warmup_cosine(3e-3, 20, UPDATES))
state, step = create(random.key(2), bert.spec(cfg), optimizer), make_step(loss, optimizer, compile=False)
for at in range(UPDATES):
    rows = random.randint(random.fold_in(random.key(3), at), (64,), 0, len(texts)).long()
    state, metrics = step(state, language[rows])
    if at % 40 == 39:
        print(f"update {at + 1}: {float(metrics['loss']):.3f} nats per predicted token")
params = state.params

# %% [markdown] lang="en"
# How good can it be? With one word hidden, four names fit a pronoun, three things a verb and two times any sentence,
# all equally often: nobody can do better than $\ln 4$, $\ln 3$ and $\ln 2$ nats. Verb and pronoun are certain, although
# what tells them may stand *after* them.

# %% [markdown] lang="zh"
# 最好能做到什么程度？只遮一个词时，一个代词对应四个人名，一个动词对应三样东西，时间有两种，各自机会均等：
# 谁也不可能低于 $\ln 4$、$\ln 3$ 和 $\ln 2$ nats。动词和代词则是确定的，尽管决定它们的词可能出现在*后面*。

# %%
for at, (word, choices) in enumerate({"name": 4, "verb": 1, "pronoun": 1, "thing": 3, "time": 2}.items(), start=1):
    blank = language.clone()
    blank[:, at] = NUMBER["[MASK]"]
    log_p = bert.apply(params, blank, cfg)[:, at].log_softmax(-1)
    nats = -log_p.gather(1, language[:, at : at + 1]).mean()
    print(f"{word:8} {nats:.3f} nats; best possible: ln {choices} = {math.log(choices):.3f}")

figure, axes = plt.subplots(1, 4, figsize=(10, 2.8), layout="constrained", sharex=True)
blanks = [
    "[MASK] ate her soup today",
    "Paul [MASK] his tea today",
    "Julia ate [MASK] bread today",
    "Paul drank his [MASK] today",
]
for axis, text in zip(axes, blanks, strict=True):
    row = torch.tensor([ids(f"[CLS] {text} [SEP]")])
    p = bert.apply(params, row, cfg)[row == NUMBER["[MASK]"]][0].softmax(-1)  # (vocabulary,)
    best = p.topk(6)
    axis.barh([NAMES[i] for i in best.indices.tolist()], best.values.numpy())
    axis.invert_yaxis()
    axis.set_title(text.removesuffix(" today") + " ...", fontsize=10)
    axis.set(xlabel="probability", xlim=(0, 1))
plt.show()

# %% [markdown] lang="en"
# ## Where to go from here
#
# - [pretrain](../README.md#pretrain): the same on real text, with pieces of words.
# - [distilbert.py](../tutorials/distilbert.py): a smaller net learns from a larger one.
# - [Texts from both sides](../../nets/README.md#texts-from-both-sides): published weights, classes, spans, sentences.
# - [finetune_text](../README.md#finetune_text), [ner](../README.md#ner), [qa](../README.md#qa): uses of a BERT.

# %% [markdown] lang="zh"
# ## 接下来
#
# - [pretrain](../README.md#pretrain)：在真实文本上做同样的事，词元是词的片段。
# - [distilbert.py](../tutorials/distilbert.py)：小网络向大网络学习。
# - [双向读文本的网络](../../nets/README.md#texts-from-both-sides)：公开权重、分类、片段抽取、句向量。
# - [finetune_text](../README.md#finetune_text)、[ner](../README.md#ner)、[qa](../README.md#qa)：BERT 的用途。
