# %% [markdown] lang="en"
# # DistilBERT: a small net learns from a large one
#
# A large net knows more than its answers: how likely it holds every other answer. Distillation (Hinton et al. 2015,
# arXiv:1503.02531) trains a small net on that. DistilBERT (Sanh et al. 2019, arXiv:1910.01108) is a BERT of half the
# layers that was trained so. We compare the net with transformers', write its three losses by hand, and teach a student
# of 2 layers what a teacher of 4 knows, with only twelve sentences.
#
# You need to know what a BERT is: a Transformer encoder that fills in masked words. The comparison needs
# `pip install transformers`.

# %% [markdown] lang="zh"
# # DistilBERT：小网络向大网络学习
#
# 大网络知道的不只是答案，还有它认为其他答案各有多大可能。蒸馏（Hinton 等 2015, arXiv:1503.02531）就用这些来训练小网络。
# DistilBERT（Sanh 等 2019, arXiv:1910.01108）是这样训练出来的、层数减半的 BERT。本文把网络与 transformers 对照，
# 手写它的三个损失，再只用十二个句子，把 4 层教师的知识教给 2 层的学生。
#
# 读者需要知道什么是 BERT：填写被遮住的词的 Transformer 编码器。对照部分需要 `pip install transformers`。

# %%
import math
from dataclasses import replace

import matplotlib.pyplot as plt
import torch
from torch.nn import functional as F

from core import initializers, random, spec, tree
from core.spec import Param
from nets.language import bert, distilbert
from nets.weights import published_state
from train import optimizers
from train.data.text import masking
from train.losses import cosine_distance, cross_entropy, soft_targets
from train.optimizers import schedules
from train.step import make_step, start

# %% [markdown] lang="en"
# ## The net
#
# DistilBERT has 6 layers instead of 12, no token types and no pooler; everything else is BERT's. A spec says how many
# parameters that are, with nothing allocated.

# %% [markdown] lang="zh"
# ## 网络
#
# DistilBERT 有 6 层而不是 12 层，没有词元类型，也没有 pooler，其余与 BERT 相同。spec 不分配内存就能说出参数的个数。

# %%
for name, model in {
    "BERT": bert.spec(bert.PRESETS["base"]),
    "DistilBERT": distilbert.spec(distilbert.PRESETS["distilbert"]),
}.items():
    parts = {part: tree.count(model[part]) for part in model}
    print(f"{name:10}  {sum(parts.values()):>11,} parameters:", ", ".join(f"{n} {c:,}" for n, c in parts.items()))

# %% [markdown] lang="en"
# A tiny one, with random numbers everywhere, gives the logits of transformers' `DistilBertForMaskedLM`.

# %% [markdown] lang="zh"
# 一个很小的 DistilBERT，参数全部取随机值，logits 与 transformers 的 `DistilBertForMaskedLM` 相同。

# %%
sizes = {"context": 16, "heads": 4, "width": 64, "hidden": 128, "types": 0, "dropout": 0.0, "attention_dropout": 0.0}
cfg = distilbert.Config(25, layers=2, head="masked_tokens", **sizes)
random_model = tree.map(lambda leaf: Param(leaf.shape, initializers.normal(0.3)), distilbert.spec(cfg))
params = spec.init(random.key(0), random_model)
tokens = random.randint(random.key(1), (3, 9), 1, 25).long()
logits = distilbert.apply(params, tokens, cfg)
print("tokens:", tuple(tokens.shape), " logits:", tuple(logits.shape))
try:
    from transformers import DistilBertConfig, DistilBertForMaskedLM
except ImportError:
    print("not compared with transformers: pip install transformers")
