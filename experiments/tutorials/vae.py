# %% [markdown] lang="en"
# # A variational autoencoder, line by line
#
# A variational autoencoder (VAE) learns to draw new digits. It is two small nets and one formula, a lower bound on the
# logarithm of a probability. We read [a complete one of 100 lines](../../nets/explained/vae.py), check each of its
# functions against somebody else's, train it for a few seconds and draw.
#
# You need to know what a net, a gradient and a Gaussian are, and a little PyTorch. Kingma and Welling 2014,
# [Auto-Encoding Variational Bayes](https://arxiv.org/abs/1312.6114).

# %% [markdown] lang="zh"
# # 逐行读懂变分自编码器
#
# 变分自编码器（VAE）可以学会画出新的数字。它由两个小网络和一个公式组成，这个公式是对数概率的一个下界。
# 本文阅读[一份 100 行的完整实现](../../nets/explained/vae.py)，把其中每个函数与别人的实现对照，训练几秒钟，
# 然后画出新的数字。
#
# 读者需要知道什么是网络、梯度和高斯分布，并了解一点 PyTorch。论文：Kingma 和 Welling 2014，
# [Auto-Encoding Variational Bayes](https://arxiv.org/abs/1312.6114)。

# %%
import inspect
from itertools import pairwise

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits

from core import random
from nets.explained import vae
from nets.generative import autoencoder
from train.losses import variational


def show(*functions):
    print("\n".join(inspect.getsource(f) for f in functions))


# %% [markdown] lang="en"
# ## Digits, and two nets
#
# 1797 digits of 8x8 pixels, as rows of 64 numbers between 0 and 1. The last 297 are kept for judging.
#
# The *encoder* squeezes a digit into a code $z$ of 8 numbers. It does not answer with one code but with a Gaussian over
# codes, $q(z \mid x)$: a mean, and the logarithm of a variance, for each of the 8. The *decoder* goes from a code back
# to 64 pixels: one logit per pixel, whose sigmoid is the probability that the pixel is black.

# %% [markdown] lang="zh"
# ## 数字与两个网络
#
# 1797 个 8x8 像素的数字，每个写成 64 个 0 到 1 之间的数。最后 297 个留作评估。
#
# *编码器*把一个数字压缩成 8 个数组成的编码 $z$。它给出的不是一个确定的编码，而是编码上的高斯分布 $q(z \mid x)$：
# 8 维中的每一维有一个均值和一个方差的对数。*解码器*从编码回到 64 个像素：每个像素一个 logit，
# 它的 sigmoid 就是该像素为黑的概率。

# %%
data, target = load_digits(return_X_y=True)
digits = torch.tensor(data / 16, dtype=torch.float32)  # (1797, 64)
seen, unseen = digits[:1500], digits[1500:]
rng = torch.Generator().manual_seed(0)  # the plain file takes torch's own generator
params = vae.init(rng, 64, 256, 8)

show(vae.mlp, vae.encode, vae.decode)
mean, log_variance = vae.encode(params["encoder"], unseen)
print("mean", tuple(mean.shape), "log variance", tuple(log_variance.shape))
print("logits", tuple(vae.decode(params["decoder"], mean).shape))

# %% [markdown] lang="en"
# ## A sample that has a gradient
#
# Training needs a code $z$ drawn from $q(z \mid x)$, and the gradient has to pass through the draw back into the
# encoder. "Draw a random number" has no derivative; but noise that is drawn first and then scaled and shifted has one:
#
# $$z = \mu + \sigma \, \varepsilon, \qquad \varepsilon \sim N(0, 1)$$
#
# This is the reparametrisation trick. A test with a known answer: $E[z^2] = \mu^2 + \sigma^2$, whose derivative with
# respect to $\mu$ is $2 \mu$, and with respect to $\log \sigma^2$ is $\sigma^2$.

# %% [markdown] lang="zh"
# ## 带梯度的采样
#
# 训练时要从 $q(z \mid x)$ 中抽取编码 $z$，而且梯度必须穿过这一步传回编码器。“抽一个随机数”没有导数；
# 但先抽噪声、再缩放和平移，就有导数了：
#
# $$z = \mu + \sigma \, \varepsilon, \qquad \varepsilon \sim N(0, 1)$$
#
# 这就是重参数化技巧。用一个已知答案的例子来检验：$E[z^2] = \mu^2 + \sigma^2$，它对 $\mu$ 的导数是 $2 \mu$，
# 对 $\log \sigma^2$ 的导数是 $\sigma^2$。

# %%
show(vae.draw)
noise = random.normal(random.key(1), (400_000,))
square = torch.func.grad(lambda m, v: vae.draw(m, v, noise).square().mean(), argnums=(0, 1))
by_mean, by_log_variance = square(torch.tensor(0.5), torch.tensor(-1.0))
print(f"by the mean {by_mean:.3f}, exactly 1; by the log variance {by_log_variance:.3f}, exactly exp(-1) = 0.368")
torch.testing.assert_close(by_mean, torch.tensor(1.0), rtol=0, atol=0.01)
torch.testing.assert_close(by_log_variance, torch.tensor(-1.0).exp(), rtol=0, atol=0.01)

