# %% [markdown] lang="en"
# # Tensors
#
# A tensor is a table of numbers with any number of axes: an image, a batch of sentences, the weights of a layer. Here
# we look at what it consists of, how to make, cut and combine tensors, which operations copy, and why we never loop
# over their numbers. At the end a classifier of handwritten digits takes three lines. You need to know a little
# Python, and what a matrix product is.

# %% [markdown] lang="zh"
# # 张量
#
# 张量就是有任意多个轴的数表：一张图片、一批句子、一层的权重都是张量。本文介绍张量由什么组成，怎样创建、切取、
# 组合张量，哪些操作会复制数据，以及为什么从不逐个元素写循环。最后用三行代码写一个手写数字分类器。
# 读者需要会一点 Python，并知道什么是矩阵乘法。

# %%
import time

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.spatial.distance import cdist

from core import random, tree
from train.data.images import arrays

# %% [markdown] lang="en"
# ## What a tensor consists of
#
# The numbers lie in memory as one row. The *shape* says how many there are along each axis, the *strides* how far
# apart two neighbours along an axis lie in that row: the number at $(i, j)$ is at
# $\mathrm{offset} + i \, s_0 + j \, s_1$. The *dtype* is the type of each number, the *device* where they are (cpu,
# cuda ...), the *layout* the form of storage: strided is the usual one, a sparse tensor keeps only its non-zero
# entries.

# %% [markdown] lang="zh"
# ## 张量由什么组成
#
# 所有的数在内存里排成一行。*形状*（shape）是每个轴上有多少个数，
# *步长*（stride）是同一个轴上相邻两个数在这一行里相隔多远：$(i, j)$ 处的数位于
# $\mathrm{offset} + i \, s_0 + j \, s_1$。*dtype* 是每个数的类型，*device* 是数据所在的设备（cpu、cuda 等），
# *layout* 是存储方式：通常是 strided，稀疏张量则只保存非零元素。

# %%
x = torch.arange(12, dtype=torch.float32).reshape(3, 4)
print(x)
print(tuple(x.shape), x.dtype, x.device, x.layout, "strides", x.stride(), "bytes", x.numel() * x.element_size())

row, (s0, s1) = x.flatten(), x.stride()  # row (12,): the numbers as they lie in memory
assert row[2 * s0 + 1 * s1] == x[2, 1]
print("transposed:", tuple(x.T.shape), "strides", x.T.stride(), "same memory:", x.T.data_ptr() == x.data_ptr())

# %% [markdown] lang="en"
# ## Making tensors
#
# From a shape, from Python's numbers, from NumPy, whose numbers are float64; `from_numpy` shares its memory, `tensor`
# copies. Random numbers come from a *key*: `torch.randn` draws from a hidden generator and depends on everything
# drawn before, `random.normal(key, shape)` is a function, and the same key gives the same numbers. `split` makes new
# keys from one.
#
# Where two dtypes meet, the higher kind wins (boolean, integer, floating-point, complex), and of one kind the wider
# type. A Python number widens no tensor of its own kind: `x * 0.5` stays float32. Two surprises: bytes wrap around at
# 256, and float32 has 24 bits, so that not every integer above $2^{24}$ exists in it.

# %% [markdown] lang="zh"
# ## 创建张量
#
# 可以给出形状，也可以从 Python 的数或 NumPy 数组得到张量。NumPy 的浮点数是 float64；`from_numpy` 与数组共享内存，
# `tensor` 则会复制。随机数来自 *key*：`torch.randn` 使用隐藏的生成器，结果取决于之前抽取过多少随机数；
# `random.normal(key, shape)` 则是函数，相同的 key 给出相同的数。`split` 从一个 key 得到若干新的 key。
#
# 两种 dtype 相遇时，结果取较高的一类（布尔、整数、浮点、复数），同类中取较宽的类型。
# Python 的数不会提升同类张量的精度：`x * 0.5` 仍是 float32。有两处容易出错：字节满 256 就回绕；
# float32 只有 24 位有效位，$2^{24}$ 以上的整数并非都能表示。

# %%
print(torch.zeros(2, 3).dtype, torch.linspace(0, 1, 5), torch.tensor([[1, 2], [3, 4]]).dtype)
array = np.zeros(3)
shared, copied = torch.from_numpy(array), torch.tensor(array)
array[0] = 5
print(shared, copied)

first, second = random.split(random.key(0))
a, b = random.normal(first, (5, 2)), random.normal(second, (7, 2))
assert torch.equal(a, random.normal(first, (5, 2)))

