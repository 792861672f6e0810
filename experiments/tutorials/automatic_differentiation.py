# %% [markdown] lang="en"
# # Automatic differentiation
#
# Training needs the derivative of one number, the loss, by millions of parameters. Automatic differentiation computes
# it exactly, up to rounding, for a few times the cost of the loss itself. Here we do it by hand on a small graph,
# write it in twenty lines, and then meet the transforms that a library offers: `grad`, `vjp`, `jvp`, Jacobians, and
# products with the Hessian. In the end Newton's method, which uses second derivatives, runs against gradient descent.
#
# You need to know derivatives and the chain rule.

# %% [markdown] lang="zh"
# # 自动微分
#
# 训练需要求一个数（损失）对上百万个参数的导数。自动微分能精确地（只差舍入误差）算出它，代价只是损失本身计算量的几倍。
# 本文先在一个小计算图上手算，再用二十行代码实现，然后介绍库提供的各种变换：`grad`、`vjp`、`jvp`、
# 雅可比矩阵以及与 Hessian 矩阵的乘积。最后让使用二阶导数的牛顿法与梯度下降比一比。
#
# 读者需要了解导数和链式法则。

# %%
import matplotlib.pyplot as plt
import torch
from scipy.optimize import minimize

from core import random, transforms

# %% [markdown] lang="en"
# ## By hand
#
# A program is a chain of simple operations. For $y = \sin(x_1 x_2) + x_1$ it is $a = x_1 x_2$, $b = \sin a$,
# $y = b + x_1$. *Reverse mode* goes through it backwards and computes the derivative of $y$ by each value,
# $\bar v = \partial y / \partial v$, from those of the values made of it. $x_1$ is used twice, so its derivative has
# two parts:
#
# $$\bar y = 1, \quad \bar b = \bar y, \quad \bar a = \bar b \cos a, \quad \bar x_2 = \bar a \, x_1, \quad
# \bar x_1 = \bar a \, x_2 + \bar y$$

# %% [markdown] lang="zh"
# ## 手算
#
# 程序是一连串简单运算。$y = \sin(x_1 x_2) + x_1$ 可以拆成 $a = x_1 x_2$、$b = \sin a$、$y = b + x_1$。
# *反向模式*从后往前走一遍，由后面的值推出 $y$ 对前面每个值的导数 $\bar v = \partial y / \partial v$。$x_1$ 用了两次，
# 所以它的导数是两部分之和：
#
# $$\bar y = 1, \quad \bar b = \bar y, \quad \bar a = \bar b \cos a, \quad \bar x_2 = \bar a \, x_1, \quad
# \bar x_1 = \bar a \, x_2 + \bar y$$

# %%
x1, x2 = torch.tensor(0.5), torch.tensor(3.0)
a = x1 * x2
y_bar = torch.tensor(1.0)
b_bar = y_bar
a_bar = b_bar * a.cos()
by_hand = (a_bar * x2 + y_bar, a_bar * x1)

by_torch = torch.func.grad(lambda x1, x2: (x1 * x2).sin() + x1, argnums=(0, 1))(x1, x2)
print("by hand", by_hand, "by torch", by_torch)
torch.testing.assert_close(by_hand, by_torch)

# %% [markdown] lang="en"
# ## A tape
#
# To do the same for any program, each operation writes on a *tape*: its value, and for each of its inputs (by number)
# the derivative by that input. The way back multiplies and adds, whatever the operations are. torch does this with
# tensors in place of numbers.

# %% [markdown] lang="zh"
# ## 记录带
#
# 要对任意程序做同样的事，就让每个运算在*记录带*（tape）上记下：它的值，以及它对每个输入（用编号表示）的导数。
# 反向时只需相乘、相加，与具体是什么运算无关。torch 做的就是这件事，只不过把数换成了张量。

# %%
tape = [(x1, []), (x2, [])]  # (value, [(number of the input, derivative by it), ...])


def record(value, *inputs):
    tape.append((value, inputs))
    return len(tape) - 1


def multiply(i, j):
    return record(tape[i][0] * tape[j][0], (i, tape[j][0]), (j, tape[i][0]))


def sine(i):
    return record(tape[i][0].sin(), (i, tape[i][0].cos()))


def add(i, j):
    return record(tape[i][0] + tape[j][0], (i, 1.0), (j, 1.0))


add(sine(multiply(0, 1)), 0)
bars = [torch.tensor(0.0)] * (len(tape) - 1) + [torch.tensor(1.0)]
for number in reversed(range(len(tape))):
    for i, derivative in tape[number][1]:
        bars[i] = bars[i] + bars[number] * derivative
torch.testing.assert_close(tuple(bars[:2]), by_torch)

# %% [markdown] lang="en"
# ## Vectors: vjp and jvp
#
# A function from $n$ to $m$ numbers has a Jacobian $J$ of $m \times n$ derivatives. One pass backwards gives
# $v^\top J$ for one vector $v$ of $m$ numbers (*vjp*). With $m = 1$ that is the whole gradient, which is why training
# uses it. One pass *forwards* carries a direction along, $(x, u) \to (f(x), J u)$ (*jvp*), by the same rules: $\sin$
# takes $(x, u)$ to $(\sin x, u \cos x)$.
#
# Row by row from `vjp`, or column by column from `jvp`, we get the whole of $J$: in $m$ passes or in $n$. `jacrev`
# and `jacfwd` do that, all passes at once by `vmap`.

