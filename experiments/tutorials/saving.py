# %% [markdown] lang="en"
# # Saving and loading
#
# A trained net is worth what it cost, and so is half a training. Here we write parameters to a file and read such a
# file by hand, see why a pickle from a stranger is dangerous, load weights that another library wrote under its own
# names, and save a whole training so that it continues as if it had never stopped: bit for bit.
#
# You need to know what parameters, an optimizer and a training step are. Parameters here are a *tree*: dicts and
# lists with tensors at the leaves.

# %% [markdown] lang="zh"
# # 保存与加载
#
# 训练好的网络来之不易，训练到一半的状态也一样。本文把参数写入文件，再手工读出这种文件；
# 看看为什么来历不明的 pickle 很危险；加载另一个库按自己的命名写出的权重；最后保存整个训练状态，
# 使训练接着进行时与从未中断过一样，每一位都相同。
#
# 读者需要知道什么是参数、优化器和训练步。这里的参数是一棵*树*：由字典和列表组成，叶子是张量。

# %%
import json
import os
import pickle
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

from core import random, spec, tree
from nets.classifiers import mlp
from nets.weights import Rename, fill, read
from train import optimizers
from train.data import batching
from train.data.images import arrays
from train.losses import cross_entropy
from train.run import checkpoints
from train.step import create, make_step

temporary = tempfile.TemporaryDirectory()
folder = Path(temporary.name)


def refused(f):  # f must raise: its error in one line, without the name of our temporary folder
    try:
        f()
    except (ValueError, pickle.UnpicklingError) as error:
        print(f"{type(error).__name__}: {str(error).partition('. ')[0].replace(str(folder), '')}")
    else:
        raise AssertionError("nothing was refused")


# %% [markdown] lang="en"
# ## A file of named tensors
#
# `tree.flatten` gives each leaf its name, the path to it. A *safetensors* file has 8 bytes with the length of a
# header, the header (JSON: the dtype, the shape and the place of each tensor), and then all the numbers. A reader
# needs a few lines; there is nothing in the file that could be run.

# %% [markdown] lang="zh"
# ## 带名字的张量文件
#
# `tree.flatten` 给每个叶子一个名字，即通往它的路径。*safetensors* 文件先用 8 个字节记录文件头的长度，
# 接着是文件头（JSON：每个张量的 dtype、形状和位置），最后是全部数值。读取只需几行代码，文件里没有任何可以执行的东西。

# %%
cfg = mlp.Config((64, 32, 10))
params = spec.init(random.key(0), mlp.spec(cfg))
checkpoints.export_params(folder / "net.safetensors", params)

content = (folder / "net.safetensors").read_bytes()
length = int.from_bytes(content[:8], "little")
header = json.loads(content[8 : 8 + length])
print(header["layers.0.weight"])


def read_tensor(name):
    entry = header[name]
    first, last = (8 + length + offset for offset in entry["data_offsets"])
    return torch.frombuffer(bytearray(content[first:last]), dtype=torch.float32).reshape(entry["shape"])


by_hand = {name: read_tensor(name) for name in header if name != "__metadata__"}
torch.testing.assert_close(by_hand, tree.flatten(params), rtol=0, atol=0)
loaded = checkpoints.import_params(folder / "net.safetensors", params)
torch.testing.assert_close(loaded, params, rtol=0, atol=0)

# %% [markdown] lang="en"
# ## Why no pickle
#
# `pickle` stores objects as instructions to build them, and an instruction may call any function. The object below
# asks for `os.mkdir`, which makes an empty folder; it could as well send your files to someone. Files that end in
# `.pt`, `.pth`, `.bin` or `.ckpt` usually contain a pickle. `torch.load(..., weights_only=True)` builds tensors and
# plain values only, and so does `nets.weights.read`, which says what it found.

# %% [markdown] lang="zh"
# ## 为什么不用 pickle
#
# `pickle` 把对象存成重建它的指令，而指令可以调用任何函数。下面的对象要求执行 `os.mkdir`，建立一个空文件夹；
# 它同样可以把您的文件发给别人。以 `.pt`、`.pth`、`.bin`、`.ckpt` 结尾的文件通常含有 pickle。
# `torch.load(..., weights_only=True)` 只构造张量和普通的值，`nets.weights.read` 也是如此，并会说明它遇到了什么。