else:
    config = {
        "vocab_size": 25,
        "max_position_embeddings": 16,
        "n_layers": 2,
        "n_heads": 4,
        "dim": 64,
        "hidden_dim": 128,
    }
    theirs = DistilBertForMaskedLM(DistilBertConfig(**config)).eval()
    state = published_state(
        params, distilbert.rename_table(cfg)
    )  # our tensors by their names; the encoder's get a prefix
    state = {name if name.startswith("vocab_") else f"distilbert.{name}": x for name, x in state.items()}
    theirs.load_state_dict(state, strict=False)  # without the output layer, which is the embedding
    with torch.no_grad():
        torch.testing.assert_close(logits, theirs(tokens).logits, rtol=1e-4, atol=1e-4)
    print("the same logits as transformers' DistilBertForMaskedLM")

# %% [markdown] lang="en"
# ## A language, and the teacher
#
# The language has 96 sentences like "Anna drank her tea today". With one word hidden, a name is one of four (the
# pronoun tells), a thing one of three (the verb tells), a time one of two; verb and pronoun are certain. The teacher
# learns it from all sentences, as BERT learns: about one word per sentence is hidden, and it names it.

# %% [markdown] lang="zh"
# ## 一种语言，以及教师
#
# 这种语言有 96 个句子，例如 “Anna drank her tea today”。遮住一个词时，人名是四个之一（由代词决定），
# 东西是三样之一（由动词决定），时间是两种之一；动词和代词则是确定的。教师用全部句子学习，
# 方法与 BERT 相同：每句大约遮住一个词，让它说出来。

# %%
people = {"her": ["Anna", "Clara", "Julia", "Maria"], "his": ["Jonas", "Paul", "Peter", "Simon"]}
things = {"drank": ["coffee", "milk", "tea"], "ate": ["bread", "rice", "soup"]}
texts = [
    f"[CLS] {name} {verb} {pronoun} {thing} {time} [SEP]".split()
    for pronoun, verb in [(pronoun, verb) for pronoun in people for verb in things]
    for name in people[pronoun]
    for thing in things[verb]
    for time in ("today", "yesterday")
]
special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
names = special + sorted({word for text in texts for word in text} - set(special))
language = torch.tensor([[names.index(word) for word in text] for text in texts])  # (96, 7)
marks = masking.Marks(2, 3, 4, 0, torch.arange(5), torch.arange(5, len(names)))
few = language[random.permutation(random.key(2), len(language))[:12]]  # all that a student will see


def hide(keys, tokens):
    """Corrupted tokens, positions to predict, and the words there, -1 where there is none."""
    masked = masking.mask_tokens(keys, tokens, marks)
    return masked.tokens, masked.positions, torch.where(masked.counted, masked.targets, -1)


def masked_words(logits, positions, targets):
    return cross_entropy(torch.take_along_dim(logits, positions[..., None], 1), targets, ignore_id=-1)


def alone(params, batch, keys, cfg):
    corrupted, positions, targets = hide(keys, batch)
    return masked_words(distilbert.apply(params, corrupted, cfg), positions, targets)


hidden_at = torch.arange(1, 6).repeat_interleave(len(language))[:, None]  # every sentence with each word hidden
asked = language.repeat(5, 1).scatter(1, hidden_at, marks.mask)  # (480, 7)
answers = language.repeat(5, 1).gather(1, hidden_at)[:, 0]


def nats(params, cfg):
    logits = distilbert.apply(params, asked, cfg)  # (480, 7, vocabulary)
    return float(cross_entropy(torch.take_along_dim(logits, hidden_at[..., None], 1)[:, 0], answers))


def fit(values, cfg, loss, data, updates, rate):
    """Parameters after the updates, and the nats every fifth of them."""
    optimizer = optimizers.adam(schedules.warmup_cosine(rate, 10, updates))
    copies = tree.map(torch.clone, values)  # the step overwrites them
    state = start(random.key(3), copies, distilbert.spec(cfg), optimizer)
    step, curve = make_step(loss, optimizer, compile=False, donate=True), [nats(values, cfg)]
    for at in range(updates):
        rows = random.randint(random.fold_in(random.key(4), at), (64,), 0, len(data)).long()
        state, _ = step(state, data[rows])
        if at % 5 == 4:
            curve.append(nats(state.params, cfg))
    return state.params, curve