# %% [markdown] lang="zh"
# ## 向量：vjp 与 jvp
#
# 从 $n$ 个数到 $m$ 个数的函数有一个 $m \times n$ 的雅可比矩阵 $J$。反向走一遍，
# 得到某个 $m$ 维向量 $v$ 对应的 $v^\top J$（*vjp*）。当 $m = 1$ 时这就是完整的梯度，所以训练用的是它。
# *前向*走一遍则带着一个方向一起计算，$(x, u) \to (f(x), J u)$（*jvp*），规则相同：
# $\sin$ 把 $(x, u)$ 变成 $(\sin x, u \cos x)$。
#
# 用 `vjp` 一行一行地求，或用 `jvp` 一列一列地求，就得到整个 $J$：前者要 $m$ 遍，后者要 $n$ 遍。
# `jacrev` 和 `jacfwd` 正是如此，并用 `vmap` 把各遍合成一次。

# %%
weight, x = random.normal(random.key(0), (2, 4), torch.float64), random.normal(random.key(1), (4,), torch.float64)


def layer(x):
    return torch.tanh(weight @ x)  # (4,) -> (2,)


value, pull = torch.func.vjp(layer, x)
rows = torch.stack([pull(v)[0] for v in torch.eye(2, dtype=x.dtype)])  # (2, 4)
columns = torch.stack([torch.func.jvp(layer, (x,), (u,))[1] for u in torch.eye(4, dtype=x.dtype)], 1)  # (2, 4)
exact = (1 - torch.tanh(weight @ x) ** 2)[:, None] * weight  # (2, 4): tanh' = 1 - tanh²
for jacobian in (rows, columns, torch.func.jacrev(layer)(x), torch.func.jacfwd(layer)(x)):
    torch.testing.assert_close(jacobian, exact)
print("J has", tuple(exact.shape), "entries:", rows.shape[0], "passes backwards or", columns.shape[1], "forwards")

# %% [markdown] lang="en"
# ## Second derivatives
#
# A gradient is a function too, and can be differentiated again. The Hessian $H$ of $n$ parameters has $n^2$ entries,
# far too many for a net; its product with one vector costs only a few gradients, because it is the jvp of the
# gradient:
#
# $$H v = \left. \frac{\mathrm{d}}{\mathrm{d}\varepsilon} \nabla f(x + \varepsilon v) \right|_{\varepsilon = 0}$$
#
# `core.transforms.hvp` gives the gradient and this product. Our function is Rosenbrock's, a curved valley.

# %% [markdown] lang="zh"
# ## 二阶导数
#
# 梯度也是函数，可以再求导。$n$ 个参数的 Hessian 矩阵 $H$ 有 $n^2$ 个元素，对网络来说太多了；
# 而它与一个向量的乘积只需几次梯度的计算量，因为这正是梯度的 jvp：
#
# $$H v = \left. \frac{\mathrm{d}}{\mathrm{d}\varepsilon} \nabla f(x + \varepsilon v) \right|_{\varepsilon = 0}$$
#
# `core.transforms.hvp` 同时给出梯度和这个乘积。这里用的函数是 Rosenbrock 函数，一条弯曲的山谷。

# %%


