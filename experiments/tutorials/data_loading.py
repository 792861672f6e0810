# %% [markdown] lang="en"
# # Loading data
#
# Training reads its examples many times, each time in another order and a little changed. Here we write a folder of
# pictures and a file of texts, read them, split them, put them into batches, change them at random and decode them in
# processes. One idea runs through all of it: what a step sees is a *function of a key and the number of the step*. So
# a run that was stopped goes on with the same batches, and there is no state of a loader to save.
#
# You need to know what a batch, an epoch and a label are. A *key* is a tensor from which random numbers are computed:
# the same key, the same numbers.

# %% [markdown] lang="zh"
# # 加载数据
#
# 训练会多次读取同样的样本，每次换一个顺序，并略加改动。本文写出一个图片文件夹和一个文本文件，然后读取、划分、
# 组成批次、随机增强，再用多个进程解码。贯穿始终的想法只有一个：每一步看到的数据是*key 与步数的函数*。
# 因此中断后的训练会接着看到同样的批次，不需要保存数据加载器的任何状态。
#
# 读者需要知道什么是批次（batch）、轮次（epoch）和标签。*key* 是用来计算随机数的张量：相同的 key 得到相同的随机数。

# %%
import logging
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from core import random
from train.data import batching
from train.data.images import arrays, augment, sets
from train.data.images.files import Decoder, listing
from train.data.text import labelled, ragged
from train.data.text.brackets import CLASSES, brackets
from train.data.understood import understood

logging.getLogger("train.data").setLevel(logging.ERROR)  # we print what is skipped ourselves

# %% [markdown] lang="en"
# ## A folder of pictures
#
# One sub-folder per class, the usual form. We write 300 handwritten digits as PNG files of 32x32 pixels, and one file
# that is no picture. `listing` reads names only: paths, and for each the number of its class. What cannot be used is
# named, not passed over in silence.

# %% [markdown] lang="zh"
# ## 图片文件夹
#
# 通常的形式是每个类别一个子文件夹。我们写出 300 张 32x32 像素的手写数字 PNG 文件，再放一个不是图片的文件。
# `listing` 只读文件名：得到路径和每个文件的类别编号。不能用的文件会被指出来，而不是悄悄跳过。

# %%
temporary = tempfile.TemporaryDirectory()
folder = Path(temporary.name) / "digits"
digits = arrays.digits()[0]
for i in range(300):
    path = folder / str(int(digits.labels[i])) / f"{i:03}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((255 * digits.images[i, 0]).byte().numpy()).resize((32, 32), Image.Resampling.BICUBIC).save(path)
(folder / "3" / "broken.png").write_bytes(b"no picture")

files = listing(folder)
print(len(files.paths), "files", files.classes, files.labels.bincount().tolist())
print([str(path.relative_to(folder)) for path in files.paths[:3]], files.labels[:3])

# %% [markdown] lang="en"
# ## A part for testing
#
# The files come in the order of their classes, so the last fifth would be the digits 8 and 9. The part for testing is
# therefore drawn at random, with a fixed key, so that it is the same in each run. (Where examples belong together,
# such as several photographs of one person, whole groups must be drawn: a net would recognise the person.)
# `open_images` does this for any folder without parts of its own.

# %% [markdown] lang="zh"
# ## 留出测试集
#
# 文件按类别排序，最后五分之一全是 8 和 9。所以测试集要随机抽取，并固定 key，使每次运行都相同。
# （如果有些样本属于一组，例如同一个人的几张照片，就要整组抽取，否则网络只是认出了这个人。）对没有自带划分的文件夹，
# `open_images` 会自动这样做。

