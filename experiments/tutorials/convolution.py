# %% [markdown] lang="en"
# # Convolution from scratch
#
# A convolution slides a small table of numbers, the **kernel**, over an image and takes a weighted sum at each place.
# We write it three times, as loops, as one matrix product of copied patches, and as a large sparse matrix; the last
# also explains the transposed convolution and the gradients. Then we measure how far a pixel of a deep net can see.
#
# You need to know what a matrix product and a gradient are, and a little PyTorch.

# %% [markdown] lang="zh"
# # 从零实现卷积
#
# 卷积把一张小的数表（**卷积核**）在图像上滑动，在每个位置计算加权和。我们把它写三遍：用循环、
# 用对复制的小块做一次矩阵乘法、用一个大的稀疏矩阵；最后这种写法同时解释了转置卷积和梯度。
# 然后测量深层网络的一个像素能看到多远。
#
# 读者需要知道什么是矩阵乘法和梯度，并了解一点 PyTorch。

# %%
from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.signal import correlate2d
from sklearn.datasets import load_sample_image
from torch.nn import functional as F

from core import random, spec
from core.layers import conv, conv_spec
from nets.explained import convolution as explained

# %% [markdown] lang="en"
# ## One kernel, one image
#
# With a kernel $w$ of $k \times k$,
#
# $$y_{ij} = \sum_{a=0}^{k-1} \sum_{b=0}^{k-1} w_{ab}\, x_{i+a,\, j+b}$$
#
# Strictly this is a cross-correlation: a convolution would flip the kernel. A net learns its kernels, so nobody minds.

# %% [markdown] lang="zh"
# ## 一个核，一张图
#
# 对 $k \times k$ 的卷积核 $w$：
#
# $$y_{ij} = \sum_{a=0}^{k-1} \sum_{b=0}^{k-1} w_{ab}\, x_{i+a,\, j+b}$$
#
# 严格地说这是互相关，真正的卷积要把核翻转。网络的核是学出来的，所以没有人在意。


# %%
def by_loops(x, w):
    k = len(w)
    y = torch.zeros(len(x) - k + 1, len(x[0]) - k + 1)
    for i in range(y.shape[0]):
        for j in range(y.shape[1]):
            y[i, j] = (w * x[i : i + k, j : j + k]).sum()
    return y


x = random.normal(random.key(0), (8, 10))
w = random.normal(random.key(1), (3, 3))
y = by_loops(x, w)
print(tuple(x.shape), "->", tuple(y.shape))
np.testing.assert_allclose(y.numpy(), correlate2d(x.numpy(), w.numpy(), "valid"), rtol=1e-5, atol=1e-5)
torch.testing.assert_close(y, F.conv2d(x[None, None], w[None, None])[0, 0])

# %% [markdown] lang="en"
# ## What a kernel sees
#
# By hand one can write kernels that blur, sharpen, or answer to edges. The first layer of a trained net finds similar
# ones by itself.

# %% [markdown] lang="zh"
# ## 卷积核看到什么
#
# 可以手工写出模糊、锐化或对边缘有响应的卷积核。训练好的网络在第一层会自己学到类似的核。

# %%
photo = torch.tensor(load_sample_image("china.jpg")[::3, ::3] / 255, dtype=torch.float32).mean(-1)  # grey, (143, 214)
kernels = {
    "the photograph": torch.tensor([[0.0, 0, 0], [0, 1, 0], [0, 0, 0]]),
    "blur": torch.full((3, 3), 1 / 9),
    "sharpen": torch.tensor([[0.0, -1, 0], [-1, 5, -1], [0, -1, 0]]),
    "vertical edges": torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]),
    "horizontal edges": torch.tensor([[-1.0, -2, -1], [0, 0, 0], [1, 2, 1]]),
    "all edges": torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]),
}
filtered = F.conv2d(photo[None, None], torch.stack(list(kernels.values()))[:, None])[0]  # (6, 141, 212)
figure, axes = plt.subplots(2, 3, figsize=(6.3, 3.3), layout="constrained")
for axis, picture, (name, kernel) in zip(axes.flat, filtered, kernels.items(), strict=True):
    low, high = (0, 1) if kernel.sum() > 0.5 else (-1, 1)  # kernels that answer to edges add up to 0: grey
    axis.imshow(picture.numpy(), cmap="gray", vmin=low, vmax=high)
    axis.set_title(name, fontsize=10)
    axis.axis("off")
