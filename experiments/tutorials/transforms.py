# %% [markdown] lang="en"
# # Transforms of functions
#
# `grad`, `vmap`, `jvp` and `torch.compile` take a function and return another: its derivative, the same for many
# inputs, its change along a direction, a faster one. As the result is a function again, they compose. They ask one
# thing of it: that it is *pure*, its output made of its inputs alone. Our function is no net but a ball thrown
# through the air, since all of this holds for any program of tensors. In the end we know how to throw at twelve
# targets at once.
#
# You need to know derivatives and a little PyTorch.

# %% [markdown] lang="zh"
# # 函数变换
#
# `grad`、`vmap`、`jvp` 和 `torch.compile` 接受一个函数，返回另一个函数：它的导数、能同时处理许多输入的版本、
# 沿某个方向的变化、更快的版本。结果仍是函数，所以可以组合。它们只有一个要求：函数必须是*纯函数*，输出只由输入决定。
# 我们用的函数不是网络，而是在空气中抛出的一个球，因为这些对任何张量程序都成立。
# 最后我们将同时算出怎样抛球才能命中十二个目标。
#
# 读者需要了解导数和一点 PyTorch。

# %%
import matplotlib.pyplot as plt
import torch

from core import random, transforms

# %% [markdown] lang="en"
# ## A function
#
# The ball starts at the origin with velocity $v$ and flies for a second, in 12 steps of time $h$; gravity pulls it
# down, and the air slows it by its speed squared. A step of constant acceleration is exact where there is no drag
# ($k = 0$):
#
# $$a = -k \lVert v \rVert v - (0, g), \qquad p \leftarrow p + h v + \tfrac{1}{2} h^2 a, \qquad v \leftarrow v + h a$$

# %% [markdown] lang="zh"
# ## 一个函数
#
# 球从原点以速度 $v$ 出发，飞行一秒，分成 12 个时长为 $h$ 的时间步；重力把它往下拉，空气阻力与速度的平方成正比。
# 没有阻力（$k = 0$）时，匀加速的一步是精确的：
#
# $$a = -k \lVert v \rVert v - (0, g), \qquad p \leftarrow p + h v + \tfrac{1}{2} h^2 a, \qquad v \leftarrow v + h a$$

# %%
STEPS, GRAVITY = 12, torch.tensor([0.0, 9.81], dtype=torch.float64)


def throw(v, drag):  # v (2,), drag () -> positions (12, 2)
    h, p, path = 1 / STEPS, torch.zeros_like(v), []
    for _ in range(STEPS):
        a = -drag * v.norm() * v - GRAVITY
        p, v = p + h * v + 0.5 * h**2 * a, v + h * a
        path.append(p)
    return torch.stack(path)


v, drag, target = torch.tensor([8.0, 7.0]).double(), torch.tensor(0.05).double(), torch.tensor([5.0, 2.0]).double()
path = throw(v, 0 * drag)
torch.testing.assert_close(path[-1], v - GRAVITY / 2)  # p(1) = v - g / 2
print("positions", tuple(path.shape), " the last one", path[-1].tolist(), " with drag", throw(v, drag)[-1].tolist())

# %% [markdown] lang="en"
# ## grad
#
# `grad(f)` is the function that returns the derivative of the number $f$ by its first argument. How should the throw
# change to end nearer to the target? Without drag we know the answer, $2 (v - g / 2 - \mathrm{target})$; with drag
# nobody has to work it out.

# %% [markdown] lang="zh"
# ## grad
#
# `grad(f)` 是一个函数，返回数 $f$ 对第一个参数的导数。怎样改变抛出的速度才能更接近目标？
# 没有阻力时我们知道答案 $2 (v - g / 2 - \mathrm{target})$；有阻力时也不必亲手推导。

# %%


def miss(v, drag, target):
    return (throw(v, drag)[-1] - target).square().sum()


torch.testing.assert_close(transforms.grad(miss)(v, 0 * drag, target), 2 * (v - GRAVITY / 2 - target))
by_velocity, by_drag = transforms.grad(miss, argnums=(0, 1))(v, drag, target)
print("by the velocity", by_velocity.tolist(), " by the drag", by_drag.item())

# %% [markdown] lang="en"
# ## vmap
#
# `throw` knows one ball. `vmap(throw)` throws many: every operation gets one more axis, and the loop over the balls
# is gone. `in_dims` says which argument has that axis, `None` stands for one value for all. What you write for one
# example, you need not write for a batch.

# %% [markdown] lang="zh"
# ## vmap
#
# `throw` 只会抛一个球。`vmap(throw)` 能抛许多个：每个操作都多了一个轴，对球的循环消失了。
# `in_dims` 说明哪个参数有这个轴，`None` 表示所有球共用一个值。为一个样本写好的代码，不必再为一批样本重写。

# %%
many = v + 0.5 * random.normal(random.key(0), (300, 2), torch.float64)  # (300, 2)
paths = transforms.vmap(throw, in_dims=(0, None))(many, drag)  # (300, 12, 2)
torch.testing.assert_close(paths[:5], torch.stack([throw(one, drag) for one in many[:5]]))
table = transforms.vmap(transforms.vmap(throw, in_dims=(None, 0)), in_dims=(0, None))(many[:3], torch.ones(4).double())
print("300 balls", tuple(paths.shape), " 3 velocities x 4 drags", tuple(table.shape))

