# %% [markdown] lang="en"
# # Denoising diffusion, line by line
#
# A picture is easily destroyed: add noise, a little at a time, until nothing is left. Diffusion learns to undo one such
# step; repeated, it makes pictures out of pure noise. We read
# [a complete one of 100 lines](../../nets/explained/ddpm.py) and [its U-Net](../../nets/explained/unet.py), check them,
# train for a few seconds and draw digits.
#
# You need to know what a convolution, a gradient and a Gaussian are, and a little PyTorch. Ho et al. 2020,
# [Denoising Diffusion Probabilistic Models](https://arxiv.org/abs/2006.11239) (DDPM).

# %% [markdown] lang="zh"
# # 逐行读懂去噪扩散模型
#
# 毁掉一幅图像很容易：一点一点地加噪声，直到什么都不剩。扩散模型学习撤销其中的一步；反复撤销，就能从纯噪声中得到图像。
# 本文阅读[一份 100 行的完整实现](../../nets/explained/ddpm.py)和[它的 U-Net](../../nets/explained/unet.py)，
# 检验它们，训练几秒钟，然后画出数字。
#
# 读者需要知道什么是卷积、梯度和高斯分布，并了解一点 PyTorch。论文：Ho 等 2020，
# [Denoising Diffusion Probabilistic Models](https://arxiv.org/abs/2006.11239)（DDPM）。

# %%
import inspect

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits

from core import random, tree
from nets.explained import ddpm, unet
from nets.generative import unet as full_unet
from train.diffusion import samplers, schedules
from train.diffusion.losses import diffusion_loss


def show(*functions):
    print("\n".join(inspect.getsource(f) for f in functions))


# %% [markdown] lang="en"
# ## From a digit to noise
#
# The digits 0 to 3, 720 of them, of 8x8 pixels between -1 and 1; to take all ten needs a longer training. One step of
# noising shrinks the image a little and adds a little noise, so that the variance stays about 1:
#
# $$x_t = \sqrt{1 - \beta_t} \, x_{t-1} + \sqrt{\beta_t} \, \varepsilon_t, \qquad \varepsilon_t \sim N(0, I)$$
#
# Sums of Gaussians are Gaussian, so all steps up to $t$ can be taken in one jump:
#
# $$x_t = \sqrt{\bar\alpha_t} \, x_0 + \sqrt{1 - \bar\alpha_t} \, \varepsilon, \qquad
# \bar\alpha_t = \prod_{s \le t} (1 - \beta_s)$$
#
# $\bar\alpha$ falls from almost 1 to almost 0. We take 40 steps (the paper takes 1000); in the code times count from 0.

# %% [markdown] lang="zh"
# ## 从数字到噪声
#
# 数字 0 到 3，共 720 个，8x8 像素，取值在 -1 到 1 之间（学会全部十个数字需要训练更久）。加噪的一步把图像略微缩小，
# 再加一点噪声，使方差保持在 1 左右：
#
# $$x_t = \sqrt{1 - \beta_t} \, x_{t-1} + \sqrt{\beta_t} \, \varepsilon_t, \qquad \varepsilon_t \sim N(0, I)$$
#
# 高斯变量之和仍是高斯变量，所以到 $t$ 为止的所有步可以一次完成：
#
# $$x_t = \sqrt{\bar\alpha_t} \, x_0 + \sqrt{1 - \bar\alpha_t} \, \varepsilon, \qquad
# \bar\alpha_t = \prod_{s \le t} (1 - \beta_s)$$
#
# $\bar\alpha$ 从接近 1 降到接近 0。这里取 40 步（论文取 1000 步）；代码中的时间从 0 开始。

# %%
data, target = load_digits(return_X_y=True)
digits = torch.tensor(data[target < 4] / 8 - 1, dtype=torch.float32).reshape(-1, 1, 8, 8)  # (720, 1, 8, 8)
show(ddpm.schedule, ddpm.diffuse)
T = 40
alpha_bars = ddpm.schedule(T)  # (40,)
schedule = schedules.linear(T)
torch.testing.assert_close(alpha_bars, schedule.alpha_bars)

# Step by step: the scale of the image and the variance of the noise after all steps, against the jump.
scale, variance = 1.0, 0.0
for beta in schedule.betas.tolist():
    scale, variance = (1 - beta) ** 0.5 * scale, (1 - beta) * variance + beta
print(f"after {T} steps: scale {scale:.6f}, variance {variance:.6f}")
torch.testing.assert_close(
    torch.tensor([scale**2, variance]).double(), torch.stack([alpha_bars[-1], 1 - alpha_bars[-1]])
)

