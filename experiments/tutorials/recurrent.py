# %% [markdown] lang="en"
# # Recurrent networks from scratch
#
# A recurrent network reads a sequence step by step and carries a state along. Here the plain RNN, the LSTM and the GRU
# are each a function of one step and a loop, equal to `torch.nn`'s. Then we look at why their gradients vanish over
# time, and end with a task of memory that the initial value of one bias decides.
#
# You need to know matrix products, the chain rule, and a little PyTorch.

# %% [markdown] lang="zh"
# # 从零写循环神经网络
#
# 循环神经网络一步一步地读序列，同时带着一个状态往前走。本文把普通 RNN、LSTM 和 GRU 各写成“一步”加一个循环，
# 结果与 `torch.nn` 一致；然后看梯度为什么会随时间消失；最后是一个记忆任务，成败取决于一个偏置的初始值。
#
# 读者需要知道矩阵乘法和链式法则，并了解一点 PyTorch。

# %%
import matplotlib.pyplot as plt
import torch

from core import random, spec, tree
from core.layers import gru_spec, linear, lstm_spec, recurrent, rnn_spec
from nets.language import sequence_classifier
from train import optimizers
from train.losses import cross_entropy
from train.metrics.classification import accuracy
from train.step import make_step, start

# %% [markdown] lang="en"
# ## One step of an RNN
#
# The state $h$ is a vector. A step mixes the state before it with the new input (Elman 1990):
#
# $$h_t = \tanh(W x_t + b + U h_{t-1} + d)$$
#
# `ih` (input to hidden) holds $W$ and $b$, `hh` (hidden to hidden) holds $U$ and $d$. The two biases could be one;
# `torch.nn` has both, so we keep both. The parameters are a plain dict, and all of them are drawn from a key. The same
# weights in `torch.nn.RNN` give the same numbers.

# %% [markdown] lang="zh"
# ## RNN 的一步
#
# 状态 $h$ 是一个向量。每一步把上一步的状态和新的输入混合起来（Elman 1990）：
#
# $$h_t = \tanh(W x_t + b + U h_{t-1} + d)$$
#
# `ih`（输入到隐藏）存放 $W$ 和 $b$，`hh`（隐藏到隐藏）存放 $U$ 和 $d$。两个偏置本可以合成一个，
# 但 `torch.nn` 两个都有，这里也都保留。参数是普通的字典，全部由一个 key 产生。
# 把同样的权重放进 `torch.nn.RNN`，结果相同。

# %%
BATCH, TIME, D_IN, WIDTH = 4, 12, 3, 5
x = random.normal(random.key(0), (BATCH, TIME, D_IN))
rnn = spec.init(random.key(1), rnn_spec(D_IN, WIDTH))
print(tree.table(rnn))


def rnn_step(p, x, state):  # x (batch, d_in), a state of one tensor (batch, width)
    (h,) = state
    return (torch.tanh(linear(p["ih"], x) + linear(p["hh"], h)),)


def loop(step, p, x, state):
    outputs = []
    for t in range(x.shape[1]):
        state = step(p, x[:, t], state)
        outputs.append(state[0])
    return torch.stack(outputs, 1), state  # (batch, time, width), the last state


def of_torch(kind, p):
    layer = kind(D_IN, WIDTH, batch_first=True)
    layer.load_state_dict({f"{leaf}_{part}_l0": x for part in p for leaf, x in p[part].items()})
    return layer


zeros = torch.zeros(BATCH, WIDTH)
h, (last,) = loop(rnn_step, rnn, x, (zeros,))
print("hidden states:", tuple(h.shape), "last state:", tuple(last.shape))
torch.testing.assert_close(h, of_torch(torch.nn.RNN, rnn)(x)[0])

# %% [markdown] lang="en"
# ## LSTM: a memory that is added to
#
# An RNN overwrites its state at every step. The LSTM (Hochreiter and Schmidhuber 1997; with the forget gate of Gers et
# al. 2000) has a second vector, the cells $c$, which are multiplied by a number between 0 and 1 and added to, nothing
# else. Three gates with a sigmoid decide what goes in ($i$), what is kept ($f$, the forget gate) and what is shown
# ($o$); $g$ is the new content. All four come from one matrix product.
#
# $$[i, f, g, o] = W x_t + b + U h_{t-1} + d$$
#
# $$c_t = \sigma(f) \odot c_{t-1} + \sigma(i) \odot \tanh(g), \qquad h_t = \sigma(o) \odot \tanh(c_t)$$