# %% [markdown] lang="en"
# ## jvp
#
# How does the whole path change if the velocity changes along $u$? One forward pass carries the change along, $J u$,
# however many numbers the path has. Two such directions make the Jacobian of the landing point, and with it the
# spread of throws by an unsteady hand: a covariance $\Sigma$ of the velocity becomes $J \Sigma J^\top$ at the end.
# The 300 balls above say nearly the same.

# %% [markdown] lang="zh"
# ## jvp
#
# 如果速度沿 $u$ 变化，整条轨迹会怎样变化？前向走一遍，带着这个变化一起算，得到 $J u$，无论轨迹有多少个数。
# 两个方向就给出落点的雅可比矩阵，也就知道了手不稳造成的散布：速度的协方差 $\Sigma$ 到终点变成 $J \Sigma J^\top$。
# 上面的 300 个球给出几乎相同的结果。

# %%
directions = torch.eye(2, dtype=torch.float64)
columns = transforms.vmap(lambda u: transforms.jvp(lambda v: throw(v, drag), (v,), (u,))[1])(directions)  # (2, 12, 2)
J = columns[:, -1].T  # (2, 2): the derivative of the last position by the velocity
torch.testing.assert_close(J, torch.func.jacrev(lambda v: throw(v, drag)[-1])(v))
numeric = [(throw(v + 1e-6 * u, drag) - throw(v - 1e-6 * u, drag)) / 2e-6 for u in directions]
torch.testing.assert_close(columns, torch.stack(numeric), rtol=1e-6, atol=1e-8)
covariance = 0.5**2 * J @ J.T
print("standard deviations", covariance.diagonal().sqrt().tolist(), " of 300 balls", paths[:, -1].std(0).tolist())

# %% [markdown] lang="en"
# ## They compose
#
# - `vmap(grad(f))`: a gradient per example. Their mean is the gradient of the mean, `grad` of a mean over `vmap(f)`.
# - `jvp(grad(f))`: the Hessian times a vector; over all unit vectors, by `vmap`, the Hessian.
# - `vmap` of a solver that uses `jacfwd`: twelve targets at once. Newton's method asks for a velocity whose path ends
#   at the target, $v \leftarrow v - J^{-1} (p(v) - \mathrm{target})$, and all twelve run together.

# %% [markdown] lang="zh"
# ## 可以组合
#
# - `vmap(grad(f))`：每个样本一个梯度。它们的平均等于平均值的梯度，即对 `vmap(f)` 的平均求 `grad`。
# - `jvp(grad(f))`：Hessian 矩阵与向量的乘积；用 `vmap` 取遍所有单位向量，就得到 Hessian 矩阵。
# - 对用到 `jacfwd` 的求解器做 `vmap`：同时求解十二个目标。牛顿法寻找终点落在目标上的速度，
#   $v \leftarrow v - J^{-1} (p(v) - \mathrm{target})$，十二个一起迭代。

# %%
each = transforms.vmap(transforms.grad(miss), in_dims=(0, None, None))(many, drag, target)  # (300, 2)
mean = transforms.grad(lambda shift: transforms.vmap(miss, (0, None, None))(many + shift, drag, target).mean())
torch.testing.assert_close(each.mean(0), mean(torch.zeros(2).double()))

hessian = transforms.vmap(lambda u: transforms.hvp(miss, v, u, drag, target)[1])(directions)
torch.testing.assert_close(hessian, torch.func.hessian(miss)(v, drag, target))


def aim(target):
    v = target + GRAVITY / 2  # right without drag
    for _ in range(6):
        jacobian = torch.func.jacfwd(lambda v: throw(v, drag)[-1])(v)
        v = v - torch.linalg.solve(jacobian, throw(v, drag)[-1] - target)
    return v


targets = torch.cartesian_prod(torch.tensor([3.0, 5.0, 7.0, 9.0]), torch.tensor([0.0, 1.5, 3.0])).double()  # (12, 2)
aimed = transforms.vmap(aim)(targets)  # (12, 2)
hits = transforms.vmap(throw, in_dims=(0, None))(aimed, drag)  # (12, 12, 2)
torch.testing.assert_close(hits[:, -1], targets)
print("largest miss of 12 throws:", (hits[:, -1] - targets).norm(dim=1).max().item())

# %% [markdown] lang="en"
# ## What they refuse
#
# Under `vmap` a value is many values. An `if` cannot go both ways: compute both and choose with `torch.where`. A
# mapped value cannot be written into a tensor that has one value for all: build a list and stack it. `torch.randn`
# would have to guess whether all get the same numbers: map over keys instead. Each refusal says so, the last two by
# the checks of `core.transforms`.