def valley(p):
    return (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2  # least at (1, 1)


p, v = torch.tensor([-1.2, 1.0], dtype=torch.float64), torch.tensor([0.6, 0.8], dtype=torch.float64)
gradient, product = transforms.hvp(valley, p, v)
hessian = torch.func.hessian(valley)(p)  # forward over reverse, (2, 2)
torch.testing.assert_close(product, hessian @ v)
torch.testing.assert_close(gradient, torch.func.grad(valley)(p))
print("H", hessian.tolist(), " H v", product.tolist())

# %% [markdown] lang="en"
# ## A numeric check
#
# Whoever writes a derivative checks it by differences, $(f(x + h v) - f(x - h v)) / 2h$, whose error falls with
# $h^2$. But $h$ must not be too small: the difference of two nearly equal numbers loses its digits, an error that
# grows with $1/h$. In double precision $h$ near $10^{-5}$ is best; float32 leaves too few digits for this check.

# %% [markdown] lang="zh"
# ## 数值检验
#
# 自己写的导数要用差分来检验：$(f(x + h v) - f(x - h v)) / 2h$，误差随 $h^2$ 减小。但 $h$ 不能太小：
# 两个几乎相等的数相减会丢失有效数字，这部分误差随 $1/h$ 增大。双精度下 $h$ 取 $10^{-5}$ 左右最好；
# float32 的位数太少，不适合做这种检验。

# %%
for h in (1e-1, 1e-3, 1e-5, 1e-8, 1e-12):
    numeric = (valley(p + h * v) - valley(p - h * v)) / (2 * h)
    print(f"h = {h:.0e}: error {(numeric - gradient @ v).abs():.1e}")

# %% [markdown] lang="en"
# ## Where it cannot help
#
# Integers have no derivative, and `core.transforms` says which leaf has none. An `argmax` or a rounding is flat
# almost everywhere: its gradient is zero, without an error, and nothing is learned. A value taken out by `.item()` or
# `.detach()` is a constant. And a branch that `torch.where` does not choose still counts in the backward pass, where
# $0 \cdot \infty$ makes nan: make its *input* harmless too.

# %% [markdown] lang="zh"
# ## 自动微分无能为力之处
#
# 整数没有导数，`core.transforms` 会指出是哪个叶子。`argmax` 和取整几乎处处是平的：梯度为零，也不报错，
# 于是什么也学不到。用 `.item()` 或 `.detach()` 取出的值是常数。`torch.where` 没有选中的分支仍会参与反向传播，
# 那里的 $0 \cdot \infty$ 会产生 nan：要让它的*输入*也安全。

# %%
try:
    transforms.grad(lambda p: p["w"].sum() * p["ids"].sum())({"w": torch.ones(2), "ids": torch.arange(2)})
except TypeError as error:
    print("TypeError:", error)
points = torch.tensor([4.0, 0.0])
attempts = {
    "argmax": lambda x: x.argmax().float(),
    "round": lambda x: x.round().sum(),
    "detach": lambda x: (x * x.detach()).sum(),  # x, where the derivative of x² is 2 x
    "where": lambda x: torch.where(x > 0, x.sqrt(), 0.0).sum(),
    "where, safe": lambda x: torch.where(x > 0, torch.where(x > 0, x, 1.0).sqrt(), 0.0).sum(),
}
for name, f in attempts.items():
    print(f"{name:<11}", torch.func.grad(f)(points).tolist())

# %% [markdown] lang="en"
# ## Newton against gradient descent
#
# Gradient descent steps along $-\nabla f$. Newton's method takes the quadratic function that has the value, the
# gradient and the Hessian of $f$ at this point, and steps to its minimum, $p - H^{-1} \nabla f$ (if $H$ is positive
# definite, as here). SciPy's Newton method gets the same derivatives from us, and finds the same minimum.

# %% [markdown] lang="zh"
# ## 牛顿法与梯度下降
#
# 梯度下降沿 $-\nabla f$ 走。牛顿法则取一个在当前点与 $f$ 的值、梯度和 Hessian 都相同的二次函数，
# 直接走到它的最低点 $p - H^{-1} \nabla f$（要求 $H$ 正定，这里成立）。把同样的导数交给 SciPy 的牛顿法，
# 它会找到同一个最低点。

# %%
descent, newton = [p], [p]
for _ in range(1000):
    descent.append(descent[-1] - 1e-3 * torch.func.grad(valley)(descent[-1]))
for _ in range(6):
    q = newton[-1]
    newton.append(q - torch.linalg.solve(torch.func.hessian(valley)(q), torch.func.grad(valley)(q)))


def for_scipy(derivative):
    return lambda q: derivative(torch.from_numpy(q)).numpy()


functions = {"jac": for_scipy(torch.func.grad(valley)), "hess": for_scipy(torch.func.hessian(valley))}
optimum = minimize(for_scipy(valley), p.numpy(), method="trust-exact", **functions).x
torch.testing.assert_close(newton[-1], torch.from_numpy(optimum), rtol=1e-5, atol=1e-5)
print("gradient descent after 1000 steps", descent[-1].tolist(), " Newton after 6", newton[-1].tolist())

# %%
paths = {"gradient descent": torch.stack(descent), "Newton": torch.stack(newton)}
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
grid = torch.meshgrid(torch.linspace(-1.6, 1.4, 200), torch.linspace(-3.6, 1.8, 200), indexing="xy")
left.contourf(*(g.numpy() for g in grid), valley(grid).log10().numpy(), levels=12, cmap="Greys")
for (name, path), style in zip(paths.items(), (".-", "o-"), strict=True):
    left.plot(*path.T.numpy(), style, label=name, markersize=4)
    values = torch.stack([valley(q) for q in path])
    right.loglog(range(1, len(path) + 1), values.clamp(min=1e-20).numpy(), style, label=name, markersize=4)
left.plot(1, 1, "r*")
left.set(xlabel="$p_1$", ylabel="$p_2$", title="paths over $\\log_{10} f$; the star is the minimum")
right.set(xlabel="number of points", ylabel="$f$", title="values along the paths")
right.legend(loc="lower right")
plt.show()

# %% [markdown] lang="en"
# ## Where to go from here
#
# [core/README.md](../../core/README.md#transforms): the transforms on trees of parameters, and
# [curvature](../../core/README.md#curvature), which solves with the Hessian of a net by products alone.
# `experiments/spectrum.py` shows the eigenvalues of such a Hessian.

# %% [markdown] lang="zh"
# ## 接下来
#
# [core/README.md](../../core/README.md#transforms)：作用于参数树的变换，以及[曲率](../../core/README.md#curvature)，
# 只靠乘积就能用网络的 Hessian 解方程。`experiments/spectrum.py` 展示这种 Hessian 的特征值。