plt.show()

# %% [markdown] lang="en"
# ## Channels, stride, padding, dilation, groups
#
# A layer has several kernels, each over all channels of its input. **Stride** $s$ takes every $s$-th place, **padding**
# $p$ puts zeros around the image, **dilation** $d$ spreads the kernel over every $d$-th pixel, and with **groups** the
# channels are cut into parts that do not see each other. Along each axis, $n$ pixels become
#
# $$\Big\lfloor \frac{n + 2p - d(k - 1) - 1}{s} \Big\rfloor + 1$$
#
# Nine products over the whole image are quicker than a loop over its pixels: one per place of the kernel.

# %% [markdown] lang="zh"
# ## 通道、步长、填充、空洞、分组
#
# 一层有多个卷积核，每个核覆盖输入的所有通道。**步长** $s$ 每隔 $s$ 个位置取一个，**填充** $p$ 在图像四周补零，
# **空洞** $d$ 让核每隔 $d$ 个像素取一个，**分组**把通道分成互不相见的几部分。沿每个方向，$n$ 个像素变成
#
# $$\Big\lfloor \frac{n + 2p - d(k - 1) - 1}{s} \Big\rfloor + 1$$
#
# 对整张图做九次乘法，比逐像素循环快：核的每个位置一次。


# %%
def size_of(n, k, s, p, d):
    return (n + 2 * p - d * (k - 1) - 1) // s + 1


def by_shifts(x, w, s=1, p=0, d=1, groups=1):
    """x: (batch, d_in, height, width), w: (d_out, d_in / groups, k, k) -> (batch, d_out, height', width')."""
    k, (height, width) = w.shape[-1], (size_of(n, w.shape[-1], s, p, d) for n in x.shape[2:])
    x = F.pad(x, (p, p, p, p)).unflatten(1, (groups, -1))  # (batch, groups, d_in / groups, ...)
    w = w.unflatten(0, (groups, -1))  # (groups, d_out / groups, d_in / groups, k, k)
    y = 0
    for a, b in product(range(k), range(k)):
        shifted = x[..., a * d :: s, b * d :: s][..., :height, :width]
        y = y + torch.einsum("goc,ngcij->ngoij", w[..., a, b], shifted)
    return y.flatten(1, 2)


