# %% [markdown] lang="en"
# # Mixed precision
#
# Numbers of 16 bits take half the memory of those of 32 and multiply several times as fast on a GPU, but they are
# coarse, and some are too small to exist. Mixed precision computes most of a net with 16 bits and keeps in float32
# what would break. Here we take the formats apart, see what goes wrong in each, and train in three ways.
#
# You need to know what a gradient and an optimizer are.

# %% [markdown] lang="zh"
# # 混合精度
#
# 16 位的数只占 32 位一半的内存，在 GPU 上的乘法快好几倍，但它们很粗糙，太小的数还无法表示。
# 混合精度让网络的大部分计算用 16 位，而把容易出问题的部分留在 float32。本文拆解这些格式，看看各自会出什么问题，
# 再用三种方式训练。
#
# 读者需要知道什么是梯度和优化器。

# %%
import matplotlib.pyplot as plt
import torch

from core import random, spec, transforms, tree
from nets.classifiers import mlp
from train import optimizers
from train.data import batching
from train.data.images import arrays
from train.losses import cross_entropy
from train.step import Policy, make_step, start

# %% [markdown] lang="en"
# ## Three formats
#
# A floating-point number has a sign bit $s$, an exponent $e$ and a fraction of $m$ bits, the integer $f$:
#
# $$(-1)^s \, (1 + f / 2^m) \, 2^{e - \mathrm{bias}}$$
#
# float32 has 8 bits of exponent and 23 of fraction, float16 5 and 10, bfloat16 8 and 7. So bfloat16 has the range of
# float32 and only two to three decimal digits; float16 has three to four digits, but ends at 65504, and its least
# number above zero is $6 \cdot 10^{-8}$.

# %% [markdown] lang="zh"
# ## 三种格式
#
# 浮点数由符号位 $s$、指数 $e$ 和 $m$ 位的尾数（看作整数 $f$）组成：
#
# $$(-1)^s \, (1 + f / 2^m) \, 2^{e - \mathrm{bias}}$$
#
# float32 有 8 位指数和 23 位尾数，float16 是 5 位和 10 位，bfloat16 是 8 位和 7 位。
# 所以 bfloat16 的范围与 float32 相同，但只有两到三位十进制有效数字；float16 有三到四位，但最大只到 65504，
# 最小的正数是 $6 \cdot 10^{-8}$。

# %%
FORMATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
for name, dtype in FORMATS.items():
    info = torch.finfo(dtype)
    tiny = info.smallest_normal * info.eps  # the fraction's last bit alone, with the least exponent
    print(f"{name:<8}  largest {info.max:.3g}  step after 1 {info.eps:.3g}  least above zero {tiny:.3g}")

bits = torch.tensor(0.1, dtype=torch.float16).view(torch.int16).item()
exponent, fraction = (bits >> 10) & 31, bits & 1023
assert (1 + fraction / 1024) * 2.0 ** (exponent - 15) == torch.tensor(0.1, dtype=torch.float16).item()
print(f"0.1 in float16: {bits:016b} = (1 + {fraction}/1024) * 2^({exponent} - 15)")

# %% [markdown] lang="en"
# bfloat16 is float32 without its last 16 bits, rounded to the nearest, and to an even last bit where two are as near.
# In integers: add half a step (a little less if the bit kept is 0) and cut.

# %% [markdown] lang="zh"
# bfloat16 就是去掉最后 16 位的 float32，舍入到最近的数，两边一样近时取最后一位为偶数的那个。用整数来做：
# 加上半个单位（若保留的末位是 0 则略少一点），再截断。

# %%


def to_bfloat16(x):
    word = x.view(torch.int32)
    last = torch.bitwise_right_shift(word, 16) & 1  # the last bit that stays
    return ((word + 0x7FFF + last) & -0x10000).view(torch.float32)


x = random.normal(random.key(0), (100_000,)) * 10 ** random.uniform(
    random.key(1), (100_000,), minval=-20.0, maxval=20.0
)
torch.testing.assert_close(to_bfloat16(x), x.bfloat16().float(), rtol=0, atol=0)
print("0.1:", {name: torch.tensor(0.1).to(dtype).item() for name, dtype in FORMATS.items()})

