# %% [markdown] lang="en"
# # From a paper to a net
#
# We take a paper, MLP-Mixer (Tolstikhin et al. 2021, arXiv:2105.01601), and make a net of this library of it: the
# equations become a **spec**, which declares the parameters, and an **apply**, which computes. Then we hold it to the
# laws that every net here keeps, compare it with an `nn.Module`, train it on digits, and say where its file goes.
#
# You need to know what an MLP and a layer norm are, and a little PyTorch.

# %% [markdown] lang="zh"
# # 从论文到网络
#
# 我们拿一篇论文 MLP-Mixer（Tolstikhin et al. 2021, arXiv:2105.01601），把它写成本库的一个网络：
# 公式变成 **spec**（声明参数）和 **apply**（进行计算）。然后用本库所有网络都遵守的定律检验它，与一个 `nn.Module` 比较，
# 用数字图像训练它，最后说明文件该放在哪里。
#
# 读者需要知道什么是 MLP 和层归一化，并了解一点 PyTorch。

# %%
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import gelu

from core import per_example, random, spec, tree
from core.layers import layer_norm, layer_norm_spec, linear, linear_spec
from nets.weights import Rename, fill
from train import optimizers
from train.losses import cross_entropy
from train.metrics.classification import accuracy
from train.optimizers import schedules
from train.step import create, make_step

# %% [markdown] lang="en"
# ## The paper's equations
#
# An image is cut into $S$ patches that do not overlap, and each is mapped to $C$ channels: a table $X$ of $S$ rows. A
# block mixes first along the columns, over the places, then along the rows, over the channels:
#
# $$U_{*,i} = X_{*,i} + W_2\, \sigma(W_1\, \mathrm{LayerNorm}(X)_{*,i})$$
#
# $$Y_{j,*} = U_{j,*} + W_4\, \sigma(W_3\, \mathrm{LayerNorm}(U)_{j,*})$$
#
# with $\sigma$ the GELU. Each matrix is the same for all columns, or all rows. After the last block come a layer norm,
# the mean over the places, and a linear layer. There is no attention, and the only convolution is the cut into patches.

# %% [markdown] lang="zh"
# ## 论文里的公式
#
# 图像被切成 $S$ 个互不重叠的小块，每块映射为 $C$ 个通道，得到一张 $S$ 行的表 $X$。每个模块先沿列混合（跨位置），
# 再沿行混合（跨通道）：
#
# $$U_{*,i} = X_{*,i} + W_2\, \sigma(W_1\, \mathrm{LayerNorm}(X)_{*,i})$$
#
# $$Y_{j,*} = U_{j,*} + W_4\, \sigma(W_3\, \mathrm{LayerNorm}(U)_{j,*})$$
#
# 其中 $\sigma$ 是 GELU。所有列共用同样的矩阵，所有行也是如此。最后一个模块之后是层归一化、对位置取平均，
# 再接一个线性层。没有注意力，唯一的卷积就是切块。

# %% [markdown] lang="en"
# ## Sizes, spec, apply
#
# Sizes go into a frozen dataclass, with the paper's under `PRESETS`. The spec is a dict with sorted keys; `layer_spec`
# and `layer` come in pairs. In `apply` the equation stands beside the line that computes it, and the new shape after
# each line that changes one.

# %% [markdown] lang="zh"
# ## 尺寸、spec、apply
#
# 各种尺寸放进一个不可变的 dataclass，论文里的尺寸放进 `PRESETS`。spec 是键按字母排序的字典；每种层都是一对函数，
# 形如 `layer_spec` 和 `layer`。在 `apply` 里，公式写在计算它的那一行旁边，改变形状的每一行后面注明新的形状。


# %%
@dataclass(frozen=True)
class Config:
    size: int = 8  # pixels per side
    patch: int = 2
    channels: int = 1
    width: int = 32  # C
    layers: int = 2
    hidden_tokens: int = 32  # units between W_1 and W_2
    hidden_channels: int = 64  # units between W_3 and W_4
    classes: int = 10

    def __post_init__(self):
        if self.size % self.patch:
            raise ValueError(f"mixer: patches of {self.patch} do not divide images of {self.size} pixels")


PRESETS = {"digits": Config(), "mixer_b_16": Config(224, 16, 3, 768, 12, 384, 3072, 1000)}