# %% [markdown] lang="en"
# ## How well is the digit told?
#
# The first half of the formula: the log probability of the digit's pixels, given a code. With $p$ the probability of
# black at a pixel,
#
# $$\log p(x \mid z) = \sum_i x_i \log p_i + (1 - x_i) \log (1 - p_i)$$
#
# (Grey pixels are between 0 and 1, for which this is the usual loss rather than a probability.) `torch.distributions`
# has the same number.

# %% [markdown] lang="zh"
# ## 编码把数字说清楚了多少？
#
# 公式的前一半：给定编码时，数字各像素的对数概率。设 $p$ 为像素为黑的概率，
#
# $$\log p(x \mid z) = \sum_i x_i \log p_i + (1 - x_i) \log (1 - p_i)$$
#
# （灰色像素的值在 0 与 1 之间，此时它只是常用的损失，而不是严格的概率。）`torch.distributions` 给出同样的数。

# %%
show(vae.log_likelihood)
logits = vae.decode(params["decoder"], mean).detach()
likelihood = vae.log_likelihood(logits, unseen)  # (297,)
expected = torch.distributions.Bernoulli(logits=logits, validate_args=False).log_prob(unseen).sum(1)
torch.testing.assert_close(likelihood, expected)
print(f"before training {likelihood.mean():.2f}; 64 log(1/2) = {-64 * torch.tensor(2.0).log():.2f}")

# %% [markdown] lang="en"
# ## What does a code cost?
#
# The second half. If the encoder may place its Gaussians anywhere, it will put every digit into a corner of its own,
# and a code drawn at random means nothing. So each Gaussian pays for its distance from the standard one,
#
# $$KL(q \,\Vert\, N(0, I)) = \tfrac12 \sum_j \left( \mu_j^2 + \sigma_j^2 - \log \sigma_j^2 - 1 \right)$$
#
# which is 0 for $\mu = 0$, $\sigma = 1$ and positive otherwise.

# %% [markdown] lang="zh"
# ## 编码的代价
#
# 公式的后一半。如果编码器可以随意摆放高斯分布，它会把每个数字放到各自的角落里，这样随机抽取的编码就毫无意义。
# 所以每个高斯分布都要为偏离标准正态付出代价：
#
# $$KL(q \,\Vert\, N(0, I)) = \tfrac12 \sum_j \left( \mu_j^2 + \sigma_j^2 - \log \sigma_j^2 - 1 \right)$$
#
# 当 $\mu = 0$、$\sigma = 1$ 时为 0，其余情况为正。

# %%
show(vae.divergence)
kl = vae.divergence(mean, log_variance).detach()  # (297,)
normal = torch.distributions.Normal
q, prior = normal(mean.detach(), torch.exp(0.5 * log_variance.detach())), normal(0.0, 1.0)
torch.testing.assert_close(kl, torch.distributions.kl_divergence(q, prior).sum(1))

# %% [markdown] lang="en"
# ## The bound
#
# Their difference is the evidence lower bound (ELBO),
#
# $$\log p(x) \ge E_{q(z \mid x)}[\log p(x \mid z)] - KL(q(z \mid x) \,\Vert\, p(z))$$
#
# with the expectation taken by a single sample. Raising it raises, from below, the probability of the digits under the
# model "draw $z$ from $N(0, I)$, decode it". The library's own net and losses give the same number from the same
# parameters and noise.

# %% [markdown] lang="zh"
# ## 下界
#
# 两者之差就是证据下界（ELBO）：
#
# $$\log p(x) \ge E_{q(z \mid x)}[\log p(x \mid z)] - KL(q(z \mid x) \,\Vert\, p(z))$$
#
# 其中的期望只用一个样本来估计。提高下界，就是从下方抬高数字在模型“从 $N(0, I)$ 抽取 $z$ 再解码”之下的概率。
# 用相同的参数和噪声，库中完整的网络与损失给出相同的数。

# %%
show(vae.elbo)
cfg = autoencoder.Config((64,), latent=8, widths=(256,))
out = autoencoder.apply(params, unseen, cfg, key=random.key(2), train=True)
divergence = variational.kl_divergence(out["mean"], out["log_variance"])
full = variational.elbo(variational.bernoulli_log_likelihood(out["output"], unseen), divergence)
plain = vae.elbo(params, unseen, random.normal(random.key(2), (297, 8)))
torch.testing.assert_close(plain, full)

# %% [markdown] lang="en"
# ## Training
#
# Random batches, and Adam on minus the bound. 800 steps take a few seconds. The figure to beat is that of the mean
# image, which tells all digits alike and needs no code.

