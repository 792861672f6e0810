# %% [markdown] lang="en"
# # Ensembles: eight nets at once, and how sure they are
#
# A classifier gives probabilities, but a net that was trained to the end is surer than it has a right to be. Several
# nets that differ only in their random start make different mistakes: their mean is more often right, and where they
# disagree, nobody should be sure. Here we train eight in one step, compare them with dropout at test time, and measure
# whether a confidence of 90 % means 90 % right.
#
# You need to know how a classifier is trained, and a little PyTorch.

# %% [markdown] lang="zh"
# # 集成：同时训练八个网络，并衡量它们有多大把握
#
# 分类器给出概率，但训练到底的网络往往过度自信。几个只在随机初始化上不同的网络，犯的错误也不同：取平均后更常答对；
# 它们意见不一致的地方，谁都不该有把握。本文在一个训练步里同时训练八个网络，与测试时的 dropout 作比较，
# 并衡量 90% 的置信度是否真的意味着 90% 的正确率。
#
# 读者需要知道分类器是怎样训练的，并了解一点 PyTorch。

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from core import random, spec, tree
from nets.classifiers import mlp
from train import optimizers
from train.losses import cross_entropy
from train.metrics.calibration import expected_calibration_error, reliability_bins
from train.metrics.classification import accuracy
from train.step import create, make_step

# %% [markdown] lang="en"
# ## Digits, and digits unlike those of the training
#
# 300 digits to learn from. The test has noise on its pixels that the training did not have: the world is seldom as the
# training set was. For later we turn the digits by 90 degrees, which makes pictures of no known class.

# %% [markdown] lang="zh"
# ## 数字，以及与训练时不同的数字
#
# 用 300 个数字学习。测试图像的像素上加了训练时没有的噪声：现实世界很少与训练集一模一样。
# 后面还要用到旋转了 90 度的数字，它们不再属于任何已知的类别。

# %%
digits = load_digits()
images = torch.tensor(digits.images / 16, dtype=torch.float32)  # (1797, 8, 8)
labels = torch.tensor(digits.target)
x, y = images[:300].flatten(1), labels[:300]  # (300, 64), (300,)
clean, test_y = images[300:].flatten(1), labels[300:]  # (1497, 64), (1497,)
noisy = clean + 0.3 * random.normal(random.key(0), tuple(clean.shape))
turned = torch.rot90(images[300:], 1, (1, 2)).flatten(1)

# %% [markdown] lang="en"
# ## Eight initial values: `vmap` over keys
#
# A net's initial values are a function of a key. So eight keys give eight nets, in one tree whose leaves have a new
# leading axis. Each is what its key gives alone.

# %% [markdown] lang="zh"
# ## 八组初始值：对 key 做 `vmap`
#
# 网络的初始值是 key 的函数，所以八个 key 就给出八个网络，它们放在同一棵树里，每个叶子多出一个最前面的维度。
# 每个网络都与单独用它的 key 得到的相同。

# %%
MEMBERS = 8
cfg = mlp.Config((64, 64, 64, 10))
model = mlp.spec(cfg)
keys = random.split(random.key(1), MEMBERS)  # (8, 2)
members = torch.vmap(lambda key: spec.init(key, model))(keys)
print(tree.table(members))
alone = spec.init(keys[3], model)
torch.testing.assert_close(tree.map(lambda leaf: leaf[3], members), alone, rtol=0, atol=0)

# %% [markdown] lang="en"
# ## One step for all of them
#
# The train step is a function too, of a state and a batch. `vmap` of it steps all members with a single call: one
# batched matrix product in place of eight small ones. All see the same batch here, hence `(0, None)`.

# %% [markdown] lang="zh"
# ## 一步训练所有网络
#
# 训练步也是函数，输入是状态和一批样本。对它做 `vmap`，一次调用就让所有成员各走一步：
# 八个小的矩阵乘法变成一个批量矩阵乘法。这里所有成员看到同样的样本，所以写成 `(0, None)`。


# %%
def train(cfg, keys, steps):
    """Parameters of one net per key, leaves (keys, ...)."""

    def losses(params, batch, keys):  # one key per example, for dropout
        logits = mlp.apply(params, batch[0], cfg, key=keys, train=True)
        return cross_entropy(logits, batch[1], reduction="none")

    optimizer = optimizers.adam(3e-3)
    states = torch.vmap(lambda key: create(key, mlp.spec(cfg), optimizer))(keys)
    step = torch.vmap(make_step(losses, optimizer, compile=False), (0, None))
    for _ in range(steps):
        states, metrics = step(states, (x, y))
    print(f"losses of {len(keys)}: {metrics['loss'].min():.4f} to {metrics['loss'].max():.4f}")
    return states.params


