# %% [markdown] lang="en"
# # Layers as pairs of functions
#
# In `torch.nn` a layer is an object which holds its parameters, computes, and keeps notes of what it has seen. Here
# it is two functions: one *declares* the parameters, the other *computes* with them. Whatever changes is an argument,
# so that gradients, ensembles and copies need nothing special. We write a layer, a block and a net in this way,
# compare each with `torch.nn`, look at batch norm, whose running statistics are the hard case, and train sixteen nets
# as one.
#
# You need to know what a linear layer and a gradient are. A *key* is a tensor from which random numbers are computed:
# the same key, the same numbers.

# %% [markdown] lang="zh"
# # 层是一对函数
#
# 在 `torch.nn` 中，层是一个对象：它保存参数、进行计算，还记录见过的数据。在这里，层是两个函数：一个*声明*参数，
# 一个用参数*计算*。会变的东西都是函数的参数，因此求梯度、做集成、复制模型都不需要特殊处理。本文用这种方式写一个层、
# 一个块和一个网络，逐一与 `torch.nn` 对照，再看最麻烦的批归一化（它有滑动统计量），最后把十六个网络当作一个来训练。
#
# 读者需要知道什么是线性层和梯度。*key* 是用来计算随机数的张量：相同的 key 得到相同的随机数。

# %%
import matplotlib.pyplot as plt
import torch
from torch import nn

from core import initializers, random, spec, stats, transforms, tree
from core.layers import batch_norm, batch_norm_spec, layer_norm, layer_norm_spec, linear, linear_spec
from core.spec import Param
from train import optimizers
from train.step import create, make_step

# %% [markdown] lang="en"
# ## One layer
#
# `linear_spec` returns a *spec*: a dict with a `Param` (shape and initialiser) for each parameter. No numbers exist
# yet, so parameters can be counted before any memory is used. `spec.init` draws the values. `linear` is
# $y = x W^\top + b$, with the weight in the layout of `torch.nn.Linear`, (out, in).

# %% [markdown] lang="zh"
# ## 一个层
#
# `linear_spec` 返回一个 *spec*：一个字典，每个参数对应一个 `Param`（形状和初始化方法）。这时还没有任何数值，
# 所以不占内存就能统计参数个数。`spec.init` 抽取初始值。`linear` 就是 $y = x W^\top + b$，
# 权重的布局与 `torch.nn.Linear` 相同，即 (out, in)。

# %%
layer = linear_spec(4, 3)
print(layer["weight"])
print(tree.count(layer), "numbers, none of them allocated")

p = spec.init(random.key(0), layer)
x = random.normal(random.key(1), (5, 4))
module = nn.Linear(4, 3)
module.load_state_dict(p)
torch.testing.assert_close(linear(p, x), module(x))
print("x", tuple(x.shape), "-> y", tuple(linear(p, x).shape))

# %% [markdown] lang="en"
# ## Your own layer and block
#
# A layer with parameters of its own needs the same two functions. Ours multiplies by a learned number per channel (as
# ConvNeXt's layer scale). A block is made of layers as a dict is made of dicts; a net is a list of blocks. The
# residual block computes
#
# $$x + \gamma \odot \left( W_2 \, \mathrm{relu}(W_1 \, \mathrm{norm}(x)) \right)$$

# %% [markdown] lang="zh"
# ## 自己写层和块
#
# 带参数的自定义层也只需要这两个函数。我们的层给每个通道乘上一个可学习的数（类似 ConvNeXt 的 layer scale）。
# 块由层组成，正如字典由字典组成；网络就是块的列表。这个残差块计算
#
# $$x + \gamma \odot \left( W_2 \, \mathrm{relu}(W_1 \, \mathrm{norm}(x)) \right)$$

# %%


def scale_spec(width):
    return {"gamma": Param((width,), initializers.constant(0.1))}


def scale(p, x):
    return p["gamma"] * x  # (..., width)


def block_spec(width):
    w1, w2 = linear_spec(width, 4 * width), linear_spec(4 * width, width)
    return {"norm": layer_norm_spec(width), "scale": scale_spec(width), "w1": w1, "w2": w2}


def block(p, x):
    hidden = torch.relu(linear(p["w1"], layer_norm(p["norm"], x)))  # (..., 4 width)
    return x + scale(p["scale"], linear(p["w2"], hidden))  # (..., width)


def net_spec(blocks):
    return {"blocks": [block_spec(8) for _ in range(blocks)], "in": linear_spec(1, 8), "out": linear_spec(8, 1)}


