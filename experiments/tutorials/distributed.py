# %% [markdown] lang="en"
# # Training on several processes
#
# Many processes can share one training run in three ways: each takes a part of the **batch** (data parallel), a part of
# the **state** (fsdp), or a part of every **layer** (tensor parallel). We first see in one process why each gives the
# numbers of undivided training. Then `torchrun` starts two processes on this machine that do it, and arithmetic says
# what a large model needs on many.
#
# You need to know what a gradient and an optimizer are, and a little PyTorch. No GPU is needed.

# %% [markdown] lang="zh"
# # 多进程训练
#
# 多个进程可以用三种方式分担同一次训练：每个进程负责**一部分样本**（数据并行）、保存**一部分状态**（fsdp），
# 或者承担**每一层的一部分**（张量并行）。我们先在单个进程里弄清楚为什么这三种方式都得到与不切分时相同的数；
# 再用 `torchrun` 在本机启动两个进程真正做一遍；最后用算术估计大模型在许多进程上的需求。
#
# 读者需要知道什么是梯度和优化器，并了解一点 PyTorch。不需要 GPU。

# %%
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from core import random, spec, tree
from nets.classifiers import mlp
from nets.language import gpt2, llama
from train import optimizers
from train.losses import cross_entropy
from train.scale.estimate import by_ranks
from train.scale.shards import RULES, plan, table

# %% [markdown] lang="en"
# ## A part of the batch
#
# The loss is a mean over examples, and so is its gradient. With a batch in two halves of $n$ examples,
#
# $$g = \frac{1}{2} (g_1 + g_2), \qquad g_r = \frac{1}{n} \sum_{i \in r} \nabla \ell_i$$
#
# So each process computes the gradient of its rows, an **all-reduce** gives everyone the mean, and all take the same
# step. That saves time alone: each process has all parameters.

# %% [markdown] lang="zh"
# ## 切分样本
#
# 损失是对样本的平均，梯度也是。把一批样本分成两半，每半 $n$ 个：
#
# $$g = \frac{1}{2} (g_1 + g_2), \qquad g_r = \frac{1}{n} \sum_{i \in r} \nabla \ell_i$$
#
# 所以每个进程计算自己那些样本的梯度，一次 **all-reduce** 让大家都得到平均值，然后所有进程走同样的一步。省下的只有时间：
# 每个进程都保存全部参数。

# %%
cfg = mlp.Config((64, 128, 10))
params = spec.init(random.key(0), mlp.spec(cfg))
x, y = random.normal(random.key(1), (32, 64)), random.randint(random.key(2), (32,), 0, 10).long()


def gradient(rows):
    return torch.func.grad(lambda p: cross_entropy(mlp.apply(p, x[rows], cfg), y[rows]))(params)


whole = gradient(slice(0, 32))
halves = gradient(slice(0, 16)), gradient(slice(16, 32))  # of two processes
mean = tree.map(lambda a, b: (a + b) / 2, *halves)  # the all-reduce
torch.testing.assert_close(mean, whole)

# %% [markdown] lang="en"
# ## A part of the state
#
# Adam keeps two moments per parameter, so with the gradient there are four numbers of 4 bytes: **16 bytes per
# parameter**, in every process. But Adam treats each number by itself: an update of a piece is a piece of the update.
# So each process can keep a piece of everything, update it, and gather the whole parameters only for the gradient. This
# is fully sharded data parallel (Rajbhandari et al. 2020, arXiv:1910.02054).

# %% [markdown] lang="zh"
# ## 切分状态
#
# Adam 为每个参数保存两个矩，加上参数本身和梯度，共四个 4 字节的数：**每个参数 16 字节**，每个进程都有一份。
# 但是 Adam 对每个数单独处理：对一片做更新，就等于整个更新的那一片。所以每个进程可以只保存其中一片、只更新这一片，
# 仅在求梯度时把完整的参数收集起来。这就是完全切分的数据并行 fsdp（Rajbhandari et al. 2020, arXiv:1910.02054）。