params = train(cfg, keys, steps=150)

# %% [markdown] lang="en"
# Is it the same as training one net by itself? We take member 3 before its first step, put its values into modules of
# `torch.nn`, and train those with `torch.optim` for 20 steps.

# %% [markdown] lang="zh"
# 这与单独训练一个网络一样吗？取成员 3 训练前的初始值，放进 `torch.nn` 的模块，用 `torch.optim` 训练 20 步，再作比较。

# %%
init_key, _ = random.split(keys[3])  # half of a key is for the initial values, half for the run
values = spec.init(init_key, model)
module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
for layer, p in zip(module[::2], values["layers"], strict=True):
    layer.load_state_dict(p)
adam = torch.optim.Adam(module.parameters(), lr=3e-3)
for _ in range(20):
    adam.zero_grad()
    nn.functional.cross_entropy(module(x), y).backward()
    adam.step()
early = train(cfg, keys, steps=20)
for layer, p in zip(module[::2], early["layers"], strict=True):
    torch.testing.assert_close(p["weight"][3], layer.weight.detach(), rtol=1e-3, atol=1e-4)

# %% [markdown] lang="en"
# ## The mean of the members
#
# The ensemble's prediction is the mean of the members' probabilities (Lakshminarayanan et al. 2017, arXiv:1612.01474).

# %% [markdown] lang="zh"
# ## 成员的平均
#
# 集成的预测是各成员概率的平均（Lakshminarayanan et al. 2017, arXiv:1612.01474）。


# %%
def ensemble(x):
    """Probabilities of each member, (members, examples, 10)."""
    return torch.vmap(lambda p: mlp.apply(p, x, cfg))(params).softmax(-1)


p = ensemble(noisy)
own = accuracy(p, test_y.expand(MEMBERS, -1))  # over all members
print(f"a member {own:.1%}, the mean of all {accuracy(p.mean(0), test_y):.1%} of the noisy digits")

# %% [markdown] lang="en"
# ## Dropout at test time
#
# Dropout trains many thinned nets in one. Left on at test time, each key gives other masks and so another prediction:
# an ensemble from a single training (Gal and Ghahramani 2016, arXiv:1506.02142). The key makes it a function: the same
# key, the same masks.

# %% [markdown] lang="zh"
# ## 测试时的 dropout
#
# Dropout 相当于在一个网络里训练许多被稀疏化的网络。测试时也保留 dropout，每个 key 给出不同的掩码，也就给出不同的预测：
# 只训练一次就得到一个集成（Gal and Ghahramani 2016, arXiv:1506.02142）。有了 key，它就是一个函数：相同的 key，
# 相同的掩码。

# %%
dropped_cfg = mlp.Config((64, 64, 64, 10), dropout=0.2)
dropped = tree.map(lambda leaf: leaf[0], train(dropped_cfg, random.split(random.key(2), 1), steps=150))


def monte_carlo(x, count=16):
    """Probabilities under masks of dropout, (count, examples, 10)."""
    keys = random.split(random.key(3), count)
    return torch.vmap(lambda key: mlp.apply(dropped, x, dropped_cfg, key=key, train=True))(keys).softmax(-1)


assert torch.equal(monte_carlo(noisy), monte_carlo(noisy))
print("spread of the first digit's probabilities:", np.round(monte_carlo(noisy)[:, 0].std(0).numpy(), 2))

# %% [markdown] lang="en"
# ## Is 90 % sure 90 % right?
#
# Sort the predictions into bins by their confidence, the largest probability. In each, the mean confidence should be
# the fraction that is right. The expected calibration error is the mean distance of the two,
#
# $$\mathrm{ECE} = \sum_b \frac{n_b}{n} \left| \mathrm{right}_b - \mathrm{confidence}_b \right|$$
#
# (Guo et al. 2017, arXiv:1706.04599). In NumPy it is a few lines:

# %% [markdown] lang="zh"
# ## 90% 的把握就是 90% 正确吗？
#
# 把预测按置信度（最大的概率）分到若干区间。在每个区间里，平均置信度应该等于答对的比例。期望校准误差是两者距离的平均：
#
# $$\mathrm{ECE} = \sum_b \frac{n_b}{n} \left| \mathrm{right}_b - \mathrm{confidence}_b \right|$$
#
# （Guo et al. 2017, arXiv:1706.04599）。用 NumPy 只要几行：


# %%
def ece(probabilities, labels, bins=10):
    confidence, right = probabilities.max(-1), probabilities.argmax(-1) == labels
    edges = np.linspace(0, 1, bins + 1, dtype=np.float32)
    inside = [(confidence > low) & (confidence <= high) for low, high in zip(edges[:-1], edges[1:], strict=True)]
    return sum(abs(right[rows].mean() - confidence[rows].mean()) * rows.mean() for rows in inside if rows.any())


predictions = {
    "one net": ensemble(noisy)[0],
    "one net with dropout, 16 masks": monte_carlo(noisy).mean(0),
    "eight nets": ensemble(noisy).mean(0),
}
for name, p in predictions.items():
    error = expected_calibration_error(p, test_y, bins=10)
    np.testing.assert_allclose(float(error), ece(p.numpy(), test_y.numpy()), rtol=1e-4)
    print(f"{name:31} {accuracy(p, test_y):.1%} right, {p.max(-1).values.mean():.1%} sure, ECE {error:.1%}")

# %% [markdown] lang="en"
# ## Two kinds of doubt
#
# The entropy of the mean prediction has two parts: the members' own doubt, and their disagreement $I$,
#
# $$H\Big[\frac{1}{M} \sum_m p_m\Big] = \frac{1}{M} \sum_m H[p_m] + I$$
#
# A member alone cannot have the second. It grows where the training says nothing: for noise, and for digits on their
# side.

# %% [markdown] lang="zh"
# ## 两种不确定性
#
# 平均预测的熵由两部分组成：各成员自己的不确定，以及它们之间的分歧 $I$：
#
# $$H\Big[\frac{1}{M} \sum_m p_m\Big] = \frac{1}{M} \sum_m H[p_m] + I$$
#
# 第二部分是单个成员给不出来的。在训练数据没有覆盖的地方它会变大：比如有噪声的数字，以及躺倒的数字。


# %%
def entropy(p):
    return -torch.xlogy(p, p).sum(-1)  # in nats; 0 log 0 = 0


disagreement = {}
for name, inputs in {"as in training": clean, "noisy": noisy, "turned": turned}.items():
    p = ensemble(inputs)
    disagreement[name] = entropy(p.mean(0)) - entropy(p).mean(0)  # (examples,)
    print(f"{name:15} own doubt {entropy(p).mean():.3f} nats, disagreement {disagreement[name].mean():.3f} nats")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
left.plot([0, 1], [0, 1], color="grey", linestyle=":", label="calibrated")
for (name, p), marker in zip(predictions.items(), "os^", strict=True):
    bins = reliability_bins(p, test_y, 10)
    filled = bins.counts >= 10
    left.plot(bins.confidence[filled].numpy(), bins.accuracy[filled].numpy(), marker=marker, label=name)
left.set_xlabel("confidence")
left.set_ylabel("fraction right")
left.set_title("noisy digits", fontsize=11)
left.set_ylim(0, 1.42)
left.set_yticks(np.linspace(0, 1, 6))
left.legend(loc="upper left", fontsize=9)
edges = np.linspace(0, 1, 21)
for name, values in disagreement.items():
    right.hist(values.numpy(), edges, histtype="step", linewidth=1.5, label=name)
right.set_xlabel("disagreement of eight nets in nats")
right.set_ylabel("pictures")
right.set_yscale("log")
right.legend()
plt.show()

# %% [markdown] lang="en"
# ## Where to go from here
#
# [ensemble.py](../README.md#ensemble) trains sixteen nets on any images, with a batch order for each member and a
# compiled step. [core/README.md](../../core/README.md#keys) has more about keys, and
# [train/README.md](../../train/README.md#losses-and-metrics) the other metrics.

# %% [markdown] lang="zh"
# ## 接下来
#
# [ensemble.py](../README.md#ensemble) 在任意图像上训练十六个网络，每个成员有自己的样本顺序，训练步经过编译。
# 关于 key 的更多内容见 [core/README.md](../../core/README.md#keys)，
# 其他指标见 [train/README.md](../../train/README.md#losses-and-metrics)。