time = torch.tensor([0, 4, 8, 12, 16, 20, 24, 39])
noise = random.normal(random.key(1), (8, 1, 8, 8))
noised = ddpm.diffuse(alpha_bars, digits[:1].expand(8, 1, 8, 8), time, noise)
figure, axes = plt.subplots(1, 8, figsize=(9, 1.5), layout="constrained")
for axis, image, t in zip(axes, noised, time.tolist(), strict=True):
    axis.imshow(image[0].numpy(), cmap="gray_r", vmin=-1, vmax=1)
    axis.set_title(f"t = {t}\nscale {alpha_bars[t].sqrt():.2f}", fontsize=8)
    axis.axis("off")
plt.show()

# %% [markdown] lang="en"
# ## What the net is asked
#
# Given $x_t$ and $t$: which noise is in there? To know the noise is to know the image, by the equation above. The loss
# is the squared error, at a random time for each image (equation 14 of the paper):
#
# $$L = \lVert \varepsilon - \varepsilon_\theta(x_t, t) \rVert^2$$
#
# A net that always answers 0 has a loss of about 1, the variance of the noise.

# %% [markdown] lang="zh"
# ## 网络的任务
#
# 给定 $x_t$ 和 $t$：其中的噪声是什么？由上面的等式，知道噪声就知道图像。损失是平方误差，
# 每幅图像取一个随机的时间（论文式 14）：
#
# $$L = \lVert \varepsilon - \varepsilon_\theta(x_t, t) \rVert^2$$
#
# 总是回答 0 的网络损失约为 1，也就是噪声的方差。

# %%
show(ddpm.loss)
time = random.randint(random.key(2), (len(digits),), 0, T).long()
noise = random.normal(random.key(3), digits.shape)
nothing = ddpm.loss(lambda x, time: torch.zeros_like(x), alpha_bars, digits, time, noise)  # (720,)
torch.testing.assert_close(nothing, noise.square().mean((1, 2, 3)))
print(f"always 0: {nothing.mean():.3f}")

# %% [markdown] lang="en"
# ## A net that sees coarse and fine
#
# What is noise in a pixel shows only in its neighbourhood, so the net is convolutional. It halves the image, works
# there, and doubles it again; on the way up each block also sees what was computed on the way down at its size. That is
# the U.
#
# The net must know the time: a little noise is removed differently from a lot. The time becomes a vector of sines and
# cosines of many frequencies, and each residual block adds a number per channel that is computed from it.

# %% [markdown] lang="zh"
# ## 既看粗又看细的网络
#
# 一个像素里哪些是噪声，要看它的邻域才知道，所以用卷积网络。它把图像缩小一半，在那里处理，再放大回来；
# 上行路径中的每个块还能看到下行路径中同一尺寸的结果。这就是 U 形的由来。
#
# 网络必须知道时间：噪声少时与噪声多时的去除方法不同。时间先变成许多频率的正弦和余弦组成的向量，
# 每个残差块再由它为每个通道算出一个数并加上去。

# %%
show(unet.time_embedding, unet.residual, unet.unet)
rng = torch.Generator().manual_seed(0)  # the plain files take torch's own generator
params = unet.init(rng, 16, 32)


def model(x, time):
    return unet.unet(params, x, time)


print(f"{tree.count(params)} parameters; {tuple(digits[:2].shape)} -> {tuple(model(digits[:2], time[:2]).shape)}")

# %% [markdown] lang="en"
# ## Training
#
# 160 steps with 32 random digits, times and noises each: a few seconds, and enough to recognise digits.

# %% [markdown] lang="zh"
# ## 训练
#
# 160 步，每步 32 个随机的数字、时间和噪声：几秒钟，足以画出认得出的数字。

# %%
show(ddpm.train)
ddpm.train(params, alpha_bars, digits, 160, rng, batch=32, rate=4e-3)
with torch.no_grad():
    losses = ddpm.loss(model, alpha_bars, digits[:500], time[:500], noise[:500])  # (500,)
print(f"loss {losses.mean():.3f}; at times below 10 {losses[time[:500] < 10].mean():.3f}")

# %% [markdown] lang="en"
# The library's net and loss, with the same parameters, times and noise:

# %% [markdown] lang="zh"
# 库中完整的网络与损失，使用相同的参数、时间和噪声：

# %%
cfg = full_unet.Config(1, (16, 32), blocks=1, attention=(), groups=8)


def full_model(x, time):
    return full_unet.apply(params, x, time, cfg)


with torch.no_grad():
    expected = diffusion_loss(full_model, schedule, digits[:500], time=time[:500], noise=noise[:500])
torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)

