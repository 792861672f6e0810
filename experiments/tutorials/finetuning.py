# %% [markdown] lang="en"
# # Fine-tuning: a net that learns a second task from few examples
#
# A net that knows one task is a better start for the next than random weights, above all where examples are few. Here a
# small convolutional net learns the digits 0 to 4. Then it learns 5 to 9 from 1 to 16 examples of each, in four ways:
# from scratch, its last layer alone, all of its weights, and adapters of low rank (LoRA).
#
# You need to know what a convolutional net and a training step are, and a little PyTorch.

# %% [markdown] lang="zh"
# # 微调：用很少的样本学会第二个任务
#
# 学过一个任务的网络，比随机初始化更适合作为下一个任务的起点，样本少的时候尤其如此。
# 本文先让一个小卷积网络学会数字 0 到 4，再用每类 1 到 16 个样本学习数字 5 到 9，比较四种做法：从零训练、
# 只训练最后一层、训练全部权重、训练低秩适配器（LoRA）。
#
# 读者需要知道什么是卷积网络、什么是一步训练，并了解一点 PyTorch。

# %%
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from core import lora, random, spec, tree
from nets.classifiers import lenet
from train import optimizers
from train.losses import cross_entropy
from train.metrics.classification import accuracy
from train.step import create, make_step

# %% [markdown] lang="en"
# ## Two tasks
#
# scikit-learn has 1797 digits of 8x8 pixels. We put each at a random place of a canvas of 12x12, so that there is
# something to learn that both tasks share: a digit is the same digit wherever it stands.

# %% [markdown] lang="zh"
# ## 两个任务
#
# scikit-learn 自带 1797 个 8x8 像素的手写数字。我们把每个数字放到 12x12 画布上的随机位置，
# 这样两个任务就有了共同的东西可学：数字换了位置，还是同一个数字。

# %%
SIZE = 12


def place(images, key):
    """Each image at a random place of a canvas. images: (n, 8, 8) -> (n, 1, SIZE, SIZE)."""
    canvas = torch.zeros(len(images), 1, SIZE, SIZE)
    corners = random.randint(key, (len(images), 2), 0, SIZE - 8 + 1)
    for i, (top, left) in enumerate(corners.tolist()):
        canvas[i, 0, top : top + 8, left : left + 8] = images[i]
    return canvas


digits = load_digits()
images = torch.tensor(digits.images / 16, dtype=torch.float32)  # (1797, 8, 8)
labels = torch.tensor(digits.target)  # (1797,)
first = labels < 5
old_x = place(images[first].repeat(3, 1, 1), random.key(0))  # each three times, at three places
old_y = labels[first].repeat(3)
new_x, new_y = place(images[~first], random.key(1)), labels[~first] - 5  # classes 0 to 4 again
print("digits 0 to 4:", tuple(old_x.shape), "  digits 5 to 9:", tuple(new_x.shape))

# %% [markdown] lang="en"
# ## The first task
#
# A LeNet: two convolutions with pooling, a hidden layer, and a linear layer for the classes, the **head**. Its
# parameters are a dict of tensors.

# %% [markdown] lang="zh"
# ## 第一个任务
#
# 网络是一个 LeNet：两层带池化的卷积、一个隐藏层，最后是输出各类别的线性层，称为 **head**（分类头）。
# 参数是由张量组成的字典。

# %%
cfg = lenet.Config((8, 16), (64,), size=SIZE, kernel=3, padding=(1, 1), activation="relu", pool="max", classes=5)
model = lenet.spec(cfg)
print(tree.table(model))


def losses(params, batch, keys=None):
    x, y = batch
    return cross_entropy(lenet.apply(params, x, cfg), y, reduction="none")  # (examples,)


optimizer = optimizers.adam(1e-2)
step = make_step(losses, optimizer, compile=False)
state = create(random.key(2), model, optimizer)
order = random.permutation(random.key(3), len(old_x))
for rows in order.split(64) * 3:  # three epochs
    state, metrics = step(state, (old_x[rows], old_y[rows]))
old = state.params
print("loss:", float(metrics["loss"]))