def mlp_spec(width, hidden):
    return {"down": linear_spec(hidden, width), "up": linear_spec(width, hidden)}


def mlp(p, x):
    return linear(p["down"], gelu(linear(p["up"], x)))  # W_2 σ(W_1 x)


def mixer_spec(cfg):
    places = (cfg.size // cfg.patch) ** 2
    block = {
        "channels": mlp_spec(cfg.width, cfg.hidden_channels),
        "norm1": layer_norm_spec(cfg.width),
        "norm2": layer_norm_spec(cfg.width),
        "tokens": mlp_spec(places, cfg.hidden_tokens),
    }
    return {
        "blocks": [block] * cfg.layers,
        "head": linear_spec(cfg.width, cfg.classes),
        "norm": layer_norm_spec(cfg.width),
        "patches": linear_spec(cfg.channels * cfg.patch**2, cfg.width),
    }


def apply(params, x, cfg, *, key=None, train=False):
    """Logits of images. x: (batch, channels, size, size) -> (batch, classes). No key is needed."""
    x = nn.functional.unfold(x, cfg.patch, stride=cfg.patch)  # (batch, channels * patch * patch, S)
    x = linear(params["patches"], x.mT)  # (batch, S, C)
    for p in params["blocks"]:
        x = x + mlp(p["tokens"], layer_norm(p["norm1"], x).mT).mT  # U = X + W_2 σ(W_1 LayerNorm(X)), by columns
        x = x + mlp(p["channels"], layer_norm(p["norm2"], x))  # Y = U + W_4 σ(W_3 LayerNorm(U)), by rows
    return linear(params["head"], layer_norm(params["norm"], x).mean(1))  # (batch, classes)


# %% [markdown] lang="en"
# The spec alone gives the table and the count, and nothing is allocated. The published B/16 has 59.9 million parameters
# on its model card.

# %% [markdown] lang="zh"
# 只凭 spec 就能得到参数表和参数量，不分配任何内存。公开发布的 B/16 在模型卡上写明有 5990 万个参数。

# %%
cfg = PRESETS["digits"]
model = mixer_spec(cfg)
count = tree.count(mixer_spec(PRESETS["mixer_b_16"]))
print(tree.table(model), f"\n\nB/16: {count:,} parameters")
assert round(count / 1e6, 1) == 59.9

# %% [markdown] lang="en"
# ## The same numbers as someone else's
#
# A net that trains is not yet the paper's net. The test for that is an implementation of another form: here modules of
# torch.nn. A **rename table** maps our names to theirs; `fill` takes every tensor of theirs once and checks its shape.
# Published files are read in the same way, by a table for their names.

# %% [markdown] lang="zh"
# ## 与别的实现得到相同的数
#
# 能训练的网络未必就是论文里的网络。要检验这一点，得有一个写法不同的实现：这里用 torch.nn 的模块。
# **改名表**把我们的名字对应到对方的名字；`fill` 把对方的每个张量恰好用一次，并检查形状。读取公开的权重文件也是这样，
# 只要有一张对应其名字的表。


# %%
class Block(nn.Module):
    def __init__(self, places, cfg):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(cfg.width), nn.LayerNorm(cfg.width)
        self.mlp_tokens = nn.Sequential(nn.Linear(places, 32), nn.GELU(), nn.Linear(32, places))
        self.mlp_channels = nn.Sequential(nn.Linear(cfg.width, 64), nn.GELU(), nn.Linear(64, cfg.width))

    def forward(self, x):
        x = x + self.mlp_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.mlp_channels(self.norm2(x))


class Mixer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.stem = nn.Conv2d(1, cfg.width, 2, stride=2)  # patches by a convolution
        self.blocks = nn.Sequential(*(Block(16, cfg) for _ in range(cfg.layers)))
        self.norm, self.head = nn.LayerNorm(cfg.width), nn.Linear(cfg.width, cfg.classes)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(1))


ours_to_theirs = {"up": "0", "down": "2", "tokens": "mlp_tokens", "channels": "mlp_channels", "patches": "stem"}
table = {
    name: Rename(".".join(ours_to_theirs.get(part, part) for part in name.split("."))) for name in tree.names(model)
}
module = Mixer(cfg)
random_state = {  # values for all tensors, drawn from keys
    name: 0.3 * random.normal(random.fold_in(random.key(0), i), tuple(leaf.shape))
    for i, (name, leaf) in enumerate(module.state_dict().items())
}
module.load_state_dict(random_state)
file = {**random_state, "stem.weight": random_state["stem.weight"].flatten(1)}  # a convolution's weight as a matrix
params = fill(model, file, table)

