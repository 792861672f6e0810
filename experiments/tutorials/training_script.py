# %% [markdown] lang="en"
# # The structure of a training script
#
# Every training does the same: take a batch, make a step, look how it goes, save, stop. Trainer classes, such as
# Lightning's, hide this loop and call your methods from it; here the loop is part of the script. We write a training
# with validation, early stopping and the best parameters as a visible loop, check it against `torch.optim`, put the
# same into a `Trainer` of forty lines that you may copy, and then give it what a script of this library has: a
# folder, a log, checkpoints and `--resume`.
#
# You need to know what a loss, a gradient step and an epoch are.

# %% [markdown] lang="zh"
# # 训练脚本的结构
#
# 所有训练做的事都一样：取一个批次、走一步、看看效果、保存、停止。Lightning 之类的 Trainer 类把这个循环藏起来，
# 由它调用您的方法；在这里，循环就写在脚本里。本文先用看得见的循环写一次带验证、早停和最优参数的训练，
# 与 `torch.optim` 核对，再把同样的内容写成一个四十行、可以直接拿去用的 `Trainer`，最后加上本库脚本都有的东西：
# 文件夹、日志、检查点和 `--resume`。
#
# 读者需要知道什么是损失、梯度更新和轮次（epoch）。

# %%
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch

from core import random, spec, tree
from nets.classifiers import mlp
from train import optimizers
from train.data import batching
from train.data.images import arrays
from train.losses import cross_entropy
from train.run import Common, Count, Positive, Shared, begin, checkpoints
from train.run.logs import read_curves
from train.step import create, make_step, start

temporary = tempfile.TemporaryDirectory()
runs = Path(temporary.name)

# %% [markdown] lang="en"
# ## The parts
#
# Four parts, each of which knows nothing of the others: the data, in parts for training and for validation (with few
# examples, so that validation soon stops improving); the net, a spec and a function; the loss, one number per
# example; the optimizer. `make_step` makes of loss and optimizer a pure function
# `(state, batch) -> (state, metrics)`.

# %% [markdown] lang="zh"
# ## 各个部分
#
# 四个部分互不相知：数据，分成训练和验证两部分（样本很少，因此验证结果很快就不再改善）；网络，即一个 spec 和一个函数；
# 损失，每个样本一个数；优化器。`make_step` 把损失和优化器合成一个纯函数 `(state, batch) -> (state, metrics)`。

# %%
digits, _ = arrays.digits()
train, validation = (tree.map(lambda x: x[part], digits) for part in (slice(200), slice(200, 700)))  # noqa: B023
cfg = mlp.Config((64, 64, 10))
model = mlp.spec(cfg)


def losses(params, batch, keys=None):
    return cross_entropy(mlp.apply(params, batch[0], cfg), batch[1], reduction="none")  # (examples,)


def figures(params, data):
    right = mlp.apply(params, data[0], cfg).argmax(1) == data[1]
    return {"loss": float(losses(params, data).mean()), "accuracy": float(right.float().mean())}


optimizer = optimizers.adam(1e-2)
step = make_step(losses, optimizer, compile=False)

# %% [markdown] lang="en"
# ## The loop
#
# The whole training, from top to bottom. A line for each decision: which batch (a function of key and step), when to
# validate, what counts as best, when to stop. What you want to be different you change where it stands.

# %% [markdown] lang="zh"
# ## 循环
#
# 整个训练从上到下一目了然，每个决定对应一行：取哪个批次（key 与步数的函数）、何时验证、以什么为最优、何时停止。
# 想改什么，就在它所在的地方改。

# %%
BATCH, PATIENCE = 50, 5
create_key, data_key = random.split(random.key(0))
initial = create(create_key, model, optimizer)
state, best, waited, history = initial, None, 0, []
for epoch in range(40):
    for t in range(epoch * 4, epoch * 4 + 4):  # 200 / 50 steps
        rows = batching.epoch_batch(data_key, t, 200, BATCH)
        state, metrics = step(state, (train.images[rows], train.labels[rows]))
    history.append({"train_loss": figures(state.params, train)["loss"], **figures(state.params, validation)})
    if best is None or history[-1]["loss"] < best[1]["loss"]:
        best, waited = (state, history[-1]), 0
    else:
        waited += 1
    if waited == PATIENCE:
        break
print(f"stopped after epoch {epoch}; best:", {name: round(value, 4) for name, value in best[1].items()})

# %% [markdown] lang="en"
# The same in the usual form of PyTorch, from the same initial values and with the same batches, ends at the same
# loss.