# %%
def piece(values, rank):
    """Half of each leaf, along its first axis."""
    return tree.map(lambda leaf: leaf.chunk(2)[rank], values)


optimizer = optimizers.adam(1e-3)
update, _ = optimizer.update(whole, optimizer.init(params), params)
updates = []
for rank in range(2):
    own = piece(params, rank)
    updates.append(optimizer.update(piece(whole, rank), optimizer.init(own), own)[0])
torch.testing.assert_close(tree.map(lambda *pieces: torch.cat(pieces), *updates), update)
print(f"numbers of a process: {tree.count(piece(params, 0)):,} of {tree.count(params):,}")

# %% [markdown] lang="en"
# ## A part of every layer
#
# Two matrices with an elementwise function between them can be cut so that the processes need to communicate only once
# (Shoeybi et al. 2019, arXiv:1909.08053): the first by its outputs, the second by its inputs. Then
#
# $$W_2\, \sigma(W_1 x) = \sum_r W_2^{(r)} \sigma(W_1^{(r)} x)$$
#
# and process $r$ never sees the hidden units of the others. The same goes for the heads of an attention and the rows of
# an embedding. All processes have the same examples; the sum in every layer wants a fast connection.

# %% [markdown] lang="zh"
# ## 切分每一层
#
# 两个矩阵之间如果只有逐元素的函数，就可以切得让进程之间只通信一次（Shoeybi et al. 2019, arXiv:1909.08053）：
# 第一个按输出切，第二个按输入切。于是
#
# $$W_2\, \sigma(W_1 x) = \sum_r W_2^{(r)} \sigma(W_1^{(r)} x)$$
#
# 进程 $r$ 永远不需要别人的隐藏单元。注意力的各个头、嵌入表的各行也是同样的道理。所有进程处理相同的样本；
# 每一层都要求和，所以需要快速的连接。

# %%
first, second = params["layers"]
parts = []
for rank in range(2):
    w1, b1 = first["weight"].chunk(2, 0)[rank], first["bias"].chunk(2)[rank]  # (64, 64), (64,): rows
    w2 = second["weight"].chunk(2, 1)[rank]  # (10, 64): columns
    parts.append(torch.relu(x @ w1.T + b1) @ w2.T)  # (32, 10)
torch.testing.assert_close(sum(parts) + second["bias"], mlp.apply(params, x, cfg))

# %% [markdown] lang="en"
# ## Two processes
#
# Now in earnest. A program of its own trains a small GPT to count: sequences such as 3 5 7 9. `run(None)` is one
# process; `distribute` makes the plan of a way, `over.cut` takes this process's pieces, and `make_step` does the rest.
# The batch of a step is that of all processes together, and each takes its rows of it.

# %% [markdown] lang="zh"
# ## 两个进程
#
# 现在来真的。下面这个独立的程序训练一个小 GPT 数数，序列形如 3 5 7 9。`run(None)` 表示单个进程；
# `distribute` 按某种方式制定切分方案，`over.cut` 取出本进程的那些片，其余的都由 `make_step` 完成。
# 每一步的批次是所有进程合起来的批次，各进程从中取自己的那些行。