# %% [markdown] lang="en"
# ## Freezing: the head alone
#
# A frozen weight is a constant of the loss, and no more than that. `tree.partition` cuts the parameters in two, and the
# gradient is taken with respect to one half; none is computed for the other. The old head knows other classes, so a new
# one is drawn.

# %% [markdown] lang="zh"
# ## 冻结：只训练分类头
#
# 冻结一个权重，只不过是把它当作损失函数里的常数。`tree.partition` 把参数分成两半，只对其中一半求梯度，另一半不求梯度。
# 旧的分类头对应的是别的类别，所以重新初始化一个。


# %%
def is_head(name, leaf):
    return name.startswith("head")


_, body = tree.partition(old, is_head)
fresh = spec.init(random.key(4), model)
head, _ = tree.partition(fresh, is_head)
print("trained:", tree.names(head))
print("frozen: ", tree.names(body))


def train(loss, values, batch, learning_rate=8e-3, steps=20):
    """Values after some steps of Adam on a single batch; a function without side effects."""
    optimizer = optimizers.adam(learning_rate)
    state = optimizer.init(values)
    for _ in range(steps):
        gradient = torch.func.grad(loss)(values, batch)
        updates, state = optimizer.update(gradient, state, values)
        values = optimizers.apply_updates(values, updates)
    return values


few = (new_x[:40], new_y[:40])
tuned = train(lambda head, batch: losses(tree.merge(head, body), batch).mean(), head, few)

# %% [markdown] lang="en"
# The same in plain PyTorch: modules with `requires_grad_(False)`, and torch's Adam for what remains. Both heads agree.

# %% [markdown] lang="zh"
# 用普通的 PyTorch 再做一遍：对模块调用 `requires_grad_(False)`，其余参数交给 torch 的 Adam。两边得到的分类头一致。

