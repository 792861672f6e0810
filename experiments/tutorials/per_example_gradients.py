# %% [markdown] lang="en"
# # The gradient of each example
#
# Training follows the mean of many gradients, one per example. Looked at one by one they say which examples a net
# learns most from, which are alike, and which carry a wrong label. Here we take them three ways, see that all agree,
# and find mislabelled digits by the length of their gradients.
#
# You need to know what a gradient is, and a little PyTorch.

# %% [markdown] lang="zh"
# # 每个样本的梯度
#
# 训练沿着许多样本梯度的平均值前进。把这些梯度逐个拿出来看，就能知道网络从哪些样本学得最多、哪些样本彼此相似、
# 哪些样本的标签是错的。本文用三种方法计算逐样本梯度，验证三者一致，再用梯度的长度找出标错的手写数字。
#
# 读者需要知道什么是梯度，并了解一点 PyTorch。

# %%
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits

from core import per_example, random, spec, tree
from nets.classifiers import mlp
from train import optimizers
from train.losses import cross_entropy
from train.step import create, make_step

# %% [markdown] lang="en"
# ## Digits, some of them mislabelled
#
# 512 digits of 8x8 pixels, as rows of 64 numbers between 0 and 1. Every twentieth gets a wrong label. Every random
# number comes from a key, so a second run gives the same.

# %% [markdown] lang="zh"
# ## 手写数字，其中一部分标签是错的
#
# 512 个 8x8 像素的数字，每个写成 64 个 0 到 1 之间的数。每二十个中有一个换成错误的标签。所有随机数都来自一个 key，
# 因此再运行一次结果相同。

# %%
digits = load_digits()
x = torch.tensor(digits.data[:512] / 16, dtype=torch.float32)  # (512, 64)
true = torch.tensor(digits.target[:512])  # (512,)
wrong = torch.arange(512) % 20 == 7
shift = random.randint(random.key(0), (512,), 1, 10)
y = torch.where(wrong, (true + shift) % 10, true)  # (512,)
print(f"{wrong.sum()} of {len(y)} labels are wrong")

# %% [markdown] lang="en"
# ## One loss per example
#
# A net is a function of its parameters, which are a plain dict of tensors. The loss returns one number per example;
# nothing is averaged yet.

# %% [markdown] lang="zh"
# ## 每个样本一个损失
#
# 网络就是参数的函数，参数是由张量组成的普通字典。损失函数为每个样本返回一个数，此时还没有取平均。

# %%
cfg = mlp.Config((64, 64, 10))
params = spec.init(random.key(1), mlp.spec(cfg))
print(tree.table(params))


def losses(params, batch, keys=None):
    x, y = batch
    return cross_entropy(mlp.apply(params, x, cfg), y, reduction="none")  # (examples,)


print(losses(params, (x, y)).shape)

# %% [markdown] lang="en"
# ## First way: a loop
#
# Clear and slow: a batch of one, as many times as there are examples.

# %% [markdown] lang="zh"
# ## 方法一：循环
#
# 清楚但是慢：每次取一个样本作为一批，有多少样本就做多少次。

# %%
batch = (x[:16], y[:16])
one_by_one = []
for i in range(16):
    gradient = torch.func.grad(lambda p: losses(p, (x[i : i + 1], y[i : i + 1])).sum())(params)  # noqa: B023
    one_by_one.append(tree.norm(gradient))
one_by_one = torch.stack(one_by_one)  # (16,)

# %% [markdown] lang="en"
# ## Second way: `vmap(grad)`
#
# `vmap` turns a function of one example into a function of many. It holds every gradient in memory at once: 16 copies
# of the parameters here, and 16 copies of a large net elsewhere.

# %% [markdown] lang="zh"
# ## 方法二：`vmap(grad)`
#
# `vmap` 把处理一个样本的函数变成处理许多样本的函数。它会同时在内存中保存所有梯度：这里是 16 份参数，
# 对大网络来说就是 16 份大网络。

# %%


def loss_of_one(params, x, y):
    return losses(params, (x[None], y[None]))[0]


