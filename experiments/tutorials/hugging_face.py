# %% [markdown] lang="en"
# # Hugging Face: load, use, tune, share
#
# Most published models are folders in the format of the library transformers, on the Hugging Face hub. Here we load one
# into a tree of parameters, get the same logits, train it, write it back so that transformers reads it, and do the same
# for a LoRA adapter in the format of peft. Offline, the folder is made on the spot.
#
# You need to know what a language model is, and a little PyTorch. It compares with two libraries:
# `pip install transformers peft`.

# %% [markdown] lang="zh"
# # Hugging Face：加载、使用、微调、分享
#
# 大多数公开的模型是 Hugging Face hub 上的文件夹，采用 transformers 库的格式。本文把这样一个模型加载成参数树，
# 得到相同的 logits，训练它，再写回成 transformers 能读的文件夹；对 peft 格式的 LoRA 适配器也做一遍。为了离线运行，
# 文件夹就地生成。
#
# 读者需要知道什么是语言模型，并了解一点 PyTorch。本文与两个库作比较：`pip install transformers peft`。

# %%
import json
import sys
import tempfile
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from core import lora, random, tree
from nets.adapters import read_peft, write_peft
from nets.language import gpt2
from nets.language.to_transformers import published, write_transformers
from train import optimizers
from train.data.text import text, tokenizers
from train.data.translation import number_words
from train.losses import cross_entropy
from train.step import make_step, start

try:
    with warnings.catch_warnings(action="ignore"):  # of progress bars without ipywidgets
        from peft import PeftModel
        from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
        from transformers.utils import logging
except ImportError:
    sys.exit("this tutorial compares with two libraries: pip install transformers peft")
logging.disable_progress_bar()
logging.set_verbosity_error()

# %% [markdown] lang="en"
# ## A folder as on the hub
#
# A model on the hub has an id, such as `openai-community/gpt2`, and is a folder with three files that matter: the sizes
# in `config.json`, the tensors in `model.safetensors`, and the vocabulary in `tokenizer.json`. We make one with
# transformers: a tiny GPT-2 with random numbers, and byte pairs learned from number words.

# %% [markdown] lang="zh"
# ## 一个与 hub 上相同的文件夹
#
# hub 上的模型有一个 id，例如 `openai-community/gpt2`，它是一个文件夹，其中重要的文件有三个：尺寸在 `config.json`，
# 张量在 `model.safetensors`，词表在 `tokenizer.json`。我们用 transformers 造一个：随机权重的小 GPT-2，
# 以及从数词文本学来的字节对。

# %%
temporary = tempfile.TemporaryDirectory()
folder = Path(temporary.name)
to_words = "\n".join(f"{number} is {number_words.english(number)}." for number in range(1, 3000))
to_digits = "\n".join(f"{number_words.english(number)} is {number}." for number in range(1, 3000))
tokenizer = tokenizers.train_byte_pairs([to_words, to_digits], 400)

sizes = {"vocab_size": 400, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4}
off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
theirs = GPT2LMHeadModel(GPT2Config(**sizes, **off))
theirs.load_state_dict(  # numbers from a key, in place of torch's generator
    {
        name: 0.1 * random.normal(random.fold_in(random.key(0), i), tuple(leaf.shape))
        for i, (name, leaf) in enumerate(theirs.state_dict().items())
    }
)
theirs.save_pretrained(folder / "base")
tokenizer.save(folder / "base" / "tokenizer.json")
for file in sorted((folder / "base").iterdir()):
    print(f"{file.name:24} {file.stat().st_size:>8,} bytes")

# %% [markdown] lang="en"
# ## Load
#
# `from_pretrained` takes a folder or an id. It gives the parameters as a tree, and the sizes as a `Config`. Every
# tensor of the file is used once, every shape is checked, and an entry of the configuration that would make another
# function is an error that names it. A **rename table** says which tensor is which.

# %% [markdown] lang="zh"
# ## 加载
#
# `from_pretrained` 接受文件夹或 id，返回参数树和尺寸 `Config`。文件里的每个张量恰好用一次，每个形状都会检查；
# 配置里若有会改变函数的条目，就会报错并指出它的名字。哪个张量对应哪个，由**改名表**说明。

# %%
params, cfg = gpt2.from_pretrained(str(folder / "base"))
model, renames = gpt2.spec(cfg), gpt2.rename_table(cfg)
print(cfg)
for name in ("tokens.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.up.weight"):
    print(f"{name:25} {str(tuple(tree.get(params, name).shape)):10} from {renames[name].theirs}")

tokenizer = tokenizers.load(folder / "base")
ids = torch.tensor([tokenizer.encode("37 is thirty-seven.")])
same = PreTrainedTokenizerFast(tokenizer_file=str(folder / "base" / "tokenizer.json"))
assert same("37 is thirty-seven.").input_ids == ids[0].tolist()
with torch.no_grad():
    expected = theirs(ids).logits