# %%


class Surprise:
    def __reduce__(self):  # "to build me, call os.mkdir(path)"
        return os.mkdir, (str(folder / "surprise"),)


(folder / "stranger.pt").write_bytes(pickle.dumps({"weight": Surprise()}))
pickle.loads((folder / "stranger.pt").read_bytes())
print("a folder was made by loading:", (folder / "surprise").is_dir())
torch.save({"weight": Surprise()}, folder / "stranger.pt")
refused(lambda: torch.load(folder / "stranger.pt", weights_only=True))
refused(lambda: read(str(folder / "stranger.pt")))

# %% [markdown] lang="en"
# ## Weights with other names
#
# Another library's file has its own names, and sometimes transposed matrices. A table says, for each of our leaves,
# where it is: `Rename(name, transposed)`. `fill` takes every tensor exactly once, compares its shape with the spec,
# and returns our tree. What is missing, left over or of the wrong shape is an error that names it: half-loaded
# weights compute nonsense without one.

# %% [markdown] lang="zh"
# ## 名字不同的权重
#
# 其他库写出的文件有自己的命名，有时矩阵还是转置的。用一张表说明我们的每个叶子在文件里对应什么：
# `Rename(name, transposed)`。`fill` 对每个张量恰好取用一次，与 spec 核对形状，再返回我们的树。缺少的、多余的、
# 形状不对的都会报错并指出名字：只加载了一半的权重会悄无声息地算出错误结果。

# %%
torch.manual_seed(0)
theirs = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
state = {"fc1.kernel": theirs[0].weight.T, "fc1.bias": theirs[0].bias}  # (in, out), as TensorFlow and GPT-2 have them
state |= {"fc2.kernel": theirs[2].weight.T, "fc2.bias": theirs[2].bias}
torch.save(state, folder / "theirs.pt")

table = {f"layers.{i}.weight": Rename(f"fc{i + 1}.kernel", transposed=True) for i in range(2)}
table |= {f"layers.{i}.bias": Rename(f"fc{i + 1}.bias") for i in range(2)}
x = random.normal(random.key(1), (5, 64))
ours = fill(mlp.spec(cfg), read(str(folder / "theirs.pt")), table)
torch.testing.assert_close(mlp.apply(ours, x, cfg), theirs(x))

refused(lambda: fill(mlp.spec(cfg), {n: t for n, t in state.items() if n != "fc2.bias"}, table))
refused(lambda: fill(mlp.spec(cfg), {**state, "fc3.bias": torch.zeros(10)}, table))
refused(lambda: fill(mlp.spec(mlp.Config((64, 48, 10))), state, table))

# %% [markdown] lang="en"
# ## A training that continues
#
# To go on, a training needs more than parameters: the optimizer's averages, the key of the random numbers, the number
# of the step. All of it is one tree, the `TrainState`. The batch is a function of key and step, so there is no data
# loader to save. `Checkpoints` writes the state in the background, with a checksum per leaf, under another name that
# is changed when it is complete: a process killed while it writes leaves the earlier checkpoint whole.

# %% [markdown] lang="zh"
# ## 接着训练
#
# 要接着训练，光有参数不够，还需要优化器的滑动平均、随机数的 key 和当前步数。它们合在一起就是一棵树，即 `TrainState`。
# 批次是 key 与步数的函数，所以不必保存数据加载器。`Checkpoints` 在后台写入，为每个叶子记录校验和，并且先用临时名字、
# 写完再改名：即使进程在写入时被杀死，之前的检查点也完好无损。

# %%
digits = arrays.digits()[0]
optimizer = optimizers.adam(2e-2)


def losses(params, batch, keys):
    return cross_entropy(mlp.apply(params, batch[0], cfg), batch[1], reduction="none")  # (examples,)


step = make_step(losses, optimizer, compile=False)


def run(state, steps):
    curve = []
    for t in steps:
        rows = batching.epoch_batch(random.key(2), t, len(digits.labels), 64)
        state, metrics = step(state, (digits.images[rows], digits.labels[rows]))
        curve.append(float(metrics["loss"]))
    return state, curve