# %% [markdown] lang="zh"
# 用 PyTorch 的常规写法，从同样的初始值、同样的批次出发，得到的损失相同。

# %%
module = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
first, second = initial.params["layers"]
module[0].load_state_dict(first)
module[2].load_state_dict(second)
adam = torch.optim.Adam(module.parameters(), lr=1e-2)
for t in range(4 * len(history)):
    rows = batching.epoch_batch(data_key, t, 200, BATCH)
    adam.zero_grad()
    torch.nn.functional.cross_entropy(module(train.images[rows].flatten(1)), train.labels[rows]).backward()
    adam.step()
theirs = torch.nn.functional.cross_entropy(module(validation.images.flatten(1)), validation.labels)
torch.testing.assert_close(theirs.item(), history[-1]["loss"], rtol=1e-3, atol=1e-5)
print("validation loss at the end:", round(history[-1]["loss"], 5), "torch.optim:", round(theirs.item(), 5))

# %% [markdown] lang="en"
# ## The same as a Trainer
#
# Who trains ten models alike does not want to write the loop ten times. This class holds what stays the same. Where
# Lightning has callbacks there is a line in `fit`, and the class is short enough to be changed. Its checkpoints are
# files: the best state outlives the process.

# %% [markdown] lang="zh"
# ## 写成 Trainer
#
# 如果要以同样的方式训练十个模型，就不想把循环写十遍。这个类收纳了不变的部分。Lightning 用回调的地方，
# 这里只是 `fit` 中的一行，代码很短，直接修改即可。它的检查点是文件，进程结束后最优状态仍在。

# %%