logits = gpt2.apply(params, ids, cfg)
print("logits:", tuple(logits.shape), "largest difference:", f"{(logits - expected).abs().max():.1e}")
torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)

# %% [markdown] lang="en"
# ## Tune
#
# The tree is trained like any other. The first step of SGD is the same as that of the module under `torch.optim`, all
# tensors compared by transformers' names; then we go on with Adam until the net writes such lines. (Which word belongs
# to which number would take longer.)

# %% [markdown] lang="zh"
# ## 微调
#
# 这棵树与别的树一样训练。SGD 的第一步与模块在 `torch.optim` 下的第一步相同，用 transformers 的名字逐个张量比较；
# 然后换成 Adam，继续训练到网络会写这样的行。（要学会哪个数对应哪个词，还需要更久。）

# %%
tokens = torch.tensor(tokenizer.encode(to_words))


def losses(params, batch, keys=None):
    inputs, targets = batch  # (examples, 32) each
    return cross_entropy(gpt2.apply(params, inputs, cfg), targets, reduction="none").mean(1)  # (examples,)


def batch_at(tokens, step):
    return text.token_batch(tokens, random.key(1), step, 16, 32)


sgd = optimizers.sgd(0.1)
once, _ = make_step(losses, sgd, compile=False)(start(random.key(2), params, model, sgd), batch_at(tokens, 0))
inputs, targets = batch_at(tokens, 0)
torch_sgd = torch.optim.SGD(theirs.parameters(), lr=0.1)
torch.nn.functional.cross_entropy(theirs(inputs).logits.flatten(0, 1), targets.flatten()).backward()
torch_sgd.step()
state_dict = theirs.state_dict()
for name, leaf in published(once.params, cfg)[0].items():
    torch.testing.assert_close(leaf, state_dict[name], rtol=1e-4, atol=1e-5)

curves = {}


def train(name, loss, values, spec, tokens, learning_rate, steps):
    optimizer = optimizers.adamw(learning_rate)
    state, curves[name] = start(random.key(2), values, spec, optimizer), []
    step = make_step(loss, optimizer, compile=False)
    for i in range(steps):
        state, metrics = step(state, batch_at(tokens, i))
        curves[name].append(float(metrics["loss"]))
    print(f"{name}: {tree.count(values):,} numbers trained, loss {curves[name][0]:.2f} -> {curves[name][-1]:.2f}")
    return state.params


tuned = train("all weights, 37 is thirty-seven", losses, params, model, tokens, 5e-3, 90)
start_of_text = torch.tensor([tokenizer.encode("\n")])
written = gpt2.generate(tuned, start_of_text, cfg, 40, key=random.key(3), temperature=0.5)
print(tokenizer.decode(written[0].tolist()))

# %% [markdown] lang="en"
# ## Save
#
# `write_transformers` writes GPT-2 and Llama back in their own names; the tokenizer is copied beside them. transformers
# computes the same from it, and reading it back gives the same bits. vLLM and other servers read such a folder, too.

# %% [markdown] lang="zh"
# ## 保存
#
# `write_transformers` 把 GPT-2 和 Llama 按原来的名字写回，再把分词器复制到旁边。transformers 用它算出相同的结果，
# 读回来则逐位相同。vLLM 等服务程序也能读这样的文件夹。

# %%
write_transformers(folder / "tuned", tuned, cfg)
tokenizer.save(folder / "tuned" / "tokenizer.json")
theirs = GPT2LMHeadModel.from_pretrained(folder / "tuned").eval()
with torch.no_grad():
    torch.testing.assert_close(gpt2.apply(tuned, ids, cfg), theirs(ids).logits, rtol=1e-4, atol=1e-4)
back, _ = gpt2.from_pretrained(str(folder / "tuned"))
torch.testing.assert_close(back, tuned, rtol=0, atol=0)

# %% [markdown] lang="en"
# ## An adapter
#
# For a second task, here from words to digits, one need not ship the whole model again. LoRA trains a product of two
# thin matrices beside each chosen weight, $W + s B A$, and `write_peft` writes them alone, as peft does. `PeftModel`
# reads them onto transformers' model, `read_peft` reads them back.

# %% [markdown] lang="zh"
# ## 适配器
#
# 对第二个任务（这里反过来，从单词到数字），不必再发布整个模型。LoRA 在选定的权重旁边训练两个瘦矩阵的乘积 $W + s B A$，
# `write_peft` 只写出这些矩阵，格式与 peft 相同。`PeftModel` 可以把它读到 transformers 的模型上，
# `read_peft` 则把它读回来。

# %%
targets, scale = ["attn.qkv.weight", "attn.proj.weight", "mlp.up.weight", "mlp.down.weight"], lora.scale(8, alpha=16)
adapters_spec = lora.spec(model, targets, rank=8)
values = lora.init(random.key(4), adapters_spec, tuned)