gradients = torch.vmap(torch.func.grad(loss_of_one), (None, 0, 0))(params, *batch)
print(tree.map(lambda g: tuple(g.shape), gradients))
vmapped = torch.sqrt(sum(g.flatten(1).square().sum(1) for g in tree.leaves(gradients)))  # (16,)

# %% [markdown] lang="en"
# ## Third way: reports
#
# For a linear layer $y = W x$ the gradient of example $n$ is the outer product $g_n x_n^\top$ of the gradient at its
# output and its input, so
#
# $$\lVert g_n x_n^\top \rVert = \lVert g_n \rVert \, \lVert x_n \rVert$$
#
# and the product itself is never needed. `reports` does this for every layer (Goodfellow 2015, arXiv:1510.01799, and
# its successors), in the same backward pass that gives the mean gradient.

# %% [markdown] lang="zh"
# ## 方法三：reports
#
# 对线性层 $y = W x$，第 $n$ 个样本的梯度是输出端梯度与输入的外积 $g_n x_n^\top$，所以
#
# $$\lVert g_n x_n^\top \rVert = \lVert g_n \rVert \, \lVert x_n \rVert$$
#
# 外积本身根本不必算出来。`reports` 对每一层都这样做（Goodfellow 2015, arXiv:1510.01799 及后续工作），
# 与求平均梯度用的是同一次反向传播。

# %%
report = per_example.reports(losses, params, batch)
print(per_example.plan(losses, params, batch))
print("largest difference:", float((report.total_norm - vmapped).abs().max()))
torch.testing.assert_close(report.total_norm, vmapped, rtol=1e-5, atol=1e-6)
torch.testing.assert_close(one_by_one, vmapped, rtol=1e-5, atol=1e-6)

# %% [markdown] lang="en"
# ## Which labels are wrong?
#
# Train for a few epochs. The net soon agrees with the digits that follow the rule; those it cannot fit keep a long
# gradient. We rank all 512 by it.

# %% [markdown] lang="zh"
# ## 哪些标签是错的？
#
# 训练几轮。符合规律的数字很快就学会了；学不会的样本一直保持很长的梯度。我们按梯度长度给 512 个样本排序。

# %%
optimizer = optimizers.adamw(3e-3)
step = make_step(losses, optimizer, compile=False)
state = create(random.key(1), mlp.spec(cfg), optimizer)
for _ in range(60):
    state, metrics = step(state, (x, y))
print("loss after training:", float(metrics["loss"]))

norms = per_example.reports(losses, state.params, (x, y)).total_norm  # (512,)
ranked = norms.argsort(descending=True)
first = ranked[: int(wrong.sum())]
print(f"of the {len(first)} longest gradients, {int(wrong[first].sum())} belong to a wrong label")

# %% [markdown] lang="en"
# The digits with the longest gradients, with the label that they carry; red where it is wrong.

# %% [markdown] lang="zh"
# 梯度最长的那些数字以及它们的标签；标签错误的用红色标出。

# %%
figure, axes = plt.subplots(2, 8, figsize=(8, 2.6), layout="constrained")
for axis, i in zip(axes.flat, ranked.tolist(), strict=False):
    axis.imshow(x[i].reshape(8, 8).numpy(), cmap="gray_r")
    axis.set_title(f"{int(y[i])}   ({norms[i]:.1f})", color="tab:red" if wrong[i] else "black", fontsize=9)
    axis.axis("off")
plt.show()

# %% [markdown] lang="en"
# ## Where to go from here
#
# [core/per_example/README.md](../../core/per_example/README.md): clipped sums, Gram matrices, your own `nn.Module`.
# `experiments/mislabelled.py` does this search on your own data, `experiments/examine.py` shows it as a page, and
# `experiments/private.py` clips these gradients for differential privacy.

# %% [markdown] lang="zh"
# ## 接下来
#
# [core/per_example/README.md](../../core/per_example/README.md)：裁剪求和、Gram 矩阵、您自己的 `nn.Module`。
# `experiments/mislabelled.py` 在您自己的数据上做同样的搜索，`experiments/examine.py` 把结果做成网页，
# `experiments/private.py` 用裁剪后的梯度实现差分隐私。