@dataclass
class Trainer:
    """Training with validation, early stopping and the best checkpoint, of `losses(params, batch, keys)`."""

    losses: Callable
    figures: Callable
    model: Any
    optimizer: optimizers.Optimizer
    folder: Path
    batch: int = 50
    epochs: int = 40
    patience: int = 5
    monitor: str = "loss"
    compile: bool = False

    def fit(self, train, validation, key):
        """(the state with the least `monitor`, figures of every epoch)."""
        create_key, data_key = random.split(key)
        state = create(create_key, self.model, self.optimizer)
        step = make_step(self.losses, self.optimizer, compile=self.compile)
        count, history = len(tree.leaves(train)[0]), []
        with checkpoints.Checkpoints(self.folder, argv=[], keep_last=1) as saved:
            for epoch in range(self.epochs):
                for t in range(epoch * (count // self.batch), (epoch + 1) * (count // self.batch)):
                    rows = batching.epoch_batch(data_key, t, count, self.batch)
                    state, _ = step(state, tree.map(lambda x: x[rows], train))  # noqa: B023
                history.append(self.validate(state, train, validation))
                values = [row[self.monitor] for row in history]
                if values[-1] == min(values):
                    saved.save(epoch, state, history[-1])
                if epoch % 5 == 0:  # the place of a callback
                    print("epoch", epoch, {name: round(value, 4) for name, value in history[-1].items()})
                if len(values) - 1 - values.index(min(values)) == self.patience:
                    break
        return self.restore(), history

    def validate(self, state, train, validation):
        train_loss = self.figures(state.params, train)["loss"]
        return {"train_loss": train_loss, **self.figures(state.params, validation)}

    def restore(self):
        """The best state."""
        return checkpoints.restore(self.folder, create(random.key(0), self.model, self.optimizer))


trainer = Trainer(losses, figures, model, optimizer, runs / "trainer")
best_state, same = trainer.fit(train, validation, random.key(0))
assert same == history
torch.testing.assert_close(best_state, best[0], rtol=0, atol=0)

# %% [markdown] lang="en"
# ## Why our loop is visible
#
# Then an idea comes that the class did not foresee: to average the parameters over the steps and validate the
# average; two optimizers in turn; a loss that changes with what was seen. In a Trainer each wants another hook,
# called at another time, and to know what happens when, one reads the Trainer. In a loop it is a line. Here is the
# first of them, an average with decay 0.9.

# %% [markdown] lang="zh"
# ## 为什么我们的循环是可见的
#
# 接着来了一个这个类没有预料到的想法：对各步的参数做平均，验证平均后的参数；轮流使用两个优化器；
# 让损失随看到的情况变化。在 Trainer 里，每个想法都需要新的钩子，在不同的时刻调用，要弄清什么时候发生什么，
# 就得去读 Trainer 的代码。在循环里只是加一行。下面是第一个想法，衰减为 0.9 的平均。

# %%
state, average, averaged = initial, initial.params, []
for t in range(4 * len(history)):
    rows = batching.epoch_batch(data_key, t, 200, BATCH)
    state, _ = step(state, (train.images[rows], train.labels[rows]))
    average = tree.map(lambda a, p: 0.9 * a + 0.1 * p, average, state.params)  # the line
    if t % 4 == 3:
        averaged.append(figures(average, validation)["loss"])
print("validation loss of the average:", round(min(averaged), 4), "of the parameters:", round(best[1]["loss"], 4))

# %% [markdown] lang="en"
# ## A script of this library
#
# What belongs to no idea is in `train.run`: the arguments, a dataclass whose fields become flags; `begin` makes a new
# run or finds the one that `--resume` continues; `run.steps` counts and ends cleanly at Ctrl-C; `record` logs and
# stops when a number is not finite; `due` says when; `save` writes a checkpoint. The loop stays yours. In a script
# the last line is `command_line.run(__doc__, (Args, main), root=RUNS)`; here we call `main` ourselves: 40 steps, and
# then, resumed, up to 120.

# %% [markdown] lang="zh"
# ## 本库的脚本
#
# 与想法本身无关的东西都在 `train.run` 里：参数是一个 dataclass，字段就是命令行选项；`begin` 新建一次运行，
# 或找到 `--resume` 要继续的那一次；`run.steps` 计步，遇到 Ctrl-C 也能干净地结束；`record` 记录日志，
# 出现非有限值就停止；`due` 判断时机；`save` 写检查点。循环仍然由您来写。
# 脚本的最后一行是 `command_line.run(__doc__, (Args, main), root=RUNS)`；这里我们直接调用 `main`：先走 40 步，
# 再恢复运行到 120 步。

# %%


@dataclass(frozen=True)
class Args:
    steps: Count = 120
    """Training steps."""
    learning_rate: Positive = 1e-2
    """Learning rate of Adam."""
    common: Shared = Common(name="whole", compile=False)


def main(args):
    run = begin(runs, args, free=("steps",))
    optimizer = optimizers.adam(args.learning_rate)
    state = run.restore(start(data_key, spec.init(create_key, model), model, optimizer), {"net": cfg}, args.steps)
    step = make_step(losses, optimizer, policy=run.policy, compile=args.common.compile)
    batches = (batching.epoch_batch(data_key, t, 200, BATCH) for t in run.remaining)
    with run.open({}):
        for at, rows in run.steps(batches):
            state, metrics = step(state, (train.images[rows], train.labels[rows]))
            run.record(at, metrics, BATCH)
            if run.due(at, 20):
                run.log.metrics(at, {f"validation/{k}": v for k, v in figures(state.params, validation).items()})
                run.save(at, state)
        run.result(figures(state.params, validation))
    return state


whole = main(Args())
main(Args(steps=40, common=Common(name="resumed", compile=False)))
resumed = main(Args(common=Common(name="resumed", compile=False, resume=True)))
torch.testing.assert_close(resumed, whole, rtol=0, atol=0)
print(sorted(path.name.split(".tf")[0] for path in (runs / "resumed").iterdir()))

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
epochs = range(len(history))
left.plot(epochs, [row["train_loss"] for row in history], label="training")
left.plot(epochs, [row["loss"] for row in history], label="validation")
left.plot(epochs, averaged, "--", label="validation, averaged parameters")
at = history.index(best[1])
left.plot(at, best[1]["loss"], "k*", markersize=10, label="best")
left.set(xlabel="epoch", ylabel="loss", ylim=(0, 1.5), title="early stopping")
left.legend(fontsize=8)
for name, style in (("whole", "-"), ("resumed", "o")):
    right.plot(*read_curves(runs / name, "train/loss")["train/loss"], style, label=f"run '{name}'")
right.axvline(40, color="black", linewidth=0.8, linestyle=":")
right.set(xlabel="step", ylabel="training loss", title="stopped at step 40 and resumed")
right.legend()
plt.show()
temporary.cleanup()

# %% [markdown] lang="en"
# ## Where to go from here
#
# [experiments/README.md](../README.md#how-to-write-one): a whole script, with what to check.
# [train/README.md](../../train/README.md#runs-and-checkpoints): what is in the folder of a run.
# `experiments/classify.py` is such a script for pictures.

# %% [markdown] lang="zh"
# ## 接下来
#
# [experiments/README.md](../README.md#how-to-write-one)：一个完整的脚本和检查要点。
# [train/README.md](../../train/README.md#runs-and-checkpoints)：运行文件夹里有什么。
# `experiments/classify.py` 就是这样一个处理图片的脚本。