# %% [markdown] lang="zh"
# ## 训练
#
# 随机取一批数字，用 Adam 最小化下界的相反数。800 步只要几秒钟。作为对照的是平均图像：
# 它对所有数字给出同样的回答，也不需要编码。

# %%
show(vae.train)
vae.train(params, seen, 800, rng, 8)
with torch.no_grad():
    bound = vae.elbo(params, unseen, torch.randn(297, 8, generator=rng)).mean()
    mean_image = vae.log_likelihood(seen.mean(0).logit(1e-4).expand(297, 64), unseen).mean()
print(f"ELBO of unseen digits {bound:.2f} nats, of the mean image {mean_image:.2f}")

# %% [markdown] lang="en"
# How far below $\log p(x)$ is it? With $k$ codes per digit, weighted by $p(x, z) / q(z \mid x)$, the bound becomes
# tighter as $k$ grows (Burda et al. 2016, [arXiv:1509.00519](https://arxiv.org/abs/1509.00519)).

# %% [markdown] lang="zh"
# 它比 $\log p(x)$ 低多少？每个数字取 $k$ 个编码，按 $p(x, z) / q(z \mid x)$ 加权，$k$ 越大下界越紧
# （Burda 等 2016，[arXiv:1509.00519](https://arxiv.org/abs/1509.00519)）。

# %%
with torch.no_grad():
    mean, log_variance = vae.encode(params["encoder"], unseen)
    for k in (1, 10, 200):
        tighter = variational.importance_weighted_bound(
            lambda z: vae.log_likelihood(vae.decode(params["decoder"], z), unseen), mean, log_variance, random.key(3), k
        )
        print(f"{k:3} codes: {tighter.mean():.2f} nats")

# %% [markdown] lang="en"
# ## New digits
#
# To draw one, forget the encoder: take $z$ from $N(0, I)$ and decode it. Left, unseen digits above what comes back
# from their mean codes. Middle, straight through the space of codes from a 0 to a 1, from a 1 to a 2, and so on to 8.
# Right, digits that nobody wrote.

# %% [markdown] lang="zh"
# ## 新的数字
#
# 画新数字时不再需要编码器：从 $N(0, I)$ 抽取 $z$，再解码。左图中，奇数行是未见过的数字，
# 偶数行是由其平均编码还原的结果；中图是在编码空间中沿直线从 0 走到 1、从 1 走到 2，直到 8；右图是从来没有人写过的数字。

# %%
show(vae.sample)
new = vae.sample(params, random.normal(random.key(4), (64, 8)))  # (64, 64)
back = vae.sample(params, mean)  # (297, 64)
pairs = torch.stack([unseen[:32].unflatten(0, (4, 8)), back[:32].unflatten(0, (4, 8))], 1)  # (4, 2, 8, 64)
t = torch.linspace(0, 1, 8)[:, None]
firsts = [mean[target[1500:] == digit][0] for digit in range(9)]  # a code for each of 0 to 8
ways = torch.cat([vae.sample(params, (1 - t) * a + t * b) for a, b in pairwise(firsts)])  # (64, 64)


def tiles(images):
    return torch.nn.functional.pad(images.reshape(8, 8, 8, 8), (1, 1, 1, 1)).transpose(1, 2).reshape(80, 80).numpy()


figure, axes = plt.subplots(1, 3, figsize=(9, 3.3), layout="constrained")
titles = ("unseen digits and their reconstructions", "from one code to another", "drawn from N(0, I)")
for axis, images, title in zip(axes, (pairs, ways, new), titles, strict=True):
    axis.imshow(tiles(images), cmap="gray_r", vmin=0, vmax=1)
    axis.set_title(title, fontsize=9)
    axis.axis("off")
plt.show()

# %% [markdown] lang="en"
# ## Where to go from here
#
# `python nets/explained/vae.py` is the whole of it as a script. [experiments/README.md](../README.md#vae) has six
# autoencoders on your own pictures, with convolutions, classes and tighter bounds;
# [autoencoder.py](../../nets/generative/autoencoder.py) and [variational.py](../../train/losses/variational.py) are
# their net and losses. Next: [a GAN](../tutorials/gan.py) and [diffusion](../tutorials/ddpm.py) on the same digits.

# %% [markdown] lang="zh"
# ## 接下来
#
# `python nets/explained/vae.py` 把上面的全部内容作为一个脚本运行。[experiments/README.md](../README.md#vae)
# 中有六种自编码器，可用于您自己的图片，支持卷积、类别和更紧的下界；
# [autoencoder.py](../../nets/generative/autoencoder.py) 和 [variational.py](../../train/losses/variational.py)
# 是它们的网络与损失。接着可以读同样这些数字上的[GAN](../tutorials/gan.py) 与[扩散模型](../tutorials/ddpm.py)。