# %% [markdown] lang="en"
# ## One step back
#
# Suppose we knew the image $x_0$ behind $x_t$. Then the picture one step earlier has a Gaussian distribution, by Bayes'
# rule (equation 7 of the paper):
#
# $$x_{t-1} \sim N\left( \frac{\sqrt{\bar\alpha_{t-1}} \beta_t}{1 - \bar\alpha_t} x_0 +
# \frac{\sqrt{1 - \beta_t} (1 - \bar\alpha_{t-1})}{1 - \bar\alpha_t} x_t, \;
# \frac{1 - \bar\alpha_{t-1}}{1 - \bar\alpha_t} \beta_t \right)$$
#
# The precisions of the two Gaussians that Bayes' rule multiplies add up, which checks the variance. We do not know
# $x_0$, but the net's guess of the noise gives a guess of it, and that is put in its place: far from perfect at first,
# when $x_t$ is almost pure noise, and better with every step.

# %% [markdown] lang="zh"
# ## 往回走一步
#
# 假设我们知道 $x_t$ 对应的图像 $x_0$。由贝叶斯公式，前一步的图像服从高斯分布（论文式 7）：
#
# $$x_{t-1} \sim N\left( \frac{\sqrt{\bar\alpha_{t-1}} \beta_t}{1 - \bar\alpha_t} x_0 +
# \frac{\sqrt{1 - \beta_t} (1 - \bar\alpha_{t-1})}{1 - \bar\alpha_t} x_t, \;
# \frac{1 - \bar\alpha_{t-1}}{1 - \bar\alpha_t} \beta_t \right)$$
#
# 贝叶斯公式中相乘的两个高斯分布的精度相加，可以用来检验这个方差。$x_0$ 并不知道，但由网络猜出的噪声可以得到 $x_0$
# 的猜测，就用它代替：开始时 $x_t$ 几乎是纯噪声，猜测很不准，之后一步比一步好。

# %%
show(ddpm.sample)
now, last, beta = alpha_bars[1:], alpha_bars[:-1], schedule.betas[1:]
precision = (1 - beta) / beta + 1 / (1 - last)  # of x_t given x_(t-1), and of x_(t-1) given x_0
torch.testing.assert_close(1 / precision, (1 - last) / (1 - now) * beta)

# %% [markdown] lang="en"
# ## New digits
#
# Start from noise and step back 40 times. The library's sampler gives the same images from the same noise, and tells us
# of each step on the way.

# %% [markdown] lang="zh"
# ## 新的数字
#
# 从噪声出发，往回走 40 步。用同样的噪声，库中的采样器给出同样的图像，并在每一步回报中间结果。

# %%
start, noises = random.normal(random.key(4), (36, 1, 8, 8)), random.normal(random.key(5), (T, 36, 1, 8, 8))
new = ddpm.sample(model, alpha_bars, start, noises)  # (36, 1, 8, 8)
film = [start]
sampler = samplers.ddpm(schedule)
with torch.no_grad():
    same = samplers.sample(sampler, full_model, start, noise=noises, callback=lambda i, x, image: film.append(x))
torch.testing.assert_close(new, same, rtol=0, atol=1e-3)


def tiles(images, rows, columns):
    padded = torch.nn.functional.pad(images.reshape(rows, columns, 8, 8), (1, 1, 1, 1), value=-1.0)
    return padded.transpose(1, 2).reshape(10 * rows, 10 * columns).numpy()


moments = [0, 16, 24, 28, 32, 36, 38, 40]
rows = torch.stack([film[i][:6] for i in moments], 1)  # (6, 8, 1, 8, 8)
figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
for axis, images, columns in zip(axes, (rows, new), (8, 6), strict=True):
    axis.imshow(tiles(images, 6, columns), cmap="gray_r", vmin=-1, vmax=1)
    axis.set_yticks([])
axes[0].set_xticks([10 * i + 5 for i in range(8)], moments)
axes[0].set(xlabel="steps back", title="six digits on their way out of the noise")
axes[1].set_xticks([])
axes[1].set(xlabel=f"after {T} steps", title="36 new digits")
plt.show()

# %% [markdown] lang="en"
# ## Where to go from here
#
# `python nets/explained/ddpm.py` trains longer. [experiments/README.md](../README.md#diffusion) has other schedules,
# targets and samplers (DDIM needs fewer steps), classes and guidance, your own pictures and published weights;
# [process.py](../../train/diffusion/process.py) and [samplers.py](../../train/diffusion/samplers.py) are what this
# tutorial compared with. Other ways to draw the same digits: [a VAE](../tutorials/vae.py) and
# [a GAN](../tutorials/gan.py).

# %% [markdown] lang="zh"
# ## 接下来
#
# `python nets/explained/ddpm.py` 训练更久。[experiments/README.md](../README.md#diffusion) 中有其他噪声方案、
# 预测目标和采样器（DDIM 只需更少的步数）、类别与引导，可用于您自己的图片，也能加载公开的权重；
# [process.py](../../train/diffusion/process.py) 和 [samplers.py](../../train/diffusion/samplers.py)
# 是本文用来对照的实现。画同样这些数字的其他方法：[VAE](../tutorials/vae.py) 与 [GAN](../tutorials/gan.py)。
