# %% [markdown] lang="en"
# # Translation with attention, before the Transformer
#
# A recurrent encoder reads a German sentence, a recurrent decoder writes the English one, and attention tells the
# decoder at each word where to look (Bahdanau et al. 2015, arXiv:1409.0473). We write out every part, compare it with
# PyTorch's and with the library's, train on questions about dates, and draw which words the net connects.
#
# You need to know what a recurrent network is: a state $h_t$ that each step computes from the one before it and an
# input. Its cell here is a GRU.

# %% [markdown] lang="zh"
# # Transformer 之前的翻译：带注意力的 seq2seq
#
# 循环编码器读德语句子，循环解码器写英语句子，注意力在写每个词时告诉解码器该看哪里
# （Bahdanau 等 2015, arXiv:1409.0473）。本文把每个部分都写出来，与 PyTorch 和本库的实现对照，
# 用询问日期的句子训练，最后画出网络把哪些词联系在一起。
#
# 读者需要知道什么是循环神经网络：状态 $h_t$ 由上一步的状态和当前输入算出。这里的循环单元是 GRU。

# %%
import re

import matplotlib.pyplot as plt
import torch

from core import random, spec
from nets.language import decoding, seq2seq
from nets.language.beam_search import beam_search
from train import optimizers
from train.data.translation import dates
from train.losses import cross_entropy
from train.optimizers import schedules
from train.step import create, make_step

# %% [markdown] lang="en"
# ## Sentences
#
# `dates` makes German sentences with their translations; we take those that ask for a day. The order of words differs:
# German has the verb "begonnen" at the end, and the day before the month. Each word is a token; token 0 would be
# padding, which is not needed here as all sentences have the same length, 1 starts and 2 ends a sentence.

# %% [markdown] lang="zh"
# ## 句子
#
# `dates` 生成德语句子及其英译，我们只取询问日期的那些。两种语言语序不同：
# 德语的动词“begonnen”在句末，日在月的前面。
# 一个词就是一个词元；0 号留给填充，不过这里所有句子一样长，用不到；1 号表示句首，2 号表示句尾。

# %%
START, END = 1, 2
pairs = [pair for pair in dates.pairs(20_000, 0, 0)[0] if pair[0].startswith("Wann")]
words = [[re.findall(r"[\w-]+|\?", pair[side]) for pair in pairs] for side in (0, 1)]
names = [["padding", "start", "end", *sorted({word for text in texts for word in text})] for texts in words]
number = [{name: i for i, name in enumerate(each)} for each in names]
source, after = (
    torch.tensor([[number[side][word] for word in text] + [END] for text in words[side]]) for side in (0, 1)
)  # (sentences, 10): the source, and what the decoder must write
target = torch.cat([torch.full_like(after[:, :1], START), after[:, :-1]], 1)  # what it reads
print(len(pairs), "pairs, such as", pairs[0], "\nwords:", len(names[0]), "and", len(names[1]))
print("source", source[0].tolist(), "\ntarget", target[0].tolist(), "\nafter ", after[0].tolist())

# %% [markdown] lang="en"
# ## Encoder
#
# A GRU reads the embedded words from the left, another one from the right. Their states side by side are the
# annotations $h_j$: each knows a word and what surrounds it. A linear layer and a tanh make the decoder's first state
# $s_0$ of both ends. `torch.nn.GRU` with the same parameters gives the same annotations.

# %% [markdown] lang="zh"
# ## 编码器
#
# 一个 GRU 从左往右读词的嵌入，另一个从右往左读。两者的状态拼在一起就是标注（annotation）$h_j$：
# 它了解一个词以及这个词的上下文。解码器的初始状态 $s_0$ 由两端的状态经线性层和 tanh 得到。
# 把同样的参数放进 `torch.nn.GRU`，得到同样的标注。