whole = torch.arange(3)
print("int64 + float16:", (whole + torch.ones(3).half()).dtype, " float32 + float64:", (x + x.double()).dtype)
print("float32 * 0.5:", (x * 0.5).dtype, " int64 / 2:", (whole / 2).dtype, " int64 // 2:", (whole // 2).dtype)
print("bytes: 200 + 100 =", (torch.tensor([200], dtype=torch.uint8) + 100).item())
print("float32: 2**24 + 1 =", int(torch.tensor(2.0**24) + 1), " 2**24 =", 2**24)

# %% [markdown] lang="en"
# ## Indexing, views and copies
#
# Slices take rows, columns or every second entry, a list of indices those entries, a mask of booleans all entries
# where it is true. `gather` takes an entry of each row, such as the score of each example's true class. `index_put`
# writes at some positions of a *new* tensor; with `accumulate=True` it adds, which makes a histogram.
#
# Slices, transposes and `expand` only put new strides on the same memory: a *view*, which costs nothing. Masks and
# lists of indices copy. To write into a view is to write into the original, the source of many errors; no function of
# this library writes into its arguments unless asked to. `view` insists on a view, `reshape` copies where there is
# none: a transposed matrix is no row of its memory.

# %% [markdown] lang="zh"
# ## 索引、视图与副本
#
# 切片可以取行、取列或隔一个取一个，下标列表取出对应的元素，布尔掩码取出所有为真的位置。`gather` 从每一行取一个元素，
# 例如每个样本真实类别的得分。`index_put` 在一个*新*张量的若干位置写入；设 `accumulate=True` 则是累加，
# 可用来统计直方图。
#
# 切片、转置和 `expand` 只是在同一块内存上换一组步长，得到的是*视图*，没有开销。掩码和下标列表会复制。
# 写入视图就是写入原张量，许多错误由此而来；除非明确要求，本库的函数不会写入自己的参数。`view` 要求结果必须是视图，
# `reshape` 在做不到时会复制：转置后的矩阵不能直接当作内存里的一行。

# %%
print("row", x[1], "columns", tuple(x[:, 1:3].shape), "every second", tuple(x[:, ::2].shape), "above 6", x[x > 6])
scores, labels = random.normal(random.key(1), (4, 3)), torch.tensor([2, 0, 1, 1])
own = scores.gather(1, labels[:, None])[:, 0]  # (4,)
assert torch.equal(own, scores[torch.arange(4), labels])
print("a new one:", x.index_put((torch.tensor([0, 2]), torch.tensor([1, 3])), torch.tensor(100.0)).flatten())
counts = torch.zeros(3, dtype=torch.int64).index_put((labels,), torch.tensor(1), accumulate=True)
assert np.array_equal(counts, np.bincount(labels))

base = x.clone()
base[0].zero_()  # base[0] is a view
print("base after its first row was set to zero:", base.flatten())
try:
    x.T.view(12)
except RuntimeError as error:
    print("view:", str(error).partition(" (")[0])
print("reshape copies:", x.T.reshape(12).data_ptr() != x.data_ptr(), " expand:", x[0].expand(1000, 4).stride())

# %% [markdown] lang="en"
# ## Broadcasting, reductions, einsum
#
# Shapes that differ are aligned at the *right*; along each axis the sizes must be equal, or one of them is 1 or
# missing and is repeated without copying. `x[:, None]` puts in an axis of size 1. So all distances between two sets
# of points are one expression:
#
# $$d_{ij} = \sqrt{\sum_k (a_{ik} - b_{jk})^2}$$
#
# The trap: `(n,)` and `(n, 1)` make `(n, n)`, without an error. `sum`, `amax`, `argmax` remove the axes that you
# name; `keepdim=True` leaves them with size 1, ready to broadcast. The softmax first subtracts the largest entry of
# each row, because $e^{1000}$ is infinite. `einsum` multiplies and sums by the indices of a formula: letters that are
# missing on the right are summed over. `"bqd,bkd->bqk"` are the scores of attention, every query with every key.

# %% [markdown] lang="zh"
# ## 广播、归约与 einsum
#
# 形状不同时从*右边*对齐；每个轴上的大小必须相等，或者其中一个是 1 或缺失，这时它会被重复，但不复制数据。
# `x[:, None]` 插入一个大小为 1 的轴。于是两组点之间的所有距离只需一个表达式：
#
# $$d_{ij} = \sqrt{\sum_k (a_{ik} - b_{jk})^2}$$
#
# 陷阱：`(n,)` 与 `(n, 1)` 会得到 `(n, n)`，而且不报错。`sum`、`amax`、`argmax` 会去掉指定的轴；
# `keepdim=True` 把它们保留为大小 1，便于继续广播。softmax 要先减去每行的最大值，因为 $e^{1000}$ 会溢出为无穷大。
# `einsum` 按公式的下标相乘再求和：右边没有的字母就是要求和的轴。`"bqd,bkd->bqk"` 是注意力的得分，
# 每个 query 与每个 key 做内积。

# %%
distances = (a[:, None, :] - b[None, :, :]).square().sum(-1).sqrt()  # (5, 1, 2) - (1, 7, 2) -> (5, 7, 2) -> (5, 7)
torch.testing.assert_close(distances, torch.from_numpy(cdist(a, b)).float())
print(tuple(distances.shape), " the trap:", tuple((torch.zeros(3) - torch.zeros(3, 1)).shape))

large = 1000 * x  # (3, 4)
powers = (large - large.amax(1, keepdim=True)).exp()  # (3, 4) - (3, 1)
torch.testing.assert_close(powers / powers.sum(1, keepdim=True), torch.softmax(large, 1))
print("without the maximum:", (large.exp() / large.exp().sum(1, keepdim=True))[2])

queries, keys = random.normal(random.key(2), (2, 5, 8)), random.normal(random.key(3), (2, 6, 8))
attention = torch.einsum("bqd,bkd->bqk", queries, keys)  # (2, 5, 6)
torch.testing.assert_close(attention, torch.from_numpy(np.einsum("bqd,bkd->bqk", queries, keys)))

# %% [markdown] lang="en"
# ## No loops
#
# Each operation costs some microseconds before it computes anything: Python calls torch, which looks up dtype and
# device and allocates the result. A loop pays this for every row, an operation on the whole tensor once.

# %% [markdown] lang="zh"
# ## 不写循环
#
# 每个操作在真正计算之前都要花几微秒：Python 调用 torch，torch 检查 dtype 和设备，再为结果分配内存。
# 循环的每一行都要付这份开销，而对整个张量做一次操作只付一次。

# %%
sizes, seconds = [10, 30, 100, 300, 1000, 3000, 10_000], {"loop": [], "one operation": []}
ways = {"loop": lambda t: torch.stack([r.square().sum() for r in t]), "one operation": lambda t: t.square().sum(1)}
for n in sizes:
    rows = random.normal(random.key(4), (n, 16))
    torch.testing.assert_close(ways["loop"](rows), ways["one operation"](rows))
    for name, way in ways.items():
        start = time.perf_counter()
        way(rows)
        seconds[name].append(time.perf_counter() - start)
print(f"{sizes[-1]} rows: {seconds['loop'][-1] / seconds['one operation'][-1]:.0f} times as fast without the loop")

# %% [markdown] lang="en"
# ## Trees of tensors
#
# A net has many tensors. We keep them in plain dicts and lists, a *tree*, and `core.tree` has what one tensor has: a
# map over all leaves, a count, a norm. Every leaf has a name, the path to it.

# %% [markdown] lang="zh"
# ## 张量树
#
# 一个网络有许多张量。我们把它们放在普通的字典和列表里，这就是*树*（tree）。`core.tree` 把单个张量上的操作推广到树：
# 对所有叶子做映射、计数、求范数。每个叶子都有名字，就是通往它的路径。

# %%
params = {"layers": [{"weight": torch.ones(3, 2), "bias": torch.zeros(3)}, {"weight": torch.ones(1, 3)}]}
print(tree.table(params))
smaller = tree.map(lambda p, q: p - 0.1 * q, params, params)  # a step of gradient descent has this form
print(tree.get(smaller, "layers.1.weight"), "norm", tree.norm(params).item())

# %% [markdown] lang="en"
# ## A classifier in three lines
#
# 1500 digits of 8x8 pixels. The mean image of each class is the product of a table of labels (one 1 per row) and the
# pixels; a new digit belongs to the nearest mean. An einsum, a broadcast, a reduction.

# %% [markdown] lang="zh"
# ## 三行代码的分类器
#
# 1500 个 8x8 像素的数字。每一类的平均图像是标签表（每行只有一个 1）与像素的乘积，新数字归入最近的平均图像：
# 一次 einsum、一次广播、一次归约。

# %%
train, test = (part._replace(images=part.images.flatten(1)) for part in arrays.digits())  # (1500, 64), (297, 64)
table = torch.nn.functional.one_hot(train.labels, 10).float()  # (1500, 10)

means = torch.einsum("nc,np->cp", table, train.images) / table.sum(0)[:, None]  # (10, 64)
squares = (test.images[:, None] - means).square().sum(-1)  # (297, 1, 64) - (10, 64) -> (297, 10)
predicted = squares.argmin(1)  # (297,)

print(f"{(predicted == test.labels).float().mean():.1%} of {len(predicted)} digits are recognised")
assert np.array_equal(predicted, cdist(test.images, means).argmin(1))

# %%
left, right = plt.figure(figsize=(9, 3.2), layout="constrained").subfigures(1, 2, width_ratios=(1, 1.2))
axes = left.subplots()
for name, values in seconds.items():
    axes.loglog(sizes, values, "o-", label=name)
axes.set(xlabel="rows", ylabel="seconds", title="sum of squares of each row")
axes.legend()
for c, axis in enumerate(right.subplots(2, 5).flat):
    axis.imshow(means[c].reshape(8, 8).numpy(), cmap="gray_r")
    axis.set_title(f"mean of {c}", fontsize=9)
    axis.axis("off")
plt.show()

# %% [markdown] lang="en"
# ## Where to go from here
#
# [core/README.md](../../core/README.md#trees): trees and [keys](../../core/README.md#keys).
# [core/COMING_FROM.md](../../core/COMING_FROM.md): what you know from `nn.Module` or JAX beside what is written here.
# `experiments/convolution.py` takes a convolution apart.

# %% [markdown] lang="zh"
# ## 接下来
#
# [core/README.md](../../core/README.md#trees)：树与 [key](../../core/README.md#keys)。
# [core/COMING_FROM.md](../../core/COMING_FROM.md)：`nn.Module` 或 JAX 的写法与这里的写法对照。
# `experiments/convolution.py` 把卷积拆成基本操作。
