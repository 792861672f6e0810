# %% [markdown] lang="en"
# # Watching a training with TensorBoard
#
# A training says little while it runs: a number per step. Written to a file, the numbers become curves that can be
# watched while it goes on, compared with other runs, and read again a year later. Here we log scalars, histograms and
# pictures of two runs, look into the files, read everything back, and draw the curves ourselves, smoothed as
# TensorBoard smooths them.
#
# You need to know what a training step is. Nothing is opened in a browser here; the command for it is at the end.

# %% [markdown] lang="zh"
# # 用 TensorBoard 观察训练
#
# 训练过程中能看到的东西很少：每一步一个数。把这些数写入文件，就能在训练进行时看曲线，与其他运行比较，
# 一年后还能重新读出来。本文记录两次运行的标量、直方图和图片，看看文件里有什么，再全部读回来，
# 并用与 TensorBoard 相同的平滑方法画出曲线。
#
# 读者需要知道什么是训练步。本文不打开浏览器，所用的命令写在最后。

# %%
import struct
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event
from torch.utils.tensorboard import SummaryWriter

from core import per_example, random
from nets.classifiers import mlp
from train import optimizers
from train.data import batching
from train.data.images import arrays
from train.losses import cross_entropy
from train.run.logs import RunLog, read_curves, read_metrics, read_result
from train.step import create, make_step

# %% [markdown] lang="en"
# ## Two runs, logged
#
# `RunLog(folder)` opens the record of one run: `config.json` at once; each call of `metrics` adds a line of JSON to
# `metrics.jsonl` and an event for TensorBoard; `result` writes the final figures. Names before a slash, `train/loss`
# and `train/accuracy`, share a group of charts.
#
# A histogram says more than a mean: we log the gradient norms of the 64 examples of a batch, which
# `per_example.reports` computes. `histogram` takes the edges of the bins and the counts. A log is read by people:
# every tenth step is enough, and the training seldom waits for the disk.

# %% [markdown] lang="zh"
# ## 记录两次运行
#
# `RunLog(folder)` 打开一次运行的记录：立刻写出 `config.json`；每次调用 `metrics` 都在 `metrics.jsonl` 里加一行 JSON，
# 并为 TensorBoard 加一个事件；`result` 写入最终结果。斜杠前的名字相同，例如 `train/loss` 和 `train/accuracy`，
# 图表就归为一组。
#
# 直方图比平均值更能说明问题：我们记录一批 64 个样本各自的梯度范数，由 `per_example.reports` 算出。
# `histogram` 接受区间边界和计数。日志是给人看的，每十步记一次就够了，训练也很少需要等待磁盘。

# %%
temporary = tempfile.TemporaryDirectory()
runs = Path(temporary.name)
train, test = arrays.digits()
cfg, edges = mlp.Config((64, 64, 10)), torch.logspace(-6, 2, 33)


def losses(params, batch, keys=None):
    return cross_entropy(mlp.apply(params, batch[0], cfg), batch[1], reduction="none")  # (examples,)


def fit(name, learning_rate, steps=200):
    optimizer = optimizers.sgd(learning_rate, momentum=0.9)
    step = make_step(losses, optimizer, compile=False)
    state = create(random.key(0), mlp.spec(cfg), optimizer)
    with RunLog(runs / name, {"learning_rate": learning_rate, "net": cfg}, total=steps, quiet=True) as log:
        for at in range(1, steps + 1):
            rows = batching.epoch_batch(random.key(1), at - 1, len(train.labels), 64)
            state, metrics = step(state, batch := (train.images[rows], train.labels[rows]))
            if at % 10 == 0:
                norms = per_example.reports(losses, state.params, batch).total_norm  # (64,)
                log.metrics(at, {f"train/{key}": value for key, value in metrics.items()})
                log.histogram(at, "train/gradient norms", edges, torch.histogram(norms, edges).hist.int())
            if at % 50 == 0:
                log.metrics(at, {"test/loss": losses(state.params, test).mean()})
        right = mlp.apply(state.params, test.images, cfg).argmax(1) == test.labels
        log.result({"accuracy": float(right.float().mean())})
    return state, right


(_, _), (state, right) = fit("slow", 0.01), fit("fast", 0.1)
for path in sorted((runs / "fast").iterdir()):
    print(path.name.split(".tfevents")[0], path.stat().st_size, "bytes")
print({name: read_result(runs / name) for name in ("slow", "fast")})
print(read_metrics(runs / "fast")[0])

# %% [markdown] lang="en"
# ## Pictures
#
# Our runs leave pictures as PNG files in their folder. For those that should appear in TensorBoard, torch's
# `SummaryWriter` writes an events file; give it a folder of its own, as TensorBoard expects one writer per folder.
# Here: test digits that the net takes for another.

# %% [markdown] lang="zh"
# ## 图片
#
# 我们的运行把图片存成文件夹里的 PNG 文件。想在 TensorBoard 里看到的图片，
# 可以用 torch 的 `SummaryWriter` 写入事件文件；请给它单独的文件夹，因为 TensorBoard 认为每个文件夹只有一个写入者。
# 这里写入的是网络认错的测试数字。

# %%
wrong = (~right).nonzero()[:, 0]
mistakes = torch.cat(list(1 - test.images[wrong]), -1)  # (1, 8, 8 * count), white paper
with SummaryWriter(runs / "fast" / "pictures") as writer:
    writer.add_image("test/mistakes", mistakes, 200)
print(len(wrong), "of", len(right), "are wrong:", tuple(mistakes.shape))

# %% [markdown] lang="en"
# ## Inside the file
#
# An events file is a row of records: the length (8 bytes), a checksum of it (4), the content, a checksum of that (4).
# The content is an `Event` of Protocol Buffers: a time, a step, and named values. As records are only ever added, a
# file can be read while it grows, and a killed run loses its last record at most. (It still belongs to its process: a
# resumed run begins a new file, and TensorBoard joins them.)