# %%
PROGRAM = '''
import sys

import torch

from core import random, tree
from nets.language import gpt2
from train import optimizers
from train.losses import cross_entropy
from train.scale import launch
from train.scale.distributed import distribute
from train.scale.mesh import open_mesh
from train.step import create, make_step

CFG = gpt2.Config(vocabulary=48, context=16, layers=2, heads=4, width=32, dropout=0.1)
AXES = {"replicate": "data", "fsdp": "data", "tensor": "model"}


def losses(params, batch, keys):
    tokens, targets = batch  # (examples, 16) each
    logits = gpt2.apply(params, tokens, CFG, key=keys, train=True)  # (examples, 16, 48)
    return cross_entropy(logits, targets, reduction="none").mean(1)  # (examples,)


def batch_at(step):
    first, stride = random.randint(random.fold_in(random.key(1), step), (2, 8, 1), 1, 5)
    tokens = (first + stride * torch.arange(17)).long() % CFG.vocabulary  # (8, 17)
    return tokens[:, :-1], tokens[:, 1:]


def run(over, steps=12):
    """Losses (steps,), and the bytes of parameters and optimizer state in this process."""
    optimizer = optimizers.adamw(1e-2)
    step = make_step(losses, optimizer, distributed=over, compile=False)
    state = create(random.key(0), gpt2.spec(CFG), optimizer)
    state, curve = state if over is None else over.cut(state), []
    for i in range(steps):
        state, metrics = step(state, batch_at(i))
        curve.append(metrics["loss"])
    held = sum(leaf.nbytes for leaf in tree.leaves((state.params, state.opt_state)))
    return torch.stack(curve), held


if __name__ == "__main__":
    torch.set_num_threads(1)
    processes = launch.current()
    processes.open_group("cpu")  # gloo
    out = {}
    for way, axis in AXES.items():
        mesh = open_mesh({axis: processes.ranks})
        out[way] = run(distribute(gpt2.spec(CFG), mesh, way))
    torch.save(out, f"{sys.argv[1]}/{processes.rank}.pt")
    processes.close()
'''
folder = tempfile.TemporaryDirectory()
program = Path(folder.name, "count.py")
program.write_text(PROGRAM, encoding="utf-8")

names = runpy.run_path(str(program))
model, (curve, held) = gpt2.spec(names["CFG"]), names["run"](None)
torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
done = subprocess.run([*torchrun, str(program), folder.name], capture_output=True, text=True)
assert done.returncode == 0, done.stderr
ranks = [torch.load(f"{folder.name}/{rank}.pt") for rank in range(2)]
folder.cleanup()

# %% [markdown] lang="en"
# The curves are those of one process, to rounding: sums come in another order. Even dropout agrees, because each mask
# belongs to its example and not to a process. The memory is as planned: half for fsdp; a little more than half for
# tensor, which leaves norms, positions and some biases whole.

# %% [markdown] lang="zh"
# 曲线与单进程的一致，只差舍入误差：求和的顺序不同。连 dropout 也一致，因为掩码属于样本，而不属于进程。
# 内存也与方案相符：fsdp 是一半；张量并行略多于一半，因为归一化层、位置编码和部分偏置没有切。

# %%
print("one process:", f"{held:,} bytes, losses", [round(float(loss), 4) for loss in curve[::4]])
for way in ranks[0]:
    other, of_rank = ranks[0][way]
    difference = float((other - curve).abs().max())
    print(f"{way:10} {of_rank:,} bytes, largest difference of the losses {difference:.1e}")
    torch.testing.assert_close(other, curve, rtol=0, atol=2e-5)
    assert torch.equal(other, ranks[1][way][0])  # the processes agree to the bit
    planned = by_ranks(model, way, [2])[2].state * 12 // 16  # between two steps there is no gradient
    assert 0 <= of_rank - planned < 100, (of_rank, planned)  # beside it, some counters

# %% [markdown] lang="en"
# ## The plan
#
# Which leaf is cut where follows from the spec and the number of processes alone; no process is needed to see it. Here
# the first block of that GPT, cut for two as tensor parallelism has it: the matrix of queries, keys and values by its
# heads, that of the attention's output by its inputs, and so on.

# %% [markdown] lang="zh"
# ## 切分方案
#
# 哪个张量在哪里切，只取决于参数规格（spec）和进程数，不启动任何进程就能看到。
# 下面是这个 GPT 的第一个块按张量并行切成两份的方案：查询、键、值的矩阵按头切，注意力输出的矩阵按输入切，如此等等。

# %%
block = {"blocks": model["blocks"][:1]}
print(table(block, {"model": 2}, plan(block, {"model": 2}, RULES["tensor"])))