# %% [markdown] lang="zh"
# ## LSTM：用加法更新的记忆
#
# RNN 每一步都把状态整个改写。LSTM（Hochreiter 和 Schmidhuber 1997，遗忘门来自 Gers 等 2000）多了一个向量，
# 即细胞状态 $c$：它只会乘上一个 0 到 1 之间的数，再加上新内容，除此之外不做别的。三个 sigmoid 门分别决定
# 写入什么（$i$）、保留什么（$f$，遗忘门）和输出什么（$o$），$g$ 是新内容。四者来自同一次矩阵乘法。
#
# $$[i, f, g, o] = W x_t + b + U h_{t-1} + d$$
#
# $$c_t = \sigma(f) \odot c_{t-1} + \sigma(i) \odot \tanh(g), \qquad h_t = \sigma(o) \odot \tanh(c_t)$$

# %%


def lstm_step(p, x, state):
    h, c = state
    i, f, g, o = (linear(p["ih"], x) + linear(p["hh"], h)).chunk(4, -1)  # each (batch, width)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


lstm = spec.init(random.key(2), lstm_spec(D_IN, WIDTH))
h, (last, cells) = loop(lstm_step, lstm, x, (zeros, zeros))
print({f"{part}.weight": tuple(lstm[part]["weight"].shape) for part in lstm}, "cells:", tuple(cells.shape))
expected, (_, expected_cells) = of_torch(torch.nn.LSTM, lstm)(x)
torch.testing.assert_close(h, expected)
torch.testing.assert_close(cells, expected_cells[0])

# %% [markdown] lang="en"
# ## GRU: one gate for keeping and writing
#
# The GRU (Cho et al. 2014) has no cells. Its update gate $z$ divides each number of the new state between the old one
# and the new content $n$, and the reset gate $r$ decides how much of the old state the content sees. $[\cdot]_{r,z,n}$
# are three parts of the product.
#
# $$r = \sigma([W x_t + b + U h_{t-1} + d]_r), \qquad z = \sigma([W x_t + b + U h_{t-1} + d]_z)$$
#
# $$n = \tanh([W x_t + b]_n + r \odot [U h_{t-1} + d]_n), \qquad h_t = (1 - z) \odot n + z \odot h_{t-1}$$

# %% [markdown] lang="zh"
# ## GRU：保留和写入共用一个门
#
# GRU（Cho 等 2014）没有细胞状态。更新门 $z$ 决定新状态的每个数有多少来自旧状态、多少来自新内容 $n$；
# 重置门 $r$ 决定新内容能看到多少旧状态。$[\cdot]_{r,z,n}$ 表示乘积的三个部分。
#
# $$r = \sigma([W x_t + b + U h_{t-1} + d]_r), \qquad z = \sigma([W x_t + b + U h_{t-1} + d]_z)$$
#
# $$n = \tanh([W x_t + b]_n + r \odot [U h_{t-1} + d]_n), \qquad h_t = (1 - z) \odot n + z \odot h_{t-1}$$

# %%


def gru_step(p, x, state):
    (h,) = state
    (x_r, x_z, x_n), (h_r, h_z, h_n) = linear(p["ih"], x).chunk(3, -1), linear(p["hh"], h).chunk(3, -1)
    r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + r * h_n)
    return ((1 - z) * n + z * h,)


gru = spec.init(random.key(3), gru_spec(D_IN, WIDTH))
h, _ = loop(gru_step, gru, x, (zeros,))
torch.testing.assert_close(h, of_torch(torch.nn.GRU, gru)(x)[0])

# %% [markdown] lang="en"
# ## The layers of the library
#
# `recurrent` is a stack of such layers, faster than our loop: the products with $W$ are one for all steps, and the loop
# itself is a single operator. Sequences of different lengths need no packing, only their lengths. What follows the end
# of a sequence is not read, and its state is that of its last step.

# %% [markdown] lang="zh"
# ## 库里的循环层
#
# `recurrent` 是若干个这样的层叠在一起，比我们的循环快：与 $W$ 的乘积对所有时间步只做一次，循环本身是一个算子。
# 长短不一的序列不需要打包（packing），给出长度即可。序列结束之后的部分不会被读取，返回的状态就是它最后一步的状态。