# %% [markdown] lang="zh"
# ## 文件里有什么
#
# 事件文件就是一连串记录：长度（8 字节）、长度的校验和（4 字节）、内容、内容的校验和（4 字节）。
# 内容是 Protocol Buffers 格式的 `Event`：时间、步数，以及若干有名字的值。由于只会追加记录，文件在增长时就可以读，
# 进程被杀死最多丢失最后一条。（文件属于写它的进程：恢复的运行会新建一个文件，TensorBoard 会把它们接起来。）

# %%
content = next((runs / "fast").glob("events.*")).read_bytes()
events, start = [], 0
while start < len(content):
    (length,) = struct.unpack_from("<Q", content, start)
    events.append(Event.FromString(content[start + 12 : start + 12 + length]))
    start += 8 + 4 + length + 4
print(len(events), "events; the second:", {v.tag: round(v.simple_value, 4) for v in events[1].summary.value})

# %% [markdown] lang="en"
# ## Reading back
#
# TensorBoard's own reader finds the same values (of histograms it keeps only the last, unless told otherwise), and so
# does `metrics.jsonl`, for which no package is needed. `read_curves` gives (steps, values) by name.

# %% [markdown] lang="zh"
# ## 读回来
#
# TensorBoard 自己的读取器得到同样的值（直方图默认只保留最后一个，除非另外指定），`metrics.jsonl` 里也一样，
# 读它不需要任何软件包。`read_curves` 按名字给出（步数，值）。

# %%
reader = EventAccumulator(str(runs / "fast"), size_guidance={"histograms": 0})  # 0: all of them
reader.Reload()
print(reader.Tags()["scalars"], reader.Tags()["histograms"])
steps, values = read_curves(runs / "fast", "train/loss")["train/loss"]
assert [event.step for event in reader.Scalars("train/loss")] == steps
torch.testing.assert_close([event.value for event in reader.Scalars("train/loss")], values, rtol=1e-6, atol=0)
own = [v.simple_value for event in events for v in event.summary.value if v.tag == "train/loss"]
assert own == [event.value for event in reader.Scalars("train/loss")]

histograms = reader.Histograms("train/gradient norms")
counts = np.array([event.histogram_value.bucket for event in histograms])[:, 1:]  # (20 histograms, 32 bins)
print("histograms", counts.shape, "of", set(counts.sum(1).tolist()), "examples")

pictures = EventAccumulator(str(runs / "fast" / "pictures"))
pictures.Reload()
image = pictures.Images("test/mistakes")[0]
print("picture", (image.height, image.width), image.encoded_image_string[:4])

# %% [markdown] lang="en"
# ## Smoothing
#
# The slider in TensorBoard is a running mean with weight $w$, divided by the sum of the weights so that it is right
# from the first point on:
#
# $$m_t = w \, m_{t-1} + (1 - w) \, x_t, \qquad \hat m_t = \frac{m_t}{1 - w^t}$$
#
# It lags behind, and hides how much single batches differ: look at the pale curve, too.

# %% [markdown] lang="zh"
# ## 平滑
#
# TensorBoard 里的滑块是权重为 $w$ 的滑动平均，再除以权重之和，使它从第一个点起就是正确的：
#
# $$m_t = w \, m_{t-1} + (1 - w) \, x_t, \qquad \hat m_t = \frac{m_t}{1 - w^t}$$
#
# 它会滞后，也会掩盖各批次之间的差异，所以浅色的原始曲线也要看。

# %%


def smoothed(values, w=0.6):
    mean, out = 0.0, []
    for t, x in enumerate(values, 1):
        mean = w * mean + (1 - w) * x
        out.append(mean / (1 - w**t))
    return out


weights = 0.6 ** np.arange(len(values))[::-1]
np.testing.assert_allclose(smoothed(values)[-1], np.average(values, weights=weights))

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
for name, colour in (("slow", "tab:blue"), ("fast", "tab:orange")):
    curves = read_curves(runs / name, "train/loss", "test/loss")
    left.semilogy(*curves["train/loss"], color=colour, alpha=0.3)
    left.semilogy(curves["train/loss"][0], smoothed(curves["train/loss"][1]), color=colour, label=f"{name}, train")
    left.semilogy(*curves["test/loss"], "o", color=colour, label=f"{name}, test")
left.set(xlabel="step", ylabel="loss")
left.legend(fontsize=8)
shown = right.pcolormesh([0, *steps], edges.numpy(), counts.T, cmap="Greys", vmax=16)
right.set(xlabel="step", ylabel="gradient norm of an example", yscale="log", title="run 'fast'")
figure.colorbar(shown, label="examples", extend="max")
plt.show()
temporary.cleanup()

# %% [markdown] lang="en"
# ## Where to go from here
#
# Every script of this library logs like this, into `runs/SCRIPT/NAME/`; watch them while they run, all in one page,
# at the address that this prints:
#
# ```sh
# tensorboard --logdir runs
# ```
#
# [train/README.md](../../train/README.md#runs-and-checkpoints): runs with checkpoints.
# [experiments/README.md](../README.md#gradients): pictures of gradient norms of larger nets.

# %% [markdown] lang="zh"
# ## 接下来
#
# 本库的每个脚本都这样记录到 `runs/SCRIPT/NAME/`；训练进行时，在下面命令给出的网址上就能同时观察所有运行：
#
# ```sh
# tensorboard --logdir runs
# ```
#
# [train/README.md](../../train/README.md#runs-and-checkpoints)：带检查点的运行。
# [experiments/README.md](../README.md#gradients)：较大网络的梯度范数图。