def adapter_losses(adapters, batch, keys=None):
    return losses(lora.adapted(tuned, adapters, scale), batch)


turned = torch.tensor(tokenizer.encode(to_digits))
adapters = train("adapter, thirty-seven is 37", adapter_losses, values, adapters_spec, turned, 1e-2, 90)
adapted = lora.adapted(tuned, adapters, scale)
write_peft(str(folder / "adapter"), adapters, scale, model, renames, prefix="transformer.", base="NAME/tiny-gpt2")
print({key: json.loads((folder / "adapter" / "adapter_config.json").read_text())[key] for key in ("peft_type", "r")})

again = read_peft(str(folder / "adapter"), model, renames)
torch.testing.assert_close(again.adapters, adapters, rtol=0, atol=0)
with torch.no_grad(), warnings.catch_warnings(action="ignore"):  # peft asks transformers for an old name
    expected = PeftModel.from_pretrained(theirs, folder / "adapter").eval()(ids).logits
torch.testing.assert_close(gpt2.apply(adapted, ids, cfg), expected, rtol=1e-3, atol=1e-3)
written = gpt2.generate(lora.merge(tuned, adapters, scale), start_of_text, cfg, 40, key=random.key(3), temperature=0.5)
print(tokenizer.decode(written[0].tolist()))

# %%
files = {
    "model": folder / "tuned" / "model.safetensors",
    "adapter": folder / "adapter" / "adapter_model.safetensors",
}
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), width_ratios=(2, 1), layout="constrained")
for name, curve in curves.items():
    left.plot(range(1, len(curve) + 1), curve, label=name)
left.set_xlabel("step")
left.set_ylabel("loss in nats per token")
left.legend()
right.bar(list(files), [file.stat().st_size / 1000 for file in files.values()], color=["tab:blue", "tab:orange"])
right.set_ylabel("kilobytes of the file")
plt.show()
temporary.cleanup()

# %% [markdown] lang="en"
# ## The hub
#
# With an id in place of the folder, files are fetched once and kept in a cache. `HF_ENDPOINT` names a mirror to fetch
# from, `HF_HOME` another folder for the cache, and `HF_TOKEN` opens models that ask for an account:
#
# ```sh
# export HF_ENDPOINT=https://hf-mirror.com
# python experiments/gpt.py sample --weights openai-community/gpt2 --prompt "The "
# ```
#
# To share, log in (`hf auth login`), and upload to the hub itself, not to a mirror. A `README.md` in the folder is the
# page that others see: what the model is for, what it was trained on, under which licence.
#
# ```py
# from huggingface_hub import HfApi
#
# api = HfApi()
# api.create_repo("NAME/tiny-gpt2", exist_ok=True)
# api.upload_folder(repo_id="NAME/tiny-gpt2", folder_path="tuned")
# ```

# %% [markdown] lang="zh"
# ## hub
#
# 把文件夹换成 id，文件就会下载一次并保存在缓存里。`HF_ENDPOINT` 指定下载用的镜像站，`HF_HOME` 指定缓存文件夹，
# `HF_TOKEN` 用于需要账号的模型：
#
# ```sh
# export HF_ENDPOINT=https://hf-mirror.com
# python experiments/gpt.py sample --weights openai-community/gpt2 --prompt "The "
# ```
#
# 要分享模型，先登录（`hf auth login`），再上传到 hub 本身，而不是镜像站。文件夹里的 `README.md` 就是别人看到的页面：
# 模型的用途、训练数据和许可证。
#
# ```py
# from huggingface_hub import HfApi
#
# api = HfApi()
# api.create_repo("NAME/tiny-gpt2", exist_ok=True)
# api.upload_folder(repo_id="NAME/tiny-gpt2", folder_path="tuned")
# ```

# %% [markdown] lang="en"
# ## Where to go from here
#
# [nets/README.md](../../nets/README.md) lists the nets with published weights, and how
# [adapters](../../nets/README.md#adapters) and [whole models](../../nets/README.md#large-models-on-other-servers) leave
# again. [gpt.py](../README.md#gpt) trains and samples, [generate.py](../README.md#generate) is faster,
# [finetune_text.py](../README.md#finetune_text) tunes BERTs, and [serve.py](../README.md#serve) answers over HTTP.

# %% [markdown] lang="zh"
# ## 接下来
#
# [nets/README.md](../../nets/README.md) 列出有公开权重的网络，
# 以及如何导出[适配器](../../nets/README.md#adapters)和 [整个模型](../../nets/README.md#large-models-on-other-servers)。
# [gpt.py](../README.md#gpt) 负责训练和生成，[generate.py](../README.md#generate) 生成得更快，
# [finetune_text.py](../README.md#finetune_text) 微调 BERT，[serve.py](../README.md#serve) 通过 HTTP 提供服务。