# %%
lengths = torch.tensor([12, 7, 3, 1])
out, (state,) = recurrent("lstm", [lstm], x, lengths=lengths)
print("outputs:", tuple(out.shape), "state:", {part: tuple(value.shape) for part, value in state.items()})
for i, n in enumerate(lengths.tolist()):
    _, (last, cells) = loop(lstm_step, lstm, x[i : i + 1, :n], (zeros[:1], zeros[:1]))
    torch.testing.assert_close(state["h"][i], last[0])
    torch.testing.assert_close(state["c"][i], cells[0])

# %% [markdown] lang="en"
# ## Why gradients vanish
#
# How much does the last state depend on the first one? By the chain rule one factor per step is multiplied, for an RNN
#
# $$\frac{\partial h_T}{\partial h_1} = \prod_{t=2}^{T} \operatorname{diag}(1 - h_t^2)\, U$$
#
# If each factor shortens a vector by half, after 30 steps a billionth is left: the net cannot learn what it should have
# remembered. In an LSTM the direct path from $c_{t-1}$ to $c_t$ has the factor $\sigma(f)$, no matrix. At the beginning
# the gates are about half open, $\sigma(0) = 0.5$, which helps little. But a larger bias opens the forget gate:
# $\sigma(2) \approx 0.88$ (Gers et al. 2000 add such a bias).
#
# To measure it, add zeros $e_t$ to each state: the gradient with respect to them is the gradient with respect to the
# state.

# %% [markdown] lang="zh"
# ## 梯度为什么会消失
#
# 最后的状态在多大程度上依赖第一个状态？按链式法则，每一步乘上一个因子，对 RNN 就是
#
# $$\frac{\partial h_T}{\partial h_1} = \prod_{t=2}^{T} \operatorname{diag}(1 - h_t^2)\, U$$
#
# 如果每个因子都把向量缩短一半，30 步之后只剩十亿分之一：网络无从知道自己本该记住什么。LSTM 里从 $c_{t-1}$ 到 $c_t$
# 的直接通路上，因子是 $\sigma(f)$，没有矩阵。刚初始化时各个门大约半开，$\sigma(0) = 0.5$，帮助不大；
# 但给遗忘门一个较大的偏置就能把它打开：$\sigma(2) \approx 0.88$（Gers 等 2000 加过这样的偏置）。
#
# 测量的办法：给每个状态加上零 $e_t$，对它们的梯度就是对状态的梯度。

# %%
STEPS, HIDDEN = 20, 32


def opened(p, gates, amount):
    """The layer with `amount` added to the bias of its second gate: f of an LSTM, z of a GRU."""
    parts = list(p["ih"]["bias"].chunk(gates))
    parts[1] = parts[1] + amount
    return {**p, "ih": {**p["ih"], "bias": torch.cat(parts)}}


def flow(step, p, x, parts):
    """Norms of the gradient of the sum of the last h with respect to the state after each step, (batch, time)."""

    def last(added):  # (time, parts, batch, width)
        state = tuple(added.new_zeros(added.shape[1:]))
        for t, e in enumerate(added):
            state = tuple(s + e for s, e in zip(step(p, x[:, t], state), e, strict=True))
        return state[0].sum()

    gradient = torch.func.grad(last)(x.new_zeros(x.shape[1], parts, len(x), HIDDEN))  # (time, parts, batch, width)
    return gradient.movedim(1, 2).flatten(2).norm(dim=-1).T  # of h, or of h and c together


kinds = {"RNN": ("rnn", rnn_step, 1), "GRU": ("gru", gru_step, 1), "LSTM": ("lstm", lstm_step, 2)}
inputs = random.normal(random.key(4), (64, STEPS, 8))
layers = {
    "RNN": spec.init(random.key(5), rnn_spec(8, HIDDEN)),
    "GRU": spec.init(random.key(6), gru_spec(8, HIDDEN)),
    "LSTM": spec.init(random.key(7), lstm_spec(8, HIDDEN)),
}
layers["GRU, bias 2"] = opened(layers["GRU"], 3, 2.0)
layers["LSTM, bias 2"] = opened(layers["LSTM"], 4, 2.0)
flows = {}
for name, p in layers.items():
    _, step, parts = kinds[name.partition(",")[0]]
    flows[name] = flow(step, p, inputs, parts).median(0).values  # (time,)
    per_step = (flows[name][0] / flows[name][-2]) ** (1 / (STEPS - 2))
    print(f"{name:12}  x {per_step:.2f} per step; {flows[name][0]:.1e} arrive at the first of {STEPS} steps")