def net(params, x):
    x = linear(params["in"], x)  # (..., 1) -> (..., 8)
    for p in params["blocks"]:
        x = block(p, x)
    return linear(params["out"], x)  # (..., 1)


params = spec.init(random.key(2), net_spec(2))
print(tree.table(params))

# %% [markdown] lang="en"
# ## The same as a module
#
# The module has the same names if its attributes are named so, and a `state_dict` is a tree whose names are already
# joined: `tree.nest` and `tree.flatten` go from one to the other, and `spec.check` names the first parameter that
# does not fit. Outputs and gradients are equal. In our form the gradient is a value, a tree like the parameters;
# nothing is stored in them.

# %% [markdown] lang="zh"
# ## 写成 Module
#
# 只要属性名一致，Module 的参数名就相同。`state_dict` 是一棵已经把路径连成名字的树：
# `tree.nest` 与 `tree.flatten` 在两者之间转换，`spec.check` 会指出第一个不匹配的参数。两边的输出和梯度相等。
# 在我们的写法里梯度是一个返回值，是与参数结构相同的树，不会存进参数里。

# %%


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.scale = nn.LayerNorm(width), nn.ParameterDict({"gamma": torch.full((width,), 0.1)})
        self.w1, self.w2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.scale["gamma"] * self.w2(torch.relu(self.w1(self.norm(x))))


parts = {"blocks": nn.Sequential(Block(8), Block(8)), "in": nn.Linear(1, 8), "out": nn.Linear(8, 1)}
module = nn.ModuleDict(parts)
module.load_state_dict(tree.flatten(params))
spec.check(net_spec(2), tree.nest(dict(module.state_dict())))

x = random.normal(random.key(3), (16, 1))
output = parts["out"](parts["blocks"](parts["in"](x)))
torch.testing.assert_close(net(params, x), output)
output.square().mean().backward()
gradient = transforms.grad(lambda p: net(p, x).square().mean())(params)
torch.testing.assert_close(tree.flatten(gradient), {name: q.grad for name, q in module.named_parameters()})

for wrong in (net_spec(3), net_spec(1)):
    try:
        spec.check(wrong, params)
    except ValueError as error:
        print("ValueError:", error)

# %% [markdown] lang="en"
# ## Initial values by name
#
# A global generator hands out its numbers in order: with a third layer before them, the others begin differently, and
# an experiment about the third layer compares two things at once. Here each leaf draws from the key folded with its
# own name, so a new layer changes no other.

# %% [markdown] lang="zh"
# ## 初始值由名字决定
#
# 全局生成器按顺序给出随机数：前面多加一层，后面各层的初始值就全变了，于是想研究这一层的实验实际上同时比较了两件事。
# 这里每个叶子先用 `fold_in` 把自己的名字并入 key，再用得到的 key 抽取，所以新增的层不会影响其他层。

# %%


def head_of(layers):  # of a net of torch.nn, after the layers before it
    torch.manual_seed(0)
    return [nn.Linear(8, 8) for _ in range(layers)], nn.Linear(8, 1).weight


print("torch.nn, head unchanged by one more layer:", torch.equal(head_of(1)[1], head_of(2)[1]))
small, large = (spec.init(random.key(2), net_spec(n)) for n in (2, 3))
print("functree, head unchanged by one more block:", torch.equal(small["out"]["weight"], large["out"]["weight"]))
torch.testing.assert_close(small["blocks"], large["blocks"][:2], rtol=0, atol=0)

# %% [markdown] lang="en"
# ## Batch norm: what a layer remembers
#
# In training, batch norm normalises with the mean and variance of the batch and also updates running ones, for use
# afterwards. `torch.nn` overwrites a buffer during the forward pass. Here these are leaves of the kind `Stat`, and a
# pure function cannot overwrite them: instead their *increments* come out of the backward pass, in the place where
# the gradient by these leaves would be. `stats.update` adds them. `make_step` does both for you.
#
# So split the Stats off before training (`spec.split`): their entry is an increment, not a derivative.

# %% [markdown] lang="zh"
# ## 批归一化：层的记忆
#
# 训练时，批归一化用当前批次的均值和方差做归一化，同时更新滑动均值和方差，供以后使用。
# `torch.nn` 在前向计算时改写缓冲区。在这里它们是 `Stat` 类型的叶子，纯函数不能改写：它们的*增量*随反向传播返回，
# 就放在对这些叶子的梯度的位置上，再由 `stats.update` 加上去。`make_step` 会替您完成这两步。
#
# 因此训练前要用 `spec.split` 把 Stat 分出来：它们对应的值是增量，不是导数。