big = replace(cfg, layers=4)
values = spec.init(random.key(5), distilbert.spec(big))
teacher, curve = fit(values, big, lambda p, b, k: alone(p, b, k, big), language, 80, 5e-3)
best = (math.log(4) + math.log(3) + math.log(2)) / 5
print(f"teacher: {curve[0]:.3f} nats per hidden word before, {curve[-1]:.3f} after; best possible: {best:.3f}")

# %% [markdown] lang="en"
# ## Soft targets
#
# In the data "Anna drank her [MASK] today" is followed by one answer at a time. The teacher gives all three drinks
# about the same probability in one answer: that is what the student should copy. A temperature $T$ divides the logits
# and makes small probabilities visible:
#
# $$p = \mathrm{softmax}(z_{\text{teacher}} / T), \quad q = \mathrm{softmax}(z_{\text{student}} / T), \quad
# L_{\text{soft}} = T^2 \sum_c p_c (\log p_c - \log q_c)$$
#
# The factor $T^2$ keeps the size of the gradient, which shrinks by it.

# %% [markdown] lang="zh"
# ## 软目标
#
# 数据里，“Anna drank her [MASK] today”一次只给一个答案。教师一次就给出三种饮料，概率大致相同：这正是学生该学的。
# 温度 $T$ 除 logits，使小的概率也显露出来：
#
# $$p = \mathrm{softmax}(z_{\text{teacher}} / T), \quad q = \mathrm{softmax}(z_{\text{student}} / T), \quad
# L_{\text{soft}} = T^2 \sum_c p_c (\log p_c - \log q_c)$$
#
# 梯度的大小会缩小 $T^2$ 倍，乘上 $T^2$ 正好抵消。

# %%
blank = torch.tensor([[names.index(word) for word in "[CLS] Anna drank her [MASK] today [SEP]".split()]])
z = distilbert.apply(teacher, blank, big)[0, 4]  # (vocabulary,)
for temperature in (1.0, 2.0, 4.0):
    p = (z / temperature).softmax(-1)
    print(f"T = {temperature}:", ", ".join(f"{names[i]} {float(p[i]):.3f}" for i in p.topk(6).indices.tolist()))

# %% [markdown] lang="en"
# ## Three losses
#
# DistilBERT adds to the soft targets the masked words themselves, and the cosine between the last hidden states of both
# nets, so that the student's vectors point where the teacher's do. Their weights are 5, 2 and 1, and $T = 2$.

# %% [markdown] lang="zh"
# ## 三个损失
#
# 除了软目标，DistilBERT 还加上被遮住的词本身，以及两个网络最后隐藏状态之间的余弦，
# 让学生的向量与教师的指向一致。权重分别是 5、2、1，$T = 2$。

# %%
T = 2.0


def three_losses(params, cfg, corrupted, positions, targets):
    hidden = distilbert.features(params, corrupted, cfg)  # (batch, time, width)
    expected = distilbert.features(teacher, corrupted, big)
    q = (distilbert.token_logits(params, hidden, cfg) / T).log_softmax(-1)
    p = (distilbert.token_logits(teacher, expected, big) / T).log_softmax(-1)
    soft = T**2 * (p.exp() * (p - q)).sum(-1).mean()
    masked = masked_words(q * T, positions, targets)  # a softmax does not see that log_softmax shifted the logits
    cosine = 1 - (hidden * expected).sum(-1) / (hidden.norm(dim=-1) * expected.norm(dim=-1))
    return soft, masked, cosine.mean()