# %% [markdown] lang="en"
# ## Does it matter?
#
# The first token of a sequence is one of four and must be named after the last one; the 19 others are noise. We train
# the same five layers, each with an embedding before it and a linear layer after it: `sequence_classifier`.

# %% [markdown] lang="zh"
# ## 这有关系吗？
#
# 序列的第一个词元是四种之一，读完最后一个词元后要说出它是哪一种；其余 19 个词元都是噪声。
# 我们训练上面这五个层，每个前面加一个嵌入、后面加一个线性层，即 `sequence_classifier`。

# %%
UPDATES, PER_UPDATE = 50, 64
first_key, rest_key = random.split(random.key(8))
count = UPDATES * PER_UPDATE
answers = random.randint(first_key, (count,), 0, 4).long()
noise = random.randint(rest_key, (count, STEPS - 1), 4, 8).long()
tokens = torch.cat([answers[:, None], noise], 1)  # (sequences, time)
print("a sequence:", tokens[0].tolist(), "answer:", int(answers[0]))


def learn(kind, p):
    cfg = sequence_classifier.Config(vocabulary=8, d_in=8, width=HIDDEN, kind=kind, outputs=4)

    def loss(params, batch, keys):
        tokens, answers = batch
        logits = sequence_classifier.apply(params, (tokens, torch.full_like(answers, STEPS)), cfg)
        return cross_entropy(logits, answers, reduction="none"), {"accuracy": accuracy(logits.detach(), answers)}

    model, optimizer = sequence_classifier.spec(cfg), optimizers.adam(1e-2)
    values = {**spec.init(random.key(9), model), "layers": [p]}
    state, step, right = start(random.key(10), values, model, optimizer), make_step(loss, optimizer, compile=False), []
    for batch in zip(tokens.split(PER_UPDATE), answers.split(PER_UPDATE), strict=True):
        state, metrics = step(state, batch)
        right.append(metrics["accuracy"])
    return torch.stack(right)  # (updates,): of batches that the net has not seen before


curves = {name: learn(kinds[name.partition(",")[0]][0], p) for name, p in layers.items()}
for name, right in curves.items():
    print(f"{name:12}  {right[-10:].mean():.0%} right in the last 10 batches (guessing: 25%)")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for name, values in flows.items():
    left.semilogy(range(1, STEPS + 1), values.numpy(), label=name)
    right.plot(curves[name].unfold(0, 5, 1).mean(1).numpy())
left.set(title="At initialisation", xlabel="step t", ylabel="gradient of the state after step t")
right.set(title="Remembering the first token", xlabel="update", ylabel="accuracy (mean of 5 batches)", ylim=(0, 1.05))
figure.legend(loc="outside right center")
plt.show()

# %% [markdown] lang="en"
# The curves on the left tell which nets learn on the right. That is no proof that the others cannot: with shorter
# sequences among the long ones, all three kinds learn to remember 40 tokens, as `experiments/gradient_flow.py` shows.
#
# ## Where to go from here
#
# - [gradient_flow](../README.md#gradient_flow): the same measurement before and after training, with longer sequences.
# - [Recurrent layers](../../core/README.md#recurrent-layers): stacks, directions, states, and the routes to fast loops.
# - [char_rnn](../README.md#char_rnn): an LSTM learns to write; [sequences](../README.md#sequences): texts and series.

# %% [markdown] lang="zh"
# 左图的曲线预示了右图中哪些网络学得会。但这并不证明另外几个学不会：如果长序列里混入较短的序列，
# 三种网络都能学会记住 40 个词元，见 `experiments/gradient_flow.py`。
#
# ## 接下来
#
# - [gradient_flow](../README.md#gradient_flow)：训练前后的同样测量，序列更长。
# - [循环层](../../core/README.md#recurrent-layers)：多层、双向、状态，以及各种快速实现。
# - [char_rnn](../README.md#char_rnn)：LSTM 学写文章；[sequences](../README.md#sequences)：文本与时间序列。
