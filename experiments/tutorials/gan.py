# %% [markdown] lang="en"
# # A generative adversarial net, line by line
#
# Two nets play against each other. One draws digits from noise; the other judges whether a digit is real or drawn. The
# judge learns to tell them apart, the painter learns what the judge still believes. We read
# [a complete GAN of 100 lines](../../nets/explained/gan.py), check its parts, train it for a few seconds and look.
#
# You need to know what a net and a gradient are, and a little PyTorch. Goodfellow et al. 2014,
# [Generative Adversarial Nets](https://arxiv.org/abs/1406.2661).

# %% [markdown] lang="zh"
# # 逐行读懂生成对抗网络
#
# 两个网络相互博弈：一个用噪声画数字，另一个判断数字是真实的还是画出来的。判别者学着分辨真假，
# 作画者学着画出判别者仍会相信的数字。本文阅读[一份 100 行的完整 GAN](../../nets/explained/gan.py)，检验它的各个部分，
# 训练几秒钟，再看结果。
#
# 读者需要知道什么是网络和梯度，并了解一点 PyTorch。论文：Goodfellow 等 2014，
# [Generative Adversarial Nets](https://arxiv.org/abs/1406.2661)。

# %%
import inspect

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

from core import random, tree
from nets.explained import gan
from nets.generative import mlp_gan
from train.adversarial import objectives


def show(*functions):
    print("\n".join(inspect.getsource(f) for f in functions))


# %% [markdown] lang="en"
# ## Two players
#
# The *generator* makes 64 pixels between -1 and 1 out of a vector $z$ of 64 random numbers. The *critic* makes one
# number out of 64 pixels, a score $C(x)$; its sigmoid $D(x)$ is the probability that $x$ is real. Both are plain stacks
# of linear layers: all that is new is what they are asked for.

# %% [markdown] lang="zh"
# ## 两个玩家
#
# *生成器*把 64 个随机数组成的向量 $z$ 变成 64 个 -1 到 1 之间的像素。*判别器*（代码中称为 critic）把 64
# 个像素变成一个数，即分数 $C(x)$；它的 sigmoid $D(x)$ 就是 $x$ 为真实数字的概率。两者都只是几层线性层，
# 新的只是对它们的要求。

# %%
digits = torch.tensor(load_digits().data / 8 - 1, dtype=torch.float32)  # (1797, 64), in [-1, 1]
rng = torch.Generator().manual_seed(0)  # the plain file takes torch's own generator
critic, generator = players = gan.init(rng, 64, (128, 256), 64)

show(gan.generator, gan.critic)
z = random.normal(random.key(1), (1797, 64))
untrained = gan.generator(generator, z).detach()
scores = gan.critic(critic, digits).detach()
print("images", tuple(untrained.shape), "scores", tuple(scores.shape))

# The library's nets, with the same parameters.
cfg = mlp_gan.Config((64,), latent=64, generator_widths=(128, 256), critic_widths=(256, 128), norm="none")
torch.testing.assert_close(untrained, mlp_gan.generator(generator, z, cfg).detach())
torch.testing.assert_close(scores, mlp_gan.critic(critic, digits, cfg).detach())

# %% [markdown] lang="en"
# ## The critic's loss
#
# The critic does ordinary binary classification: real digits have the label 1, drawn ones the label 0. Its
# cross-entropy is
#
# $$L_C = -E_x[\log D(x)] - E_z[\log(1 - D(G(z)))]$$
#
# With $D = \mathrm{sigmoid}(C)$ this is $\log(1 + e^{-C(x)}) + \log(1 + e^{C(G(z))})$, and $\log(1 + e^c)$ is the
# function `softplus`, which does not overflow. `detach` keeps the generator out of the critic's gradient.

# %% [markdown] lang="zh"
# ## 判别器的损失
#
# 判别器做的是普通的二分类：真实数字标签为 1，画出来的标签为 0。交叉熵为
#
# $$L_C = -E_x[\log D(x)] - E_z[\log(1 - D(G(z)))]$$
#
# 由于 $D = \mathrm{sigmoid}(C)$，它等于 $\log(1 + e^{-C(x)}) + \log(1 + e^{C(G(z))})$，而 $\log(1 + e^c)$
# 就是不会溢出的`softplus` 函数。`detach` 使判别器的梯度不涉及生成器。