corrupted, positions, targets = hide(random.split(random.key(6), 12), few)
soft, masked, cosine = three_losses(params, cfg, corrupted, positions, targets)
print(f"untrained student: soft targets {soft:.3f}, masked words {masked:.3f}, cosine {cosine:.3f}")
student, master = (distilbert.apply(p, corrupted, c) for p, c in ((params, cfg), (teacher, big)))
flat = (student / T).log_softmax(-1).flatten(0, 1), (master / T).softmax(-1).flatten(0, 1)
torch.testing.assert_close(soft, T**2 * F.kl_div(*flat, reduction="batchmean"))
torch.testing.assert_close(soft, soft_targets(student, master, temperature=T))
hidden, expected = (distilbert.features(p, corrupted, c) for p, c in ((params, cfg), (teacher, big)))
ones = torch.ones(hidden.shape[:2].numel())
torch.testing.assert_close(cosine, F.cosine_embedding_loss(hidden.flatten(0, 1), expected.flatten(0, 1), ones))
torch.testing.assert_close(cosine, cosine_distance(hidden, expected))
predicted = torch.take_along_dim(student, positions[..., None], 1)
torch.testing.assert_close(masked, F.cross_entropy(predicted.flatten(0, 1), targets.flatten(), ignore_index=-1))


def distil(params, batch, keys, cfg=cfg):
    soft, masked, cosine = three_losses(params, cfg, *hide(keys, batch))
    return 5 * soft + 2 * masked + cosine


# %% [markdown] lang="en"
# ## Two students
#
# A student has two layers and sees twelve of the 96 sentences. It begins with the teacher's first and last layer and
# its embeddings, as DistilBERT began with one of every two layers of BERT. One student learns the masked words, the
# other one the three losses.

# %% [markdown] lang="zh"
# ## 两个学生
#
# 学生有两层，只看 96 个句子中的十二个。它从教师的第一层、最后一层和嵌入开始
# （DistilBERT 是从 BERT 的每两层中取一层）。一个学生学习被遮住的词，另一个学习三个损失。

# %%
from_teacher = {**teacher, "blocks": [teacher["blocks"][0], teacher["blocks"][-1]]}
ways = {"masked words": lambda p, b, k: alone(p, b, k, cfg), "three losses": distil}
curves = {name: fit(from_teacher, cfg, loss, few, 30, 2e-3)[1] for name, loss in ways.items()}
print(f"random parameters: {nats(spec.init(random.key(7), distilbert.spec(cfg)), cfg):.3f} nats per hidden word")
for name, student_curve in curves.items():
    print(f"student, {name}: {student_curve[0]:.3f} -> {student_curve[-1]:.3f}")

figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
for name, student_curve in curves.items():
    axis.plot(range(0, 31, 5), student_curve, label=f"student, {name}")
axis.axhline(curve[-1], color="black", linestyle="--", label="teacher, 4 layers")
axis.axhline(best, color="black", linestyle=":", label="best possible")
axis.set(xlabel="update of the student", ylabel="nats per hidden word")
figure.legend(loc="outside right upper")
plt.show()

# %% [markdown] lang="en"
# Two of the teacher's layers know much already, before any training of the student. Trained on twelve sentences it
# forgets that the others are as likely; with the teacher beside it, it does not.
#
# ## Where to go from here
#
# - [pretrain](../README.md#pretrain): `--objective distil` on real texts, from any BERT.
# - [experiments/parts/distillation.py](../parts/distillation.py): the three losses, and losses for sentence embeddings.
# - [bert.py](../tutorials/bert.py): the net taken apart.
# - [Texts from both sides](../../nets/README.md#texts-from-both-sides): published weights.

# %% [markdown] lang="zh"
# 教师的两层本身就已经知道很多，学生还没训练就能用上。只用十二个句子训练，学生会忘记其他句子同样可能出现；
# 有教师在旁边，就不会忘。
#
# ## 接下来
#
# - [pretrain](../README.md#pretrain)：在真实文本上用 `--objective distil`，教师可以是任何 BERT。
# - [experiments/parts/distillation.py](../parts/distillation.py)：三个损失，以及句向量的损失。
# - [bert.py](../tutorials/bert.py)：拆解这个网络。
# - [双向读文本的网络](../../nets/README.md#texts-from-both-sides)：公开权重。