# %% [markdown] lang="en"
# ## A model of eight billion parameters
#
# Before one rents machines one computes. Llama 3.1 8B has $N = 8.03 \cdot 10^9$ parameters, so its state needs $16 N$
# bytes in each process, or $16 N / d$ cut for $d$ of them. fsdp also gathers the parameters, here in bfloat16, $2 N$
# bytes (`gathered`; this library gathers them all at once, others block by block). Each step then sends pieces around:
# the bytes that a process sends are in `volumes`. Activations come on top and depend on batch and length.

# %% [markdown] lang="zh"
# ## 八十亿参数的模型
#
# 租机器之前先算一算。Llama 3.1 8B 有 $N = 8.03 \cdot 10^9$ 个参数，每个进程的状态需要 $16 N$ 字节，
# 切给 $d$ 个进程时是 $16 N / d$。fsdp 还要收集参数，这里用 bfloat16，共 $2 N$ 字节（`gathered`；本库一次收集全部参数，
# 别的库逐块收集）。每一步还要互相发送数据，每个进程发送的字节数在 `volumes` 里。激活值另算，取决于批次大小和序列长度。

# %%
cfg = llama.Config(128256, 131072, layers=32, heads=32, kv_heads=8, width=4096, hidden=14336)
large, GIB = llama.spec(cfg), 2**30
counts = [1, 2, 4, 8, 16, 32, 64]
options = {"tokens": 8192, "time": 8192, "compute": torch.bfloat16}
costs = {way: by_ranks(large, way, counts[:4] if way == "tensor" else counts, **options) for way in ranks[0]}
assert costs["replicate"][8].state == 16 * tree.count(large)
print(f"{tree.count(large):,} parameters; on 8 processes, per process:")
for way, of_count in costs.items():
    cost = of_count[8]
    sent = ", ".join(f"{name} {volume / 1e9:.1f} GB" for name, volume in cost.volumes.items() if volume > 1e6)
    print(f"{way:10} state {cost.state / GIB:6.1f} GiB, gathered {cost.gathered / GIB:4.1f} GiB, sends {sent}")

# %% [markdown] lang="en"
# The dotted line is a GPU of 80 GiB. A copy of everything does not fit on one, however many there are. Tensor
# parallelism ends at 8 processes here, as there are 8 heads of keys and values to share.

# %% [markdown] lang="zh"
# 虚线是一块 80 GiB 显存的 GPU。每个进程都存一份完整状态的话，无论有多少块 GPU 都放不下。张量并行在这里最多用 8 个进程，
# 因为键和值只有 8 个头可分。

# %%
figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
for (way, of_count), marker in zip(costs.items(), "os^", strict=True):
    axis.plot(list(of_count), [cost.state / GIB for cost in of_count.values()], marker=marker, label=way)
gathered = [(cost.state + cost.gathered) / GIB for cost in costs["fsdp"].values()]
axis.plot(counts, gathered, "s--", color="tab:orange", fillstyle="none", label="fsdp, parameters gathered")
axis.axhline(80, color="grey", linestyle=":", label="one GPU")
axis.set_xscale("log", base=2)
axis.set_xticks(counts, [str(count) for count in counts])
axis.set_ylim(0, 190)
axis.set_xlabel("processes")
axis.set_ylabel("GiB per process, without activations")
axis.set_title("Llama 3.1 8B: parameters, gradients, Adam's moments", fontsize=11)
axis.legend(loc="upper right", ncols=2)
plt.show()

# %% [markdown] lang="en"
# ## Where to go from here
#
# Scripts need no change: `torchrun --nproc-per-node 2 experiments/gpt.py --shard fsdp`. Checkpoints, several machines
# and what is not there yet are in [train/scale/README.md](../../train/scale/README.md);
# [estimate.py](../README.md#estimate) adds activations and arithmetic, for any net of this library.

# %% [markdown] lang="zh"
# ## 接下来
#
# 脚本不用改：`torchrun --nproc-per-node 2 experiments/gpt.py --shard fsdp`。检查点、
# 多台机器以及尚未支持的功能见 [train/scale/README.md](../../train/scale/README.md)；
# [estimate.py](../README.md#estimate) 还会估计激活值和计算量，适用于本库的任何网络。