# %%
module = nn.Sequential(
    *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
    *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
    *(nn.Flatten(), nn.Linear(16 * (SIZE // 4) ** 2, 64), nn.ReLU(), nn.Linear(64, 5)),
)
ours = [*old["convs"], *old["hidden"], head["head"]]
layers = [layer for layer in module if hasattr(layer, "weight")]
for layer, p in zip(layers, ours, strict=True):
    layer.load_state_dict(p)
module.requires_grad_(False)
layers[-1].requires_grad_(True)

adam = torch.optim.Adam(layers[-1].parameters(), lr=8e-3)
for _ in range(20):
    adam.zero_grad()
    nn.functional.cross_entropy(module(few[0]), few[1]).backward()
    adam.step()
print("largest difference:", float((layers[-1].weight.detach() - tuned["head"]["weight"]).abs().max()))
torch.testing.assert_close(tuned["head"], dict(layers[-1].state_dict()), rtol=1e-4, atol=1e-5)

# %% [markdown] lang="en"
# ## LoRA: adapters of low rank
#
# Between one layer and all of them lies a third way (Hu et al. 2022, arXiv:2106.09685). Each weight $W$ stays as it is
# and gets a sum of low rank,
#
# $$W'_{m \times n} = W_{m \times n} + s\, B_{m \times r}\, A_{r \times n}$$
#
# with $r$ far below $m$ and $n$. Only $A$ and $B$ are trained: $r (m + n)$ numbers where $W$ has $m n$. $B$ starts at
# 0, so at first the net is the old one. Here a convolution's weight counts as the matrix of its rows.

# %% [markdown] lang="zh"
# ## LoRA：低秩适配器
#
# 在“只训练一层”和“训练所有层”之间还有第三条路（Hu et al. 2022, arXiv:2106.09685）。每个权重 $W$ 保持不变，
# 再加上一个低秩项：
#
# $$W'_{m \times n} = W_{m \times n} + s\, B_{m \times r}\, A_{r \times n}$$
#
# 其中 $r$ 远小于 $m$ 和 $n$。只训练 $A$ 和 $B$：$W$ 有 $m n$ 个数，它们只有 $r (m + n)$ 个。$B$ 的初值为 0，
# 所以一开始网络与原来的相同。这里卷积的权重按行看作一个矩阵。

# %%
RANK, SCALE = 4, lora.scale(4, alpha=8)  # s = alpha / rank
adapters = lora.init(random.key(5), lora.spec(model, ["convs.1.weight", "hidden.0.weight"], RANK), old)
print(tree.table(adapters))
x = new_x[:100]
before = lenet.apply(old, x, cfg)
torch.testing.assert_close(lenet.apply(lora.adapted(old, adapters, SCALE), x, cfg), before)

# After training, the sum is formed once, and the net is an ordinary one again.
moved = tree.map(lambda leaf: leaf + 0.02, adapters)
merged = lora.merge(old, moved, SCALE)
by_hand = old["hidden"][0]["weight"] + SCALE * moved["hidden"][0]["weight"]["b"] @ moved["hidden"][0]["weight"]["a"]
torch.testing.assert_close(merged["hidden"][0]["weight"], by_hand)
after = lenet.apply(merged, x, cfg)
torch.testing.assert_close(lenet.apply(lora.adapted(old, moved, SCALE), x, cfg), after, rtol=1e-4, atol=1e-4)

# %% [markdown] lang="en"
# ## Four ways, side by side
#
# Each way is a pair: the values to train, and the function that makes parameters of them.

# %% [markdown] lang="zh"
# ## 四种做法的比较
#
# 每种做法由两部分组成：要训练的值，以及由它们得到完整参数的函数。

# %%
start = tree.merge(body, head)
both = {"adapters": adapters, "head": head}
ways = {
    "from scratch": (fresh, lambda values: values),
    "head alone": (head, lambda values: tree.merge(body, values)),
    "head and LoRA": (both, lambda values: lora.adapted(tree.merge(body, values["head"]), values["adapters"], SCALE)),
    "all weights": (start, lambda values: values),
}
for name, (values, _) in ways.items():
    print(f"{name:14} trains {tree.count(values):6,} of {tree.count(model):,} numbers")

# %% [markdown] lang="en"
# The first 400 images of the second task are there to learn from, the others for the test. Which examples one happens
# to have matters much when they are few, so every figure is a mean over four draws. Training is a function of the
# examples; `vmap` runs it for the four draws at once.

# %% [markdown] lang="zh"
# 第二个任务的前 400 张图用来学习，其余用来测试。样本很少时，碰巧抽到哪些样本影响很大，
# 所以每个数字都是四次抽样的平均值。训练是样本的函数，`vmap` 让四次抽样的训练同时进行。

# %%
COUNTS, DRAWS = (1, 2, 4, 8, 16), 4
test_x, test_y = new_x[400:], new_y[400:]


def examples(key, count):
    """Rows of `count` examples of each class, (5 * count,)."""
    order = random.permutation(key, 400)
    return torch.cat([order[new_y[order] == label][:count] for label in range(5)])


def score(values, make, x, y):
    tuned = train(lambda values, batch: losses(make(values), batch).mean(), values, (x, y))
    return accuracy(lenet.apply(make(tuned), test_x, cfg), test_y)


curves = {name: [] for name in ways}
for count in COUNTS:
    rows = torch.stack([examples(key, count) for key in random.split(random.key(6), DRAWS)])  # (draws, 5 * count)
    for name, (values, make) in ways.items():
        scores = torch.vmap(score, (None, None, 0, 0))(values, make, new_x[rows], new_y[rows])  # (draws,)
        curves[name].append(float(scores.mean()))
for name, curve in curves.items():
    print(f"{name:14}", "  ".join(f"{value:.1%}" for value in curve))

# %% [markdown] lang="en"
# With one example of each digit, the fewer weights move the better: the head alone has little freedom to fit five
# pictures by accident. With sixteen, all weights win, from the same start, and LoRA lies between the two. From scratch
# the net must first find out what the old one knows already, and falls behind in both.
#
# This is no law. With `SIZE = 8` every digit stands in the middle, there is nothing left to know about places, and the
# same script finds that from scratch is best: the features of five old digits then help less than they bind.

# %% [markdown] lang="zh"
# 每类只有一个样本时，可动的权重越少越好：只训练分类头，就没有多少自由度去死记五张图片。每类十六个样本时，
# 从同样的起点出发，训练全部权重最好，LoRA 介于两者之间。从零训练的网络得先弄明白旧网络早已知道的东西，所以两头都落后。
#
# 这不是定律。把 `SIZE` 改成 8，每个数字都在正中间，关于位置已经没有什么可学，同一个脚本就会显示从零训练最好：
# 这时五个旧数字的特征带来的束缚多于帮助。

# %%
figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
for (name, curve), marker in zip(curves.items(), "os^D", strict=True):
    axis.plot(COUNTS, [100 * value for value in curve], marker=marker, label=name)
axis.axhline(20, color="grey", linestyle=":", label="guessing")
axis.set_xscale("log", base=2)
axis.set_xticks(COUNTS, [str(count) for count in COUNTS])
axis.set_xlabel("examples of each new digit")
axis.set_ylabel("test accuracy in percent")
axis.legend(loc="upper left")
plt.show()

# %% [markdown] lang="en"
# ## Published weights
#
# What we did by hand works for any net of the zoo and for weights that others trained on ImageNet. `adopt` keeps all
# but the head, and draws a new one for other classes; images must be prepared as in the first training.
#
# ```py
# from nets.classifiers import by_name, torchvision_weights
#
# published, _, facts = torchvision_weights.from_pretrained("resnet18")  # downloaded once
# net, cfg = by_name.configured("resnet18", channels=3, classes=5, size=224)
# params, new = by_name.adopt(net.spec(cfg), published, random.key(0))  # new: ["head.bias", "head.weight"]
# x = torchvision_weights.preprocess(images, facts)  # (batch, 3, 224, 224) in [0, 1], normalised
# ```
#
# One trap: in training, a batch norm with frozen weights still follows the new data by its running mean and variance.
# Call `core.layers.freeze_batch_norms(params, lambda name: not name.startswith("head"))` in the loss, before
# `net.apply`.

# %% [markdown] lang="zh"
# ## 使用公开的预训练权重
#
# 上面手工做的事，对本库的任何网络、对别人在 ImageNet 上训练好的权重都适用。`adopt` 保留分类头以外的一切，
# 并为新的类别重新初始化分类头；图像的预处理必须与当初训练时相同。
#
# ```py
# from nets.classifiers import by_name, torchvision_weights
#
# published, _, facts = torchvision_weights.from_pretrained("resnet18")  # downloaded once
# net, cfg = by_name.configured("resnet18", channels=3, classes=5, size=224)
# params, new = by_name.adopt(net.spec(cfg), published, random.key(0))  # new: ["head.bias", "head.weight"]
# x = torchvision_weights.preprocess(images, facts)  # (batch, 3, 224, 224) in [0, 1], normalised
# ```
#
# 有一个陷阱：训练时，批归一化层的权重虽然冻结了，滑动均值和方差仍会跟着新数据变化。请在损失函数里、
# `net.apply` 之前调用 `core.layers.freeze_batch_norms(params, lambda name: not name.startswith("head"))`。

# %% [markdown] lang="en"
# ## Where to go from here
#
# [classify.py](../README.md#classify) does this for any folder of pictures:
# `finetune --weights published --freeze "stem*"`. [core/README.md](../../core/README.md#adapters-of-low-rank) has more
# of LoRA, such as DoRA and an adapter per example, [train/README.md](../../train/README.md#optimizers) learning rates
# by group, and [nets/README.md](../../nets/README.md#image-classifiers-by-name) the published weights that can be
# loaded.

# %% [markdown] lang="zh"
# ## 接下来
#
# [classify.py](../README.md#classify) 对任意图片文件夹做同样的事：`finetune --weights published --freeze "stem*"`。
# LoRA 的更多用法（DoRA、每个样本一个适配器）见 [core/README.md](../../core/README.md#adapters-of-low-rank)，
# 分组学习率见 [train/README.md](../../train/README.md#optimizers)，
# 可以加载的公开权重见 [nets/README.md](../../nets/README.md#image-classifiers-by-name)。