# %%
show(gan.critic_loss)
loss = gan.critic_loss(critic, generator, digits, z)
fake_scores = gan.critic(critic, untrained)
entropy = F.binary_cross_entropy_with_logits(scores, torch.ones(1797))
entropy = entropy + F.binary_cross_entropy_with_logits(fake_scores, torch.zeros(1797))
torch.testing.assert_close(loss, entropy)
torch.testing.assert_close(loss, objectives.NON_SATURATING.critic(scores, fake_scores))
print(f"loss {float(loss.detach()):.3f}; of a critic that always says 1/2: 2 log 2 = 1.386")

# %% [markdown] lang="en"
# ## What the critic learns
#
# If real $x$ have the density $p$ and drawn ones $q$, the best critic is (section 4.1 of the paper)
#
# $$D^*(x) = \frac{p(x)}{p(x) + q(x)}$$
#
# So the critic learns a ratio of densities from samples alone. In one dimension we can see it: $p$ is a Gaussian around
# 0, $q$ a narrower one around 1.5. At the right edge, where hardly any sample falls, the critic can only guess.

# %% [markdown] lang="zh"
# ## 判别器学到什么
#
# 设真实样本 $x$ 的密度为 $p$，画出来的密度为 $q$，则最优的判别器是（论文第 4.1 节）
#
# $$D^*(x) = \frac{p(x)}{p(x) + q(x)}$$
#
# 也就是说，判别器仅凭样本就学到了两个密度之比。在一维情形下可以直接看到：$p$ 是以 0 为中心的高斯分布，
# $q$ 是以 1.5 为中心、更窄的高斯分布。在右边缘几乎没有样本落入，判别器只能猜测。

# %%
p, q = torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(1.5, 0.5)
one, _ = gan.init(rng, 1, (32, 32), 1)  # a critic of single numbers
optimizer = torch.optim.Adam(gan.leaves(one), 3e-3)
for key in random.split(random.key(2), 400):
    noise = random.normal(key, (2, 512, 1))
    real, fake = noise[0], 1.5 + 0.5 * noise[1]
    value = F.softplus(-gan.critic(one, real)).mean() + F.softplus(gan.critic(one, fake)).mean()
    optimizer.zero_grad()
    value.backward()
    optimizer.step()

x = torch.linspace(-2.5, 3, 200)
learned = gan.critic(one, x[:, None]).sigmoid().detach()
best = p.log_prob(x).exp() / (p.log_prob(x).exp() + q.log_prob(x).exp())
print(f"largest error of D between -2 and 2: {(learned - best).abs()[x.abs() < 2].max():.3f}")
torch.testing.assert_close(learned[x.abs() < 2], best[x.abs() < 2], rtol=0, atol=0.1)
figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
for curve, label in ((p, "p, real"), (q, "q, drawn")):
    axis.fill_between(x.numpy(), curve.log_prob(x).exp().numpy(), alpha=0.3, label=label)
axis.plot(x.numpy(), best.numpy(), "k--", label="p / (p + q)")
axis.plot(x.numpy(), learned.numpy(), label="learned D")
axis.set(xlabel="x", ylabel="density, probability")
figure.legend(loc="outside right center")
plt.show()

# %% [markdown] lang="en"
# ## The generator's loss
#
# The generator could ascend what the critic descends, and minimise $\log(1 - D(G(z)))$. But early on the critic is sure
# that a drawn digit is not real, and there this function is flat. The paper's remedy (section 3) is to minimise
#
# $$L_G = -E_z[\log D(G(z))]$$
#
# instead. Their slopes, by the score $C(G(z))$, are $-\mathrm{sigmoid}(C)$ and $\mathrm{sigmoid}(C) - 1$: at a score
# of $-6$ the first is 400 times weaker.

# %% [markdown] lang="zh"
# ## 生成器的损失
#
# 生成器本可以与判别器正好相反，最小化 $\log(1 - D(G(z)))$。但训练初期判别器十分肯定画出来的数字是假的，
# 而这个函数在那里是平的。论文的办法（第 3 节）是改为最小化
#
# $$L_G = -E_z[\log D(G(z))]$$
#
# 两者对分数 $C(G(z))$ 的斜率分别是 $-\mathrm{sigmoid}(C)$ 和 $\mathrm{sigmoid}(C) - 1$：当分数为 $-6$ 时，前者要弱 400
# 倍。