x = random.normal(random.key(2), (2, 4, 11, 13))
for s, p, d, groups in product((1, 2), (0, 1), (1, 2), (1, 2)):
    w = random.normal(random.key(3), (6, 4 // groups, 3, 3))
    y = by_shifts(x, w, s, p, d, groups)
    torch.testing.assert_close(y, F.conv2d(x, w, None, s, p, d, groups), rtol=1e-4, atol=1e-4)
    print(f"stride {s} padding {p} dilation {d} groups {groups}: {tuple(y.shape)}, {w.numel()} weights")

# %% [markdown] lang="en"
# ## One matrix product: im2col
#
# Copy the patch under the kernel at each place into a column; then the whole layer is a single product of matrices,
# which is what processors do best. The price is memory: with $k = 3$ and stride 1 each pixel is copied up to nine
# times.

# %% [markdown] lang="zh"
# ## 一次矩阵乘法：im2col
#
# 把每个位置上核所覆盖的小块复制成一列，整层就变成一次矩阵乘法，这正是处理器最擅长的。代价是内存：$k = 3$、步长 1 时，
# 每个像素最多被复制九次。

# %%
w = random.normal(random.key(4), (6, 4, 3, 3))
columns = F.unfold(x, 3)  # (2, 4 * 3 * 3, 9 * 11)
y = (w.flatten(1) @ columns).unflatten(2, (9, 11))  # (6, 36) @ (2, 36, 99)
print("columns:", tuple(columns.shape), f"{columns.numel() / x.numel():.1f} times the image")
torch.testing.assert_close(y, by_shifts(x, w), rtol=1e-4, atol=1e-4)
torch.testing.assert_close(columns, explained.im2col(x, 3))

# %% [markdown] lang="en"
# ## A matrix, and its transpose
#
# A convolution is linear in the image, so there is a matrix $M$ with $y = M x$ for the flattened image: column by
# column, it is what the convolution makes of an image with a single 1. The **transposed convolution** is
#
# $$z = M^\top y$$
#
# It turns a small image into a large one: each pixel adds the whole kernel, times its value, to the output.

# %% [markdown] lang="zh"
# ## 矩阵，以及它的转置
#
# 卷积对图像是线性的，所以存在矩阵 $M$，对拉平的图像有 $y = M x$：
# 它的每一列就是只有一个像素为 1 的图像经卷积得到的结果。**转置卷积**就是
#
# $$z = M^\top y$$
#
# 它把小图变成大图：每个像素把整个核乘以自己的值，加到输出上。

# %%
kernel = random.normal(random.key(5), (1, 1, 3, 3))
ones = torch.eye(49).reshape(49, 1, 7, 7)  # 49 images of 7x7, each with a single 1
matrix = by_shifts(ones, kernel, s=2).flatten(1).T  # (9, 49): from 7x7 to 3x3
small = random.normal(random.key(6), (1, 1, 3, 3))
large = (matrix.T @ small.flatten()).reshape(1, 1, 7, 7)
print("matrix:", tuple(matrix.shape), f"{(matrix != 0).float().mean():.0%} of it is not zero")
torch.testing.assert_close(large, F.conv_transpose2d(small, kernel, stride=2))

# %% [markdown] lang="en"
# ## Gradients
#
# With $g = \partial L / \partial y$, the gradient by the image is $M^\top g$: a transposed convolution. That by the
# kernel is a convolution as well, of the image with $g$ as its kernel (here of stride 1),
#
# $$\frac{\partial L}{\partial w_{ab}} = \sum_{i,j} g_{ij}\, x_{i+a,\, j+b}$$
#
# So the backward pass of a convolution needs nothing new. Automatic differentiation agrees:

# %% [markdown] lang="zh"
# ## 梯度
#
# 记 $g = \partial L / \partial y$。对图像的梯度是 $M^\top g$，即一次转置卷积。对核的梯度也是卷积：
# 图像与作为核的 $g$ 的卷积（这里步长为 1）：
#
# $$\frac{\partial L}{\partial w_{ab}} = \sum_{i,j} g_{ij}\, x_{i+a,\, j+b}$$
#
# 所以卷积的反向传播不需要任何新东西。自动微分给出同样的结果：

# %%
image = random.normal(random.key(7), (1, 1, 7, 7))
y, pull = torch.func.vjp(F.conv2d, image, kernel)
g = random.normal(random.key(8), tuple(y.shape))  # (1, 1, 5, 5)
by_image, by_kernel = pull(g)
torch.testing.assert_close(by_image, F.conv_transpose2d(g, kernel))
torch.testing.assert_close(by_kernel, F.conv2d(image, g), rtol=1e-4, atol=1e-4)

# %% [markdown] lang="en"
# ## How far does a pixel see?
#
# The **receptive field** of an output is the part of the image that it depends on. Layer $l$ adds $(k_l - 1) d_l$
# steps, each as wide as the product of all strides before it:
#
# $$r = 1 + \sum_l (k_l - 1)\, d_l \prod_{i<l} s_i$$
#
# The gradient of one output by the image shows it: it is zero outside. We count its width and compare, with layers of
# this library: `conv_spec` declares the parameters, `conv` computes.

# %% [markdown] lang="zh"
# ## 一个像素能看多远？
#
# 一个输出的**感受野**是它所依赖的那部分图像。第 $l$ 层增加 $(k_l - 1) d_l$ 步，每一步的宽度等于之前所有步长的乘积：
#
# $$r = 1 + \sum_l (k_l - 1)\, d_l \prod_{i<l} s_i$$
#
# 一个输出对图像的梯度能显示感受野：在它之外梯度为零。我们数出宽度并作比较，用的是本库的层：`conv_spec` 声明参数，
# `conv` 进行计算。

# %%
SIZE = 63
stacks = {  # (stride, dilation) of each layer of 3x3
    "one layer": [(1, 1)],
    "five layers": [(1, 1)] * 5,
    "dilated 1 2 4 8 16": [(1, 1), (1, 2), (1, 4), (1, 8), (1, 16)],
    "stride 2, four times": [(2, 1)] * 4,
}


def seen(layers, images=32):
    """Mean size of the gradient of the middle output by the image, over random nets, (SIZE, SIZE)."""

    def middle(image, key):
        x = image
        for i, (s, d) in enumerate(layers):
            p = spec.init(random.fold_in(key, i), conv_spec(x.shape[1], 8, 3))
            x = torch.relu(conv(p, x, stride=s, padding=d, dilation=d))  # (1, 8, ...)
        return x[0, :, x.shape[2] // 2, x.shape[3] // 2].sum()

    keys = random.split(random.key(9), images)
    inputs = random.normal(random.key(10), (images, 1, 1, SIZE, SIZE))
    return torch.vmap(torch.func.grad(middle))(inputs, keys).abs().mean(0)[0, 0]


fields = {}
for name, layers in stacks.items():
    fields[name] = seen(layers)
    rows = fields[name].amax(1).nonzero().flatten()
    width = int(rows.max() - rows.min() + 1)
    reach, jump = 1, 1
    for s, d in layers:
        reach, jump = reach + 2 * d * jump, jump * s
    print(f"{name:21} sees {width:2} pixels a side; by the formula {reach:2}")
    assert width == min(reach, SIZE)

# %% [markdown] lang="en"
# Within its field a net looks more at the middle: many paths lead there, few to the border (Luo et al. 2016,
# arXiv:1701.04128). Dilation and stride see far with few layers; with stride the outputs are few as well.

# %% [markdown] lang="zh"
# 在感受野之内，网络更多地看中间：通向中间的路径很多，通向边缘的很少（Luo et al. 2016, arXiv:1701.04128）。
# 空洞和步长用很少的层就能看得很远；使用步长时，输出也变少了。

# %%
figure, axes = plt.subplots(1, 4, figsize=(10, 2.9), layout="constrained")
for axis, (name, field) in zip(axes, fields.items(), strict=True):
    axis.imshow((field / field.max()).sqrt().numpy(), cmap="magma")
    axis.set_title(name, fontsize=10)
    axis.set_xlabel("pixel")
axes[0].set_ylabel("pixel")
plt.show()

# %% [markdown] lang="en"
# ## Where to go from here
#
# [nets/explained/convolution.py](../../nets/explained/convolution.py) has these and two more ways, also with strides in
# the gradients; [convolution.py](../README.md#convolution) times them. Layers for one to three dimensions are in
# [core/README.md](../../core/README.md#layers-are-pairs-of-functions), and nets made of them in
# [nets/README.md](../../nets/README.md#networks).

# %% [markdown] lang="zh"
# ## 接下来
#
# [nets/explained/convolution.py](../../nets/explained/convolution.py) 里有这些写法以及另外两种，梯度也支持步长；
# [convolution.py](../README.md#convolution) 给它们计时。
# 一维到三维的层见 [core/README.md](../../core/README.md#layers-are-pairs-of-functions)，
# 由它们组成的网络见 [nets/README.md](../../nets/README.md#networks)。