# %% [markdown] lang="zh"
# ## 哪些会被拒绝
#
# 在 `vmap` 之下，一个值其实是许多个值。`if` 不能同时走两边：两边都算，再用 `torch.where` 选择。
# 有批次的值不能写进所有样本共用的张量：先放进列表再堆叠。`torch.randn` 不知道各个样本是否该得到相同的数：
# 改为对 key 做映射。每次拒绝都会说明原因，最后两个来自 `core.transforms` 的检查。

# %%


def bounce(p, v):  # off the ground
    return torch.where(p[1] < 0, v * torch.tensor([1.0, -0.8]).double(), v)


refused = {
    "if": lambda: transforms.vmap(lambda p, v: -v if p[1] < 0 else v)(many, many),
    "in place": lambda: transforms.vmap(lambda v: torch.zeros(2).double().add_(v))(many),
    "random": lambda: transforms.vmap(lambda v: v + torch.randn(2))(many),
    "sizes": lambda: transforms.vmap(throw)(many, torch.ones(7).double()),
    "no number": lambda: transforms.grad(throw)(v, drag),
}
for name, f in refused.items():
    try:
        f()
    except (RuntimeError, ValueError) as error:
        print(f"{name:<9} {type(error).__name__}: {' '.join(str(error).split())[:100]}")
print("where:", tuple(transforms.vmap(bounce)(many, many).shape))
noisy = transforms.vmap(lambda key, v: v + random.normal(key, (2,)))(random.split(random.key(1), 300), many)

# %% [markdown] lang="en"
# ## compile
#
# `torch.compile` runs the Python once with placeholders and keeps the operations as a graph, for a *backend* to make
# fast: "inductor" writes C++ or GPU code, which takes a while; "aot_eager" runs the graph as it is, enough to see
# that it is right. It belongs outermost, `compile(vmap(grad(f)))`. The loop is unrolled: 12 steps are 12 copies.
# Python numbers are constants of the graph, so a new one compiles again; what changes from call to call should be a
# tensor. We count compilations with a backend of our own.

# %% [markdown] lang="zh"
# ## compile
#
# `torch.compile` 用占位符把 Python 代码跑一遍，把各个操作记录成图，交给*后端*加速："inductor" 生成 C++ 或 GPU 代码，
# 需要一些时间；"aot_eager" 原样运行图，足以验证正确性。它应当放在最外层：`compile(vmap(grad(f)))`。循环会被展开：
# 12 步就是 12 份。Python 的数是图中的常量，换一个数就要重新编译；每次调用会变的东西应当是张量。
# 我们用自己的后端来统计编译次数。

# %%
graphs = []


def counting(graph, inputs):
    graphs.append(len(graph.graph.nodes))
    return graph.forward


per_ball = transforms.vmap(transforms.grad(miss), in_dims=(0, None, None))
fast = torch.compile(per_ball, fullgraph=True, dynamic=False, backend="aot_eager")
torch.testing.assert_close(fast(many, drag, target), each)

counted = torch.compile(lambda v, drag: throw(v, drag), fullgraph=True, dynamic=False, backend=counting)
for number in (0.01, 0.02, 0.03):
    counted(v, number)
print("Python numbers:", len(graphs), "graphs of", graphs, "nodes")
graphs.clear()
for number in (0.01, 0.02, 0.03):
    torch.testing.assert_close(counted(v, torch.tensor(number).double()), throw(v, number))
print("tensors:", len(graphs), "graph of", graphs, "nodes")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
origin = torch.zeros(12, 1, 2).double()
for line in torch.cat([origin, hits], 1):
    left.plot(*line.T.numpy(), color="tab:blue", linewidth=1)
left.plot(*targets.T.numpy(), "o", color="tab:red", label="targets")
left.set(xlabel="metres", ylabel="metres", ylim=(-0.2, 4.4), title="vmap of a solver: twelve targets")
right.plot(*paths[:, -1].T.numpy(), ".", color="tab:blue", markersize=3, label="300 throws (vmap)")
right.plot(*torch.cat([origin[0], throw(v, drag)]).T.numpy(), color="black", label="the throw in the middle")
circle = torch.linspace(0, 2 * torch.pi, 100).double()
ellipse = throw(v, drag)[-1][:, None] + 2 * 0.5 * J @ torch.stack([circle.cos(), circle.sin()])  # (2, 100)
right.plot(*ellipse.numpy(), color="tab:orange", label="two standard deviations (jvp)")
right.set(xlabel="metres", title="jvp: how errors spread")
left.legend(loc="upper left")
right.legend(loc="upper left")
plt.show()

# %% [markdown] lang="en"
# ## Where to go from here
#
# [core/README.md](../../core/README.md#transforms): the same on trees of parameters.
# [core/COMING_FROM.md](../../core/COMING_FROM.md#errors): errors, and what to write instead.
# [train/README.md](../../train/README.md#the-step): a whole training step as one compiled function.

# %% [markdown] lang="zh"
# ## 接下来
#
# [core/README.md](../../core/README.md#transforms)：作用于参数树的同样变换。
# [core/COMING_FROM.md](../../core/COMING_FROM.md#errors)：常见错误以及应当怎样改写。
# [train/README.md](../../train/README.md#the-step)：把整个训练步编译成一个函数。