# %%
model, reference = {"norm": batch_norm_spec(4)}, nn.BatchNorm1d(4)
learned, running = spec.split(model, spec.init(random.key(4), model))


def loss(learned, running, x):
    return batch_norm(tree.merge(learned, running)["norm"], x, train=True).square().mean()


for key in random.split(random.key(5), 3):
    batch = 2 + 3 * random.normal(key, (32, 4))
    reference(batch)
    _, increments = transforms.grad(loss, argnums=(0, 1))(learned, running, batch)
    running = stats.update(running, increments)
torch.testing.assert_close(running["norm"]["mean"], reference.running_mean)
torch.testing.assert_close(running["norm"]["var"], reference.running_var)
reference.eval()
torch.testing.assert_close(batch_norm(tree.merge(learned, running)["norm"], batch, train=False), reference(batch))
print({name: leaf.tolist() for name, leaf in running["norm"].items()})

# %% [markdown] lang="en"
# ## Sixteen nets as one
#
# The state of a training is a tree made by a function of a key. `vmap` of this function over sixteen keys gives a
# tree with sixteen of everything, and `vmap` of the step trains them all at once: no loop, no list of models. Each
# learns $\sin 2x$ from the same 40 points; a member is the net that it would have become alone. Where there are
# points the members agree, elsewhere they do not, and this spread is an estimate of what they cannot know.

# %% [markdown] lang="zh"
# ## 十六个网络合而为一
#
# 训练状态是一棵树，由一个以 key 为参数的函数创建。对这个函数在十六个 key 上做 `vmap`，
# 就得到一棵每个张量都有十六份的树；对训练步做 `vmap`，就能同时训练它们：不用循环，也不用模型列表。
# 每个网络都从同样的 40 个点学习 $\sin 2x$，与单独训练的结果相同。有数据的地方各成员一致，没有数据的地方则不一致，
# 这种分散程度可以用来估计哪些地方它们并不知道。

# %%
points = random.uniform(random.key(6), (40, 1), minval=-3.0, maxval=1.0)
targets = torch.sin(2 * points) + 0.1 * random.normal(random.key(7), (40, 1))


def losses(params, batch, keys):
    return (net(params, batch[0]) - batch[1]).square()[:, 0]  # (examples,)


optimizer = optimizers.adam(1e-2)
step = make_step(losses, optimizer, compile=False)
keys = random.split(random.key(8), 16)
states = torch.vmap(lambda key: create(key, net_spec(2), optimizer))(keys)
together = torch.vmap(step, in_dims=(0, None))
alone = create(keys[3], net_spec(2), optimizer)
for t in range(150):
    states, metrics = together(states, (points, targets))
    if t < 5:
        alone, metrics_alone = step(alone, (points, targets))
        torch.testing.assert_close(metrics["loss"][3], metrics_alone["loss"])
print("weights of the head", tuple(states.params["out"]["weight"].shape), " losses", metrics["loss"].tolist()[:4])

line = torch.linspace(-4, 4, 200)[:, None]
curves = torch.vmap(net, in_dims=(0, None))(states.params, line)[..., 0]  # (16, 200)

# %%
figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
axis.plot(line[:, 0].numpy(), curves.T.numpy(), color="tab:blue", alpha=0.4, linewidth=1)
axis.plot([], [], color="tab:blue", label="16 nets")
axis.plot(line[:, 0].numpy(), curves.mean(0).numpy(), color="black", label="their mean")
axis.plot(points[:, 0].numpy(), targets[:, 0].numpy(), ".", color="tab:red", label="examples")
axis.set(xlabel="x", ylabel="prediction", ylim=(-3, 3))
axis.legend(loc="upper center")
plt.show()

# %% [markdown] lang="en"
# ## Where to go from here
#
# [core/README.md](../../core/README.md#layers-are-pairs-of-functions): all layers;
# [core/COMING_FROM.md](../../core/COMING_FROM.md): a table from `nn.Module` to this form, and `lift`, which takes a
# module as it is. [nets/README.md](../../nets/README.md#how-to-write-a-net): a whole net. `experiments/ensemble.py`
# trains ensembles of classifiers.

# %% [markdown] lang="zh"
# ## 接下来
#
# [core/README.md](../../core/README.md#layers-are-pairs-of-functions)：所有的层；
# [core/COMING_FROM.md](../../core/COMING_FROM.md)：从 `nn.Module` 到这种写法的对照表，
# 以及直接使用现有 Module 的 `lift`。[nets/README.md](../../nets/README.md#how-to-write-a-net)：一个完整的网络。
# `experiments/ensemble.py` 训练分类器的集成。