# %% [markdown] lang="en"
# ## What breaks
#
# 1. *Small updates.* In bfloat16 the number after 1 is 1.0078; a weight of 1 plus 0.001 is 1, however often. So a
#    float32 *master copy* of the weights gets the updates.
# 2. *Sums.* For the same reason a running sum of ones stops at 256. torch's own `sum` adds in float32 and rounds
#    once; losses, softmax, the statistics of norms and metrics want the same.
# 3. *Small gradients.* A gradient of $10^{-8}$ is zero in float16 (not in bfloat16, which has the exponents of
#    float32).

# %% [markdown] lang="zh"
# ## 会出什么问题
#
# 1. *很小的更新*。bfloat16 中 1 后面的数是 1.0078；权重 1 加上 0.001 还是 1，加多少次都一样。
#    所以更新要加到权重的 float32 *主副本*（master weights）上。
# 2. *求和*。同理，逐个累加 1 到 256 就停住了。torch 自己的 `sum` 用 float32 累加，最后只舍入一次；损失、softmax、
#    归一化的统计量和指标也应如此。
# 3. *很小的梯度*。$10^{-8}$ 的梯度在 float16 中就是零（bfloat16 不会，它的指数范围与 float32 相同）。

# %%
weight, master = torch.tensor(1.0).bfloat16(), torch.tensor(1.0)
count = torch.tensor(0.0).bfloat16()
for _ in range(1000):
    weight, master, count = weight + 0.001, master + 0.001, count + 1
print("1 + 1000 * 0.001:", weight.item(), "with a float32 master copy:", round(master.item(), 4))
print("1000 ones one by one:", count.item(), " by sum():", torch.ones(1000).bfloat16().sum().item())
print("1e-8:", {name: torch.tensor(1e-8).to(dtype).item() for name, dtype in FORMATS.items()})

# %% [markdown] lang="en"
# ## Loss scaling
#
# float16's cure for small gradients: multiply the loss by a large number $S$, so that all gradients on the way back
# are $S$ times as large, and divide by $S$ in float32. If something becomes infinite, $S$ was too large: leave out
# this step and halve $S$. This library has no loss scaling, since bfloat16 needs none; for float16 it would look like
# this.

# %% [markdown] lang="zh"
# ## 损失缩放
#
# float16 对付小梯度的办法：把损失乘以一个大数 $S$，反向途中的梯度就都放大 $S$ 倍，最后在 float32 中除以 $S$。
# 如果出现无穷大，说明 $S$ 太大：放弃这一步，把 $S$ 减半。bfloat16 用不着损失缩放，所以本库没有提供；
# 用 float16 时可以这样写。

# %%
factors = torch.linspace(1e-8, 1e-7, 4)  # the gradient of the loss below


def loss_through_half(w):
    return (w.half().float() * factors).sum()  # on its way back the gradient is cast to float16


def scaled_gradient(w, scale):
    return transforms.grad(lambda w: scale * loss_through_half(w))(w) / scale


w, scale = torch.ones(4), 2.0**42
while not scaled_gradient(w, scale).isfinite().all():
    scale /= 2
print("without scaling", scaled_gradient(w, 1.0).tolist())
print(f"with 2^{torch.tensor(scale).log2():.0f}      ", scaled_gradient(w, scale).tolist())
torch.testing.assert_close(scaled_gradient(w, scale), factors, rtol=1e-3, atol=0)

# %% [markdown] lang="en"
# ## The policy of a step
#
# `Policy(torch.bfloat16)` casts the parameters and the batch *inside* the loss. The derivative of a cast is a cast
# back, so the gradient arrives in float32, where the optimizer and the parameters are: they are the master copy.
# Losses compute in float32, running statistics of norms are never cast. torch's `autocast` decides operation by
# operation instead, within a `with` block; for this net both compute the same logits.

# %% [markdown] lang="zh"
# ## 训练步的精度策略
#
# `Policy(torch.bfloat16)` 在损失函数*内部*转换参数和批次的类型。类型转换的导数就是转换回去，
# 所以梯度回来时是 float32，优化器和参数也在 float32 里：它们就是主副本。损失用 float32 计算，
# 归一化的滑动统计量从不转换。torch 的 `autocast` 则在 `with` 块内逐个操作决定类型；对这个网络，
# 两者算出的 logits 相同。

# %%
train = arrays.digits()[0]
cfg = mlp.Config((64, 64, 10))
model = mlp.spec(cfg)
params = spec.init(random.key(2), model)
images = train.images.flatten(1)


def losses(params, batch, keys=None):
    return cross_entropy(mlp.apply(params, batch[0], cfg), batch[1], reduction="none")  # (examples,), float32