# %%
WIDTH = 64
cfg = seq2seq.Config(len(names[0]), len(names[1]), embedding=WIDTH, width=WIDTH, encoder_width=WIDTH // 2)
params = spec.init(random.key(0), seq2seq.spec(cfg))


def linear(p, x):
    return x @ p["weight"].T + p.get("bias", 0.0)  # y = W x + b


def read(p, x):
    h, states = x.new_zeros(len(x), p["hh"]["weight"].shape[1]), []
    for t in range(x.shape[1]):
        h = torch.gru_cell(x[:, t], h, *(p[part][leaf] for leaf in ("weight", "bias") for part in ("ih", "hh")))
        states.append(h)
    return torch.stack(states, 1)  # (batch, time, width)


def encode(params, source):
    (p,), x = params["encoder"]["layers"], params["encoder"]["tokens"]["weight"][source]  # (batch, time, embedding)
    right, left = read(p["forward"], x), read(p["backward"], x.flip(1)).flip(1)
    ends = torch.cat([right[:, -1], left[:, 0]], -1)
    return torch.cat([right, left], -1), torch.tanh(linear(params["bridge"][0]["h"], ends))


h, s = encode(params, source[:32])
print("annotations:", tuple(h.shape), " first state of the decoder:", tuple(s.shape))
theirs = torch.nn.GRU(WIDTH, WIDTH // 2, batch_first=True, bidirectional=True)
sides = {"": params["encoder"]["layers"][0]["forward"], "_reverse": params["encoder"]["layers"][0]["backward"]}
theirs.load_state_dict(
    {f"{leaf}_{part}_l0{side}": x for side, p in sides.items() for part in p for leaf, x in p[part].items()}
)
torch.testing.assert_close(h, theirs(params["encoder"]["tokens"]["weight"][source[:32]])[0])

# %% [markdown] lang="en"
# ## Attention and decoder
#
# Without attention $s_0$ would be all that the decoder ever sees of the source. With it, each step compares its state
# with every annotation, and gets their mean, weighted by how well they fit: the context $c_t$.
#
# $$e_{tj} = v^\top \tanh(W_a s_{t-1} + U_a h_j), \qquad a_t = \mathrm{softmax}(e_t), \qquad c_t = \sum_j a_{tj} h_j$$
#
# Then the GRU reads the word before, $y_{t-1}$, and the context; state and context give the logits of the next word:
#
# $$s_t = \mathrm{GRU}([y_{t-1}; c_t], s_{t-1}), \qquad \mathrm{logits} = W_o \tanh(W_r [s_t; c_t]) + b$$

# %% [markdown] lang="zh"
# ## 注意力与解码器
#
# 没有注意力时，解码器对源句的了解只有 $s_0$。有了注意力，每一步都把自己的状态与所有标注比较，
# 按契合程度加权平均，得到上下文向量 $c_t$：
#
# $$e_{tj} = v^\top \tanh(W_a s_{t-1} + U_a h_j), \qquad a_t = \mathrm{softmax}(e_t), \qquad c_t = \sum_j a_{tj} h_j$$
#
# 然后 GRU 读入前一个词 $y_{t-1}$ 和上下文；由状态和上下文得到下一个词的 logits：
#
# $$s_t = \mathrm{GRU}([y_{t-1}; c_t], s_{t-1}), \qquad \mathrm{logits} = W_o \tanh(W_r [s_t; c_t]) + b$$

# %%


def attend(p, s, h):
    scores = linear(p["score"], torch.tanh(linear(p["query"], s)[:, None] + linear(p["keys"], h)))  # (batch, time, 1)
    weights = scores.squeeze(-1).softmax(-1)  # (batch, time)
    return torch.einsum("bt,btw->bw", weights, h), weights


def write(params, word, s, h):
    """Logits after the words (batch,), the new state, and the attention."""
    p = params["decoder"]
    c, weights = attend(p["attention"], s, h)
    x = torch.cat([p["tokens"]["weight"][word], c], -1)  # (batch, embedding + width)
    layer = p["layers"][0]
    w = torch.cat([layer["ih"]["weight"], p["context"]["weight"]], 1)  # what multiplies y, what multiplies c
    s = torch.gru_cell(x, s, w, layer["hh"]["weight"], layer["ih"]["bias"], layer["hh"]["bias"])
    return linear(p["output"], torch.tanh(linear(p["readout"], torch.cat([s, c], -1)))), s, weights


# %% [markdown] lang="en"
# ## Teacher forcing
#
# In training the decoder reads the right words, whatever it would have written itself: so all steps have a target at
# once, and an early mistake does not spoil the rest. The library's `apply` is this loop; we train with it.

# %% [markdown] lang="zh"
# ## 教师强制（teacher forcing）
#
# 训练时，不管解码器自己会写出什么，它读到的总是正确的词：这样每一步都有目标，前面的错误也不会连累后面。
# 库里的 `apply` 就是这个循环，训练用它。

# %%
logits, maps = [], []
for t in range(target.shape[1]):
    step_logits, s, weights = write(params, target[:32, t], s, h)
    logits.append(step_logits)
    maps.append(weights)
logits, maps = torch.stack(logits, 1), torch.stack(maps, 1)
print("logits:", tuple(logits.shape), " attention:", tuple(maps.shape))
torch.testing.assert_close(logits, seq2seq.apply(params, (source[:32], target[:32]), cfg))
torch.testing.assert_close(maps, seq2seq.attention_maps(params, (source[:32], target[:32]), cfg)["cross"][:, 0, 0])


def losses(params, batch, keys):
    source, target, after = batch
    return cross_entropy(seq2seq.apply(params, (source, target), cfg), after, reduction="none").mean(1)


UPDATES, HELD_OUT = 120, 200
rate = schedules.warmup_cosine(1e-2, 10, UPDATES)
optimizer = optimizers.chain(optimizers.clip_by_global_norm(1.0), optimizers.adam(rate))
state, step = create(random.key(1), seq2seq.spec(cfg), optimizer), make_step(losses, optimizer, compile=False)
for at in range(UPDATES):
    rows = random.randint(random.fold_in(random.key(2), at), (32,), HELD_OUT, len(pairs)).long()
    state, metrics = step(state, (source[rows], target[rows], after[rows]))
    if at in (49, UPDATES - 1):
        print(f"update {at + 1}: {float(metrics['loss']):.3f} nats per word")
    if at == 49:
        early = state.params
params = state.params

# %% [markdown] lang="en"
# ## Beam search
#
# Greedy decoding takes the most likely word and reads it. A word that looks best now may lead to a bad sentence. Beam
# search keeps the few best beginnings, continues each by its likely words, and keeps the best of all these again. The
# score of a text is the sum of its log-probabilities. We try it with an early state of the net, still unsure of itself,
# and with the trained one.

# %% [markdown] lang="zh"
# ## 束搜索
#
# 贪心解码每次取概率最大的词，再接着读它。眼下最好的词，后面却可能接不出好句子。束搜索保留几个最好的开头，
# 各自用可能的词往下续写，再从所有结果中保留最好的几个。一段文字的得分是各词对数概率之和。
# 下面分别用训练早期（还拿不准）和训练结束时的网络来试。

# %%


def search(params, source, beams):
    h, s = encode(params, source)
    texts, finished = [(0.0, [START], s)], []
    for _ in range(12):
        candidates = []
        for score, text, s in texts:
            logits, new, _ = write(params, torch.tensor(text[-1:]), s, h)
            best = logits.log_softmax(-1)[0].topk(2 * beams)
            for value, word in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                candidates.append((score + value, [*text, word], new))
        candidates.sort(key=lambda candidate: -candidate[0])
        finished += [one for one in candidates[:beams] if one[1][-1] == END]
        texts = [one for one in candidates if one[1][-1] != END][:beams]
    return max(finished, key=lambda candidate: candidate[0])


def english(tokens):
    return " ".join(names[1][i] for i in tokens if i > END)


test = source[:HELD_OUT]  # not in training
for name, values in {"after 50 updates": early, f"after {UPDATES} updates": params}.items():
    cache, first = seq2seq.start(values, seq2seq.encode(values, test, cfg), cfg), torch.full((HELD_OUT,), START)
    options = {"shared": cache["shared"], "end": END, "max_length": 12}
    greedy = decoding.greedy(seq2seq.stepper(values, cfg), cache["past"], first, **options)
    beam = beam_search(seq2seq.stepper(values, cfg), cache["past"], first, beams=4, length_penalty=0.0, **options)
    for way, out in (("greedy", greedy.tokens), ("beam 4", beam.tokens[:, 0])):
        right = [english(a) == english(b) for a, b in zip(out.tolist(), after[:HELD_OUT].tolist(), strict=True)]
        print(f"{name}, {way}: {sum(right) / HELD_OUT:.0%} of {HELD_OUT} new sentences right word for word")
    for i in range(3):
        score, text, _ = search(values, test[i : i + 1], 4)
        torch.testing.assert_close(torch.tensor(score), beam.scores[i, 0], rtol=1e-4, atol=1e-4)
        assert text[1:] == beam.tokens[i, 0, : len(text) - 1].tolist()
    gain = beam.scores[:, 0] - greedy.scores
    print(f"  the beam's text is more likely than the greedy one for {int((gain > 1e-4).sum())} of them")

# %% [markdown] lang="en"
# ## Alignment
#
# The attention of a sentence that was not in training. Nobody told the net which words belong together. Day and month
# change places; words that are the same in all sentences need not be looked up, and their attention is spread.

# %% [markdown] lang="zh"
# ## 对齐
#
# 一个训练时没有见过的句子上的注意力。哪些词相互对应，没有人告诉过网络。日和月交叉对应；
# 每个句子里都相同的词不必去查，注意力就比较分散。

# %%
h, s = encode(params, test[:1])
text, maps = [START], []
while text[-1] != END and len(text) < 12:
    logits, s, weights = write(params, torch.tensor(text[-1:]), s, h)
    text.append(int(logits.argmax()))
    maps.append(weights[0])
figure, axis = plt.subplots(figsize=(5.4, 4.4), layout="constrained")
image = axis.imshow(torch.stack(maps).numpy(), cmap="viridis", vmin=0, vmax=1)
axis.set_xticks(range(source.shape[1]), [names[0][i] for i in test[0].tolist()], rotation=45, ha="right")
axis.set_yticks(range(len(maps)), [names[1][i] for i in text[1:]])
axis.set(xlabel="word of the source", ylabel="word written")
figure.colorbar(image, label="attention weight")
plt.show()

# %% [markdown] lang="en"
# ## Where to go from here
#
# - [seq2seq](../README.md#seq2seq): all sentences of `dates`, Luong's attention, real German, and what is lost without
#   attention.
# - [transformer.py](../tutorials/transformer.py): attention without recurrence.
# - [nets/README.md](../../nets/README.md#translation): the functions of the net, and beam search for all of them.

# %% [markdown] lang="zh"
# ## 接下来
#
# - [seq2seq](../README.md#seq2seq)：`dates` 的全部句型、Luong 的注意力、真实的德语，以及没有注意力会损失多少。
# - [transformer.py](../tutorials/transformer.py)：只有注意力、没有循环的网络。
# - [nets/README.md](../../nets/README.md#translation)：网络的各个函数，以及通用的束搜索。