# %%
order = random.permutation(random.key(0), len(files.paths))
test, train = order[: len(order) // 5], order[len(order) // 5 :]
print("by hand:", len(train), "and", len(test), " classes to test on:", files.labels[test].bincount().tolist())

images = sets.open_images(str(folder))
understood(print, {**sets.facts(images), "images": "digits"})
opened = set(images.test.paths)
assert opened == {files.paths[i] for i in test.tolist()}

# %% [markdown] lang="en"
# ## The order of the batches
#
# Each epoch goes through all examples in an order of its own. Epoch $e$ has the permutation of the key
# `fold_in(key, e)`, and the batch of step $t$ is a slice of it. With $n$ examples and batches of $b$ there are
# $\lfloor n / b \rfloor$ steps in an epoch:
#
# $$e = \lfloor t / \lfloor n / b \rfloor \rfloor, \qquad \text{position} = t \bmod \lfloor n / b \rfloor$$
#
# That is all of a loader. `epoch_batch` is this function.

# %% [markdown] lang="zh"
# ## 批次的顺序
#
# 每一轮都以自己的顺序遍历全部样本。第 $e$ 轮用 key `fold_in(key, e)` 产生的排列，第 $t$ 步的批次是其中一段。
# 设有 $n$ 个样本、每批 $b$ 个，则一轮有 $\lfloor n / b \rfloor$ 步：
#
# $$e = \lfloor t / \lfloor n / b \rfloor \rfloor, \qquad \text{position} = t \bmod \lfloor n / b \rfloor$$
#
# 数据加载器的全部内容就是这些。`epoch_batch` 就是这个函数。

# %%
key, count, batch = random.key(1), 240, 32


def indices(step):
    epoch, position = divmod(step, count // batch)
    return random.permutation(random.fold_in(key, epoch), count)[position * batch : (position + 1) * batch]


for step in range(20):
    torch.testing.assert_close(indices(step), batching.epoch_batch(key, step, count, batch))
epoch = torch.cat([indices(step) for step in range(count // batch)])
print("distinct examples in the first epoch:", len(epoch.unique()), "of", count, "(the rest wait for the next order)")

# %% [markdown] lang="en"
# ## Why nothing must be saved
#
# A run stopped after step 11 goes on with step 12: the function is asked for step 12. PyTorch's `DataLoader` draws
# from a generator as it goes: to come to batch 12 one reads the twelve before it, or saves the generator at the right
# moment. The two go together, too: with our function as its `batch_sampler` a `DataLoader` gives our batches.

# %% [markdown] lang="zh"
# ## 为什么什么都不用保存
#
# 训练在第 11 步后中断，就从第 12 步继续：直接向函数要第 12 步的批次。PyTorch 的 `DataLoader` 则边走边从生成器抽取：
# 要得到第 12 个批次，就得先读完前面十二个，或者恰好在那时保存了生成器。两者也可以结合：
# 把我们的函数作为 `batch_sampler`，`DataLoader` 给出的就是我们的批次。

# %%
resumed_at, data = 12, TensorDataset(digits.images[:count], digits.labels[:count])
sampler = [indices(step).tolist() for step in range(resumed_at, 15)]  # steps 12, 13, 14 and none before
for step, (pixels, labels) in enumerate(DataLoader(data, batch_sampler=sampler), resumed_at):
    torch.testing.assert_close(pixels, digits.images[indices(step)])
    torch.testing.assert_close(labels, digits.labels[indices(step)])
    print("step", step, tuple(pixels.shape), labels[:8].tolist())

# %% [markdown] lang="en"
# ## Augmentation as a function
#
# A shifted digit is the same digit: random changes make more examples of few. They are functions of images and keys,
# one key per example: `fold_in(key, step)` for the step, `sites` for the examples in it. An example's change does not
# depend on the others in its batch, so half a batch (on another machine, say) is changed as the whole one would be.

# %% [markdown] lang="zh"
# ## 增强是函数
#
# 平移后的数字还是同一个数字：随机改动能让样本变多。增强是图像与 key 的函数，每个样本一个 key：
# `fold_in(key, step)` 对应这一步，`sites` 对应其中的各个样本。一个样本的改动与同批的其他样本无关，
# 所以处理半个批次（例如在另一台机器上）与处理整个批次的结果一致。

# %%


def changed(images, step):
    crops, angles = random.split(random.fold_in(random.key(2), step))
    images = augment.crop(random.sites(crops, len(images)), images, padding=4)
    return augment.resized_crop(random.sites(angles, len(images)), images, 32, scale=(0.6, 1.0))


pixels = torch.stack([arrays.read_image(images.train.paths[30 * i], channels=1) for i in range(8)])  # (8, 1, 32, 32)
assert torch.equal(changed(pixels, 5), changed(pixels, 5))
torch.testing.assert_close(changed(pixels, 5)[:4], changed(pixels[:4], 5))
print("another step, another change:", not torch.equal(changed(pixels, 5), changed(pixels, 6)))

# %% [markdown] lang="en"
# ## Decoding in workers
#
# To decode a photograph takes milliseconds, and a batch of 256 may take longer than the step that needs it. `Decoder`
# starts processes that decode the batches of the next steps while this one computes. All random numbers are computed
# here, from key and step; the workers only read files. So their number does not change a bit. (These pictures are so
# small that starting the processes takes longer than decoding them.) The file that is no picture is listed in
# `skipped`, and in training the next one takes its place.

# %% [markdown] lang="zh"
# ## 多进程解码
#
# 解码一张照片要几毫秒，256 张一批可能比用到它的那一步还慢。`Decoder` 启动若干进程，在当前步计算时解码后面几步的批次。
# 所有随机数都在主进程里由 key 和步数算出，解码进程只读文件，所以进程数不会改变任何一位结果。（这里的图片太小，
# 启动进程比解码还费时。）不是图片的文件列在 `skipped` 里，训练时由下一个文件顶替。

# %%
batches = {}
for workers in (0, 2):
    with Decoder(workers) as decoder:
        start = time.perf_counter()
        batches[workers] = list(decoder.train_batches(files, random.key(3), range(12, 20), 32, 32, channels=1))
        print(f"{workers} workers: {time.perf_counter() - start:.2f} s, skipped", [p.name for p, _ in decoder.skipped])
for (one, labels), (other, same) in zip(batches[0], batches[2], strict=True):
    assert torch.equal(one, other) and torch.equal(labels, same)
print(tuple(one.shape), one.dtype)

# %% [markdown] lang="en"
# ## Texts
#
# A line has a label, a tab and a text. Here the texts are brackets, balanced or not, of different lengths. A
# tokenizer makes numbers of characters, and a batch is filled up with zeros to its longest text. `make_buckets` puts
# texts of similar length together: fewer zeros, few different shapes (each of which a compiled step would have to
# compile), and again a function of key and step.

# %% [markdown] lang="zh"
# ## 文本
#
# 每行是标签、制表符和文本。这里的文本是长短不一的括号串，配对正确或不正确。分词器把字符变成编号，
# 一批文本用零补齐到其中最长的那条。`make_buckets` 把长度相近的文本放在一起：补的零更少，
# 形状的种类也少（编译后的训练步每种形状都要编译一次），而且同样是 key 与步数的函数。

# %%
lines = [f"{CLASSES[y]}\t{text}" for text, y in zip(*brackets(random.key(4), 400), strict=True)]
path = Path(temporary.name) / "brackets.tsv"
path.write_text("\n".join(lines) + "\n", encoding="utf-8")
texts = labelled.open_labelled(str(path))
understood(print, {**labelled.facts(texts), "data": "brackets.tsv"})

tokenizer = ragged.learn_tokenizer(texts.train.texts, 50, "characters")
data = ragged.encoded(texts.train, texts.classes, tokenizer, "characters", longest=64)
buckets = ragged.make_buckets(data.lengths, shapes=4, batch=16)
for step in range(3):
    rows = ragged.batch_at(data, buckets, random.key(5), step, 16)
    print("step", step, tuple(rows.tokens.shape), f"zeros {(rows.tokens == 0).float().mean():.0%}")
print(f"all texts in one table: {tuple(data.tokens.shape)}, zeros {(data.tokens == 0).float().mean():.0%}")

# %% [markdown] lang="en"
# The same digits as five steps see them: changed each time, and changed in the same way if the run is repeated.

# %% [markdown] lang="zh"
# 同一批数字在五个训练步中的样子：每次都不同，而重新运行时又完全一样。

# %%
figure, axes = plt.subplots(6, 8, figsize=(6.4, 4.8), layout="constrained")
for step, row in enumerate(axes, -1):
    for image, axis in zip(pixels if step < 0 else changed(pixels, step), row, strict=True):
        axis.imshow(image[0].numpy(), cmap="gray_r", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[])
    row[0].set_ylabel("the file" if step < 0 else f"step {step}")
plt.show()
temporary.cleanup()

# %% [markdown] lang="en"
# ## Where to go from here
#
# [train/README.md](../../train/README.md#data): every kind of data, what opens it and its batches.
# [experiments/README.md](../README.md#classify): `python experiments/classify.py --data FOLDER` trains on a folder of
# your own, and [imagenet](../README.md#imagenet) on millions of pictures in tars.

# %% [markdown] lang="zh"
# ## 接下来
#
# [train/README.md](../../train/README.md#data)：各种数据、打开它们的函数和批次。
# [experiments/README.md](../README.md#classify)：`python experiments/classify.py --data FOLDER` 用您自己的图片训练，
# [imagenet](../README.md#imagenet) 则处理 tar 文件中的上百万张图片。