# %%
show(gan.generator_loss)
score = torch.tensor([-6.0, -2.0, 0.0, 2.0])
saturating = torch.vmap(torch.func.grad(lambda c: torch.log(1 - c.sigmoid())))(score)
slope = torch.vmap(torch.func.grad(lambda c: F.softplus(-c)))(score)
torch.testing.assert_close(saturating, -score.sigmoid(), rtol=1e-4, atol=1e-6)
torch.testing.assert_close(slope, score.sigmoid() - 1)
for row in zip(score, saturating, slope, strict=True):
    print("score {:4.0f}   slope of log(1 - D) {:7.4f}   of -log D {:7.4f}".format(*row))

# %% [markdown] lang="en"
# ## The game
#
# A step of the critic, a step of the generator, and so on: each descends its own loss and holds the other still. There
# is no common loss that falls, so we look at the images, and at a distance. `frechet` compares mean and covariance of
# drawn and real pixels; two halves of the real digits show how small it can get.

# %% [markdown] lang="zh"
# ## 博弈
#
# 判别器走一步，生成器走一步，如此交替：各自下降自己的损失，同时把对方固定住。没有一个共同下降的损失，所以要看图像，
# 并看一个距离。`frechet` 比较画出来的与真实的像素的均值和协方差；真实数字的两半之间的距离表明它能小到什么程度。

# %%
show(gan.train)
print(f"halves of the digits: {gan.frechet(digits[::2], digits[1::2]):.2f}")
pictures, steps = [untrained], [0]
for more in (50, 150, 600):
    gan.train(players, digits, more, rng, 64)  # each call starts Adam anew
    pictures.append(gan.generator(generator, z).detach())
    steps.append(steps[-1] + more)
    with torch.no_grad():
        loss = gan.critic_loss(critic, generator, digits, z)
    distance = gan.frechet(digits, pictures[-1])
    print(f"{steps[-1]:4} steps: critic's loss {loss:.2f}, distance {distance:.2f}")
print(f"{tree.count(generator)} parameters draw, {tree.count(critic)} judge")

# %% [markdown] lang="en"
# The same 36 vectors $z$ at four moments of the game.

# %% [markdown] lang="zh"
# 同样的 36 个向量 $z$ 在博弈的四个时刻画出的数字。

# %%


def tiles(images):
    padded = F.pad(images[:36].reshape(6, 6, 8, 8), (1, 1, 1, 1), value=-1.0)
    return padded.transpose(1, 2).reshape(60, 60).numpy()


figure, axes = plt.subplots(1, 4, figsize=(10, 2.8), layout="constrained")
for axis, images, step in zip(axes, pictures, steps, strict=True):
    axis.imshow(tiles(images), cmap="gray_r", vmin=-1, vmax=1)
    axis.set_title(f"after {step} steps", fontsize=9)
    axis.axis("off")
plt.show()

# %% [markdown] lang="en"
# ## Where to go from here
#
# `python nets/explained/gan.py` plays longer. [Sixteen GANs](../GANS.md) are made of other losses, nets and
# regularisers, such as WGAN-GP, whose critic measures a distance. [mlp_gan.py](../../nets/generative/mlp_gan.py) and
# [objectives.py](../../train/adversarial/objectives.py) are the library's nets and losses. Other ways to draw the same
# digits: [a VAE](../tutorials/vae.py) and [diffusion](../tutorials/ddpm.py).

# %% [markdown] lang="zh"
# ## 接下来
#
# `python nets/explained/gan.py` 训练更久。[十六种 GAN](../GANS.md) 由不同的损失、网络和正则项组成，例如 WGAN-GP，
# 它的判别器度量的是一个距离。[mlp_gan.py](../../nets/generative/mlp_gan.py)
# 和[objectives.py](../../train/adversarial/objectives.py) 是库中的网络与损失。画同样这些数字的其他方法：
# [VAE](../tutorials/vae.py) 与[扩散模型](../tutorials/ddpm.py)。