state = create(random.key(3), mlp.spec(cfg), optimizer)
print("leaves:", [name for name in tree.names(state) if "layers.0" in name or "." not in name])
half, before = run(state, range(60))
with checkpoints.Checkpoints(folder / "run", {"net": cfg}, argv=[]) as saved:
    saved.save(60, half, {"loss": before[-1]})
record = checkpoints.read_record(folder / "run")
print("step", record.step, "config", record.config, "metrics", record.metrics)
print("a leaf:", record.leaves["params.layers.0.bias"])

# %% [markdown] lang="en"
# Read again, as a new process would: with the spec alone, from which the template of the state is made. The run goes
# on with the bits of one that was never stopped. With the parameters alone (and a fresh optimizer) it does not: Adam
# has forgotten its averages.

# %% [markdown] lang="zh"
# 像一个新进程那样重新读入：只凭 spec 建立状态的模板。接下来的训练与从未中断的训练逐位相同。
# 如果只保存参数（优化器重新开始）就不是这样：Adam 已经忘了它的滑动平均。

# %%
template = create(random.key(0), mlp.spec(cfg), optimizer)  # other values, the same structure
restored = checkpoints.restore(folder / "run", template)
never_stopped, after = run(half, range(60, 120))
resumed, again = run(restored, range(60, 120))
assert after == again
torch.testing.assert_close(resumed, never_stopped, rtol=0, atol=0)

weights = checkpoints.restore(folder / "run", spec.abstract(mlp.spec(cfg)), part="params")
_, forgetful = run(template._replace(params=weights), range(60, 120))
print("largest difference of the loss, whole state:", max(abs(a - b) for a, b in zip(after, again, strict=True)))
print("parameters alone:", max(abs(a - b) for a, b in zip(after, forgetful, strict=True)))

# %% [markdown] lang="en"
# Another net, another optimizer, a damaged file: each is refused by name.

# %% [markdown] lang="zh"
# 换了网络、换了优化器、文件损坏：都会指名拒绝。

# %%
other = mlp.Config((64, 48, 10))
refused(lambda: checkpoints.restore(folder / "run", create(random.key(0), mlp.spec(other), optimizer)))
refused(lambda: checkpoints.restore(folder / "run", create(random.key(0), mlp.spec(cfg), optimizers.sgd(0.1))))
largest = max((folder / "run").rglob("d/*"), key=lambda path: path.stat().st_size)
content = bytearray(largest.read_bytes())
content[len(content) // 2] ^= 1  # one bit
largest.write_bytes(content)
refused(lambda: checkpoints.restore(folder / "run", template))

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", width_ratios=(1.4, 1))
left.plot(range(120), before + after, linewidth=5, color="lightgrey", label="never stopped")
left.axvline(60, color="black", linewidth=0.8, linestyle=":")
left.set(xlabel="step", ylabel="loss")
for name, curve, style in (("whole state", again, "-"), ("parameters alone", forgetful, "--")):
    left.plot(range(60, 120), curve, style, label=f"resumed from the {name}")
    right.plot(range(60, 120), [a - b for a, b in zip(curve, after, strict=True)], style, label=name)
right.set(xlabel="step", ylabel="loss - loss of the one never stopped")
left.legend()
plt.show()
temporary.cleanup()

# %% [markdown] lang="en"
# ## Where to go from here
#
# [train/README.md](../../train/README.md#runs-and-checkpoints): runs, with `--resume` on the command line.
# [nets/README.md](../../nets/README.md#the-zoo): nets that read published weights, with their tables.
# [train/scale/README.md](../../train/scale/README.md#checkpoints-signals-failures): checkpoints of many processes.

# %% [markdown] lang="zh"
# ## 接下来
#
# [train/README.md](../../train/README.md#runs-and-checkpoints)：训练运行，以及命令行的 `--resume`。
# [nets/README.md](../../nets/README.md#the-zoo)：能读取公开权重的网络和它们的对照表。
# [train/scale/README.md](../../train/scale/README.md#checkpoints-signals-failures)：多进程的检查点。