by_hand = transforms.grad(lambda p: losses(tree.cast(p, torch.bfloat16), (images.bfloat16(), train.labels)).mean())
optimizer = optimizers.sgd(0.1)
step = make_step(losses, optimizer, policy=Policy(torch.bfloat16), compile=False)
after, metrics = step(start(random.key(3), params, model, optimizer), (images, train.labels))
gradient = by_hand(params)
print("gradient", gradient["layers"][0]["weight"].dtype, " parameters", after.params["layers"][0]["weight"].dtype)
torch.testing.assert_close(after.params, tree.map(lambda p, g: p - 0.1 * g, params, gradient))

first, second = params["layers"]
with torch.autocast("cpu", dtype=torch.bfloat16):
    hidden = torch.relu(torch.nn.functional.linear(images, first["weight"], first["bias"]))
    logits = torch.nn.functional.linear(hidden, second["weight"], second["bias"])
ours = mlp.apply(tree.cast(params, torch.bfloat16), images.bfloat16(), cfg)
torch.testing.assert_close(ours, logits, rtol=0, atol=0)
exact = transforms.grad(lambda p: losses(p, (images, train.labels)).mean())(params)
error = tree.norm(tree.map(torch.sub, gradient, exact)) / tree.norm(exact)
print(f"logits {logits.dtype}; relative error of the gradient {error:.2%}")

# %% [markdown] lang="en"
# ## Three trainings
#
# In float32; in mixed precision; and with everything in bfloat16, parameters included. The same batches, the same
# initial values. In the last one every update that is smaller than half a step of its weight is lost, and with a
# small learning rate that is most of them.

# %% [markdown] lang="zh"
# ## 三种训练
#
# 全部 float32；混合精度；以及连参数也用 bfloat16。批次和初始值都相同。最后一种情况下，
# 凡是小于权重最小间隔一半的更新都会丢失，学习率较小时大部分更新都是如此。

# %%
optimizer = optimizers.adam(4e-4)
variants = {
    "float32": (torch.float32, Policy()),
    "mixed: bfloat16, float32 parameters": (torch.float32, Policy(torch.bfloat16)),
    "everything in bfloat16": (torch.bfloat16, Policy(torch.bfloat16)),
}
curves = {}
for name, (dtype, policy) in variants.items():
    state = start(random.key(3), tree.cast(params, dtype), model, optimizer)
    step, curves[name] = make_step(losses, optimizer, policy=policy, compile=False), []
    for t in range(240):
        rows = batching.epoch_batch(random.key(4), t, len(images), 64)
        state, _ = step(state, (images[rows], train.labels[rows]))
        if t % 20 == 19:
            curves[name].append(losses(tree.cast(state.params, torch.float32), (images, train.labels)).mean().item())
    print(f"{name:<36} loss {curves[name][-1]:.4f}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
values = torch.logspace(-12, 8, 4000, dtype=torch.float64)
bins = values.log10().reshape(100, 40)
for (name, dtype), colour in zip(FORMATS.items(), ("black", "tab:red", "tab:blue"), strict=True):
    error = ((values.to(dtype).double() - values).abs() / values).reshape(100, 40).amax(1)
    left.semilogy(bins.mean(1).numpy(), error.clamp(max=10).numpy(), color=colour, label=name)
left.set(
    xlabel="$\\log_{10}$ of the number",
    xticks=range(-12, 9, 4),
    ylabel="relative rounding error (10: overflow)",
    ylim=(1e-9, 30),
)
left.legend(loc="lower left", bbox_to_anchor=(0.0, 0.21))
for (name, curve), style in zip(curves.items(), ("-", "--", "-"), strict=True):
    right.plot(range(20, 241, 20), curve, style, label=name)
right.set(xlabel="step", ylabel="training loss")
right.legend(fontsize=8)
plt.show()

# %% [markdown] lang="en"
# ## Where to go from here
#
# [train/README.md](../../train/README.md#the-step): the options of a step; in scripts it is `--dtype bfloat16`. Fewer
# bits still, for trained nets: [weights of 8 and 4 bits](../../core/README.md#weights-of-8-bits).

# %% [markdown] lang="zh"
# ## 接下来
#
# [train/README.md](../../train/README.md#the-step)：训练步的选项；在脚本中是 `--dtype bfloat16`。
# 对训练好的网络还可以用更少的位数：[8 位与 4 位权重](../../core/README.md#weights-of-8-bits)。