x = random.uniform(random.key(1), (4, 1, 8, 8))
print("largest difference:", float((apply(params, x, cfg) - module(x).detach()).abs().max()))
torch.testing.assert_close(apply(params, x, cfg), module(x).detach(), rtol=1e-4, atol=1e-4)

# %% [markdown] lang="en"
# ## The laws
#
# What every net must do is tested once, for all nets. Short versions of these tests, in double precision:
#
# 1. **Pure**: two calls agree to the bit, no input is changed, and torch's global generator is not used.
# 2. **Batch**: each example alone gives what it gives in a batch.
# 3. **Gradient**: every parameter has one, or it is known why not.
# 4. **vmap**: an ensemble gives what its members give.
# 5. **Per example**: the gradients of the examples add up to the gradient of the batch, and `reports` has their norms.
# 6. **Compile**: one graph, the same numbers. `aot_eager` traces as the real compiler does, without generating code.

# %% [markdown] lang="zh"
# ## 定律
#
# 每个网络都必须做到的事，由同一套测试检验所有网络。下面是这些测试的简短版本，用双精度：
#
# 1. **纯函数**：两次调用逐位相同，输入不被修改，也不使用 torch 的全局随机数生成器。
# 2. **批次**：一个样本单独计算与放在一批里计算，结果相同。
# 3. **梯度**：每个参数都有梯度，没有的要知道原因。
# 4. **vmap**：集成给出的就是各成员给出的。
# 5. **逐样本**：各样本的梯度相加等于整批的梯度，`reports` 给出它们的长度。
# 6. **编译**：只有一个计算图，数值相同。`aot_eager` 像真正的编译器那样追踪，但不生成代码。

# %%
params = spec.init(random.key(2), model, torch.float64)
x = random.normal(random.key(3), (4, 1, 8, 8), torch.float64)
y = torch.tensor([3, 1, 4, 1])


def losses(params, batch, keys=None):
    return cross_entropy(apply(params, batch[0], cfg, train=True), batch[1], reduction="none")  # (examples,)


def loss(params, batch):
    return losses(params, batch).mean()


# 1 pure
before, generator = tree.map(torch.clone, params), torch.get_rng_state()
out = apply(params, x, cfg)
assert torch.equal(out, apply(params, x, cfg)) and torch.equal(generator, torch.get_rng_state())
torch.testing.assert_close(params, before, rtol=0, atol=0)

# 2 batch
torch.testing.assert_close(torch.cat([apply(params, x[i : i + 1], cfg) for i in range(4)]), out)

# 3 gradient
gradient = torch.func.grad(loss)(params, (x, y))
without = [name for name, g in tree.items(gradient) if not g.abs().max() > 1e-12]
print("parameters without a gradient:", without)

# %% [markdown] lang="en"
# The third law found something. The bias after $W_2$ adds the same number to all channels of a place, and every layer
# norm after it takes the mean over the channels away again. So these biases can never matter, in the paper's net too.
# The registry of the tests has such leaves by name (`zero=`), so that any other one is an error.

# %% [markdown] lang="zh"
# 第三条定律发现了一件事。$W_2$ 之后的偏置给一个位置的所有通道加上同一个数，而后面的每个层归一化都会减去通道的均值。
# 所以这些偏置永远不起作用，论文的网络也是如此。测试的登记表按名字列出这样的叶子（`zero=`），
# 除此之外再有没有梯度的参数，就是错误。

# %%
assert without == [f"blocks.{i}.tokens.down.bias" for i in range(cfg.layers)]

# 4 vmap
keys = random.split(random.key(4), 3)
members = torch.vmap(lambda key: spec.init(key, model, torch.float64))(keys)
together = torch.vmap(lambda p: apply(p, x, cfg))(members)  # (3, 4, 10)
for member, logits in zip(tree.unstack(members), together, strict=True):
    torch.testing.assert_close(apply(member, x, cfg), logits)

# 5 per example
one = torch.func.grad(lambda p, x, y: loss(p, (x[None], y[None])))
each = torch.vmap(one, (None, 0, 0))(params, x, y)  # leaves (4, ...)
torch.testing.assert_close(tree.map(lambda g: g.mean(0), each), gradient)
norms = torch.stack([tree.norm(g) for g in tree.unstack(each)])
torch.testing.assert_close(per_example.reports(losses, params, (x, y)).total_norm, norms)

# 6 compile
compiled = torch.compile(torch.func.grad(loss), backend="aot_eager", fullgraph=True, dynamic=False)
torch.testing.assert_close(compiled(params, (x, y)), gradient)
print("all laws hold")

# %% [markdown] lang="en"
# ## Digits
#
# 1400 digits to learn from, 397 for the test.

# %% [markdown] lang="zh"
# ## 手写数字
#
# 1400 个数字用来学习，397 个用来测试。

# %%
digits = load_digits()
images = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)  # (1797, 1, 8, 8)
labels = torch.tensor(digits.target)
optimizer = optimizers.adamw(schedules.cosine(1e-2, steps=120))
step = make_step(losses, optimizer, compile=False)
state, curve = create(random.key(5), model, optimizer), []
for epoch in range(6):
    order = random.permutation(random.fold_in(random.key(6), epoch), 1400)
    for rows in order.split(70):
        state, metrics = step(state, (images[rows], labels[rows]))
    curve.append(float(accuracy(apply(state.params, images[1400:], cfg), labels[1400:])))
    print(f"epoch {epoch + 1}: loss {metrics['loss']:.3f}, {curve[-1]:.1%} of the test digits")

# %% [markdown] lang="en"
# What does mixing over places look like? Each hidden unit of the first $W_1$ has a weight for each of the 4x4 patches.
# The paper draws these for its large nets.

# %% [markdown] lang="zh"
# 跨位置的混合是什么样子？第一个 $W_1$ 的每个隐藏单元对 4x4 个小块各有一个权重。论文为它的大网络画出了这些权重。

# %%
weights = state.params["blocks"][0]["tokens"]["up"]["weight"].reshape(-1, 4, 4)  # (32, 4, 4)
strongest = weights.flatten(1).norm(dim=1).argsort(descending=True)[:16]
bound = float(weights.abs().max())
figure, axes = plt.subplots(2, 8, figsize=(8, 2.4), layout="constrained")
for axis, i in zip(axes.flat, strongest.tolist(), strict=True):
    drawn_weights = axis.imshow(weights[i].numpy(), cmap="RdBu", vmin=-bound, vmax=bound)
    axis.set_xticks([])
    axis.set_yticks([])
figure.colorbar(drawn_weights, ax=axes, label="weight")
figure.suptitle("weights of 16 hidden units over the 4x4 patches", fontsize=11)
plt.show()

# %% [markdown] lang="en"
# ## Where it goes
#
# In the library this is a file `nets/classifiers/mixer.py` with `Config`, `PRESETS`, `spec`, `apply`, `rename_table`
# and `from_pretrained`; a line in `tests/registry/classifiers.py`, which alone holds it to all laws,
#
# ```py
# net("mixer", mixer, mixer.Config(), images(1, 8), zero=("blocks.*.tokens.down.bias",))
# ```
#
# and a line in `tests/registry/classifier_references.py` for the comparison with the modules. The steps are in
# [nets/README.md](../../nets/README.md#how-to-write-a-net), the rules for taking part in
# [CONTRIBUTING.md](../../CONTRIBUTING.md), and the parts to build from in [core/README.md](../../core/README.md).

# %% [markdown] lang="zh"
# ## 文件放在哪里
#
# 在本库里，它是文件 `nets/classifiers/mixer.py`，内有 `Config`、`PRESETS`、`spec`、`apply`、
# `rename_table` 和 `from_pretrained`；再在 `tests/registry/classifiers.py` 里加一行，仅凭这一行就要接受所有定律的检验：
#
# ```py
# net("mixer", mixer, mixer.Config(), images(1, 8), zero=("blocks.*.tokens.down.bias",))
# ```
#
# 与模块的比较则是 `tests/registry/classifier_references.py` 里的一行。
# 详细步骤见 [nets/README.md](../../nets/README.md#how-to-write-a-net)，
# 参与贡献的规则见 [CONTRIBUTING.md](../../CONTRIBUTING.md)，可用的零件见 [core/README.md](../../core/README.md)。
