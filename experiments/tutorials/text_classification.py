# %% [markdown] lang="en"
# # A small Chinese BERT that classifies texts
#
# Is an opinion good or bad? Counting words goes far, but "the food is good, although it is dear" and "the food is good,
# but it is dear" have the same words and not the same outcome. We generate such sentences in Chinese, cut them into
# tokens, train a BERT of 76,000 parameters from scratch, put TF-IDF beside it, and look at its attention.
#
# You need to know what training a classifier is, and a little PyTorch. No Chinese is needed: the words are explained.

# %% [markdown] lang="zh"
# # 用一个小型中文 BERT 做文本分类
#
# 一句评价是好评还是差评？数词频就能做得不错，但是“菜好吃，尽管价格太贵”和“菜好吃，但是价格太贵”用词几乎一样，
# 结论却相反。我们生成这样的中文句子，切成 token，从零训练一个 7.6 万参数的 BERT，与 TF-IDF 作比较，再看看它的注意力。
#
# 读者需要知道什么是训练分类器，并了解一点 PyTorch。

# %%
from itertools import permutations, product

import matplotlib.pyplot as plt
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn.functional import pad

from core import random, spec, tree
from core.attention import queries_keys_values
from nets.language import bert
from train import optimizers
from train.data.text import ragged, subwords
from train.losses import cross_entropy
from train.metrics.classification import accuracy
from train.optimizers import schedules
from train.plots import fonts
from train.step import make_step, start

# %% [markdown] lang="en"
# ## Sentences with a rule
#
# A grammar makes them, not people: a place, then one opinion, or two opposite ones with a conjunction. After 但是, 不过
# (but) the second opinion decides, before 尽管, 虽然 (although) the first. 不 is "not". Real reviews are less regular
# and TF-IDF does better on them; these are made so that order matters. Sentences of the test are not among those that
# we learn from.

# %% [markdown] lang="zh"
# ## 有规律的句子
#
# 这些句子不是人写的，而是由一个小语法生成的：先是地点，然后是一个评价，或者用连词连接的两个相反的评价。
# “但是”“不过”之后的评价决定结论，“尽管”“虽然”则由前一个评价决定。真实的评论没有这么规则，
# TF-IDF 在真实评论上的表现要好得多；这里是有意让语序起作用。测试用的句子不在学习用的句子里。

# %%
OPINIONS = {  # subject: (bad, good)
    "菜": (("难吃", "不好吃", "不新鲜"), ("好吃", "新鲜", "不咸")),  # food
    "服务": (("冷淡", "不热情", "太慢"), ("热情", "周到", "不慢")),  # service
    "环境": (("太吵", "不干净", "不安静"), ("干净", "安静", "不吵")),  # surroundings
    "价格": (("太贵", "不实惠"), ("实惠", "不贵")),  # price
}
PLACES = ("这家店", "他们家", "这里")
DECIDES = {"，但是": 1, "，不过": 1, "，尽管": 0, "，虽然": 0}  # which of the two opinions

opinions = [(subject, word, good) for subject, lists in OPINIONS.items() for good in (0, 1) for word in lists[good]]
plain = [(place + subject + word, good) for place, (subject, word, good) in product(PLACES, opinions)]
mixed = [
    (f"{place}{a}{first}{conjunction}{b}{second}", (good, 1 - good)[which])
    for place, (conjunction, which) in product(PLACES, DECIDES.items())
    for (a, first, good), (b, second, other) in permutations(opinions, 2)
    if a != b and other == 1 - good
]


def divide(rows, count, key):
    """(count rows at random, the others)."""
    order = random.permutation(key, len(rows)).tolist()
    return [rows[i] for i in order[:count]], [rows[i] for i in order[count:]]


plain_train, plain_test = divide(plain, 45, random.key(0))
mixed_train, mixed_test = divide(mixed, 1200, random.key(1))
train = plain_train * 16 + mixed_train  # the few plain ones more often
tests = {"one opinion": plain_test, "two opposite ones": mixed_test}
for text, good in [*plain_test[:2], *mixed_test[:4]]:
    print(text, "->", ("bad", "good")[good])
print(f"{len(set(train))} different sentences to learn from;", {name: len(rows) for name, rows in tests.items()})

# %% [markdown] lang="en"
# ## From text to numbers
#
# WordPiece, BERT's tokenizer, takes each Chinese character for a word of its own, so a token is a character here. Each
# text begins with [CLS], at which the net answers, and ends with [SEP]; short ones are filled up with [PAD], number 0,
# to which nothing attends.

# %% [markdown] lang="zh"
# ## 从文本到数字
#
# BERT 的分词器 WordPiece 把每个汉字当作一个词，所以这里一个 token 就是一个字。每段文本以 [CLS] 开头，
# 网络在它那里给出答案，以 [SEP] 结尾；短文本用 [PAD]（编号 0）补齐，没有谁会关注它。

# %%
tokenizer = subwords.train_word_piece([text for text, _ in train], 400)


def encode(texts):
    """Tokens (texts, 18)."""
    table, lengths = ragged.padded([tokenizer.encode(text, special=True) for text in texts])
    return pad(table, (0, 18 - table.shape[1]))


def labels_of(rows):
    return torch.tensor([good for _, good in rows])


x, y = encode([text for text, _ in train]), labels_of(train)
print(tuple(x.shape), "with", tokenizer.vocabulary_size, "tokens:", x[0].tolist())
print([tokenizer.tokenizer.id_to_token(i) for i in x[0].tolist()])

# %% [markdown] lang="en"
# ## Without a net
#
# TF-IDF counts characters and pairs of neighbours, rare ones with more weight; logistic regression makes a decision of
# the counts. It is the figure to beat, and it takes a tenth of a second.

# %% [markdown] lang="zh"
# ## 不用网络
#
# TF-IDF 统计单字和相邻的字对，越少见的权重越大；逻辑回归根据这些统计做决定。这是必须超过的基准，只需要零点几秒。

# %%
vectors = TfidfVectorizer(analyzer="char", ngram_range=(1, 2), sublinear_tf=True)
regression = LogisticRegression(C=10, max_iter=1000).fit(vectors.fit_transform(text for text, _ in train), y.numpy())
scores = {}
for name, rows in tests.items():
    scores["TF-IDF", name] = regression.score(vectors.transform([text for text, _ in rows]), labels_of(rows).numpy())
    print(f"TF-IDF, {name}: {scores['TF-IDF', name]:.1%}")

# %% [markdown] lang="en"
# ## BERT
#
# Two blocks of attention and an MLP, each followed by a layer norm (Devlin et al. 2019, arXiv:1810.04805), and a
# classifier at [CLS]. BERT's initial values, N(0, 0.02²), are for a width of 768; for 64 we take matrices four times as
# large, or training would begin much more slowly.

# %% [markdown] lang="zh"
# ## BERT
#
# 两个模块，每个由注意力和 MLP 组成，各跟一个层归一化（Devlin et al. 2019, arXiv:1810.04805），最后在 [CLS] 处接分类器。
# BERT 的初始值 N(0, 0.02²) 适合宽度 768；宽度只有 64 时，我们把矩阵放大四倍，否则训练起步会慢得多。

# %%
sizes = {"layers": 2, "heads": 4, "width": 64, "hidden": 128, "context": 18}
off = {"dropout": 0.0, "attention_dropout": 0.0}
cfg = bert.Config(tokenizer.vocabulary_size, head="sequence", classes=2, **sizes, **off)
model = bert.spec(cfg)
params = tree.map(lambda leaf: 4 * leaf if leaf.ndim > 1 else leaf, spec.init(random.key(2), model))
print(f"{tree.count(model):,} parameters; logits", tuple(bert.apply(params, x[:5], cfg).shape))

# %% [markdown] lang="en"
# Is it a BERT? torch.nn has the same block, so we give it our values and compare the states at all tokens.

# %% [markdown] lang="zh"
# 它真的是 BERT 吗？torch.nn 里有同样的模块，我们把参数交给它，比较所有 token 处的状态。


# %%
def theirs(p):
    layer = nn.TransformerEncoderLayer(64, 4, 128, 0.0, "gelu", layer_norm_eps=cfg.eps, batch_first=True)
    names = {"self_attn.out_proj": "attn.proj", "linear1": "mlp.up", "linear2": "mlp.down"}
    names |= {"norm1": "norm1", "norm2": "norm2"}
    state = {f"{a}.{leaf}": tree.get(p, f"{b}.{leaf}") for a, b in names.items() for leaf in ("weight", "bias")}
    state |= {f"self_attn.in_proj_{leaf}": p["attn"]["qkv"][leaf] for leaf in ("weight", "bias")}
    layer.load_state_dict(state)
    return layer


states, mask = bert.hidden_states(params, x[:8], cfg), x[:8] != 0  # three of (8, 18, 64); (8, 18)
h = states[0]
for p in params["blocks"]:
    h = theirs(p)(h, src_key_padding_mask=~mask)
torch.testing.assert_close(states[-1][mask], h[mask].detach(), rtol=1e-4, atol=1e-4)

# %% [markdown] lang="en"
# ## Training

# %% [markdown] lang="zh"
# ## 训练

# %%
STEPS = 120


def losses(params, batch, keys=None):
    return cross_entropy(bert.apply(params, batch[0], cfg, train=True), batch[1], reduction="none")  # (examples,)


optimizer = optimizers.adamw(schedules.warmup_cosine(4e-3, warmup_steps=20, steps=STEPS))
step = make_step(losses, optimizer, compile=False)
state = start(random.key(3), params, model, optimizer)
for i in range(STEPS):
    rows = random.randint(random.fold_in(random.key(4), i), (64,), 0, len(y))
    state, metrics = step(state, (x[rows], y[rows]))
    if i % 30 == 29:
        print(f"step {i + 1}: loss {metrics['loss']:.3f}")

for name, rows in tests.items():
    right = accuracy(bert.apply(state.params, encode([text for text, _ in rows]), cfg), labels_of(rows))
    print(f"{name}: BERT {right:.1%}, TF-IDF {scores['TF-IDF', name]:.1%}")

# %% [markdown] lang="en"
# ## Where it looks
#
# In each head a token has a query $q$, and every token a key $k$; the attention is
#
# $$a_{ij} = \mathrm{softmax}_j \big( q_i \cdot k_j / \sqrt{d} \big)$$
#
# We compute it for two sentences that differ in the conjunction alone, and check the result with torch.nn.

# %% [markdown] lang="zh"
# ## 它在看哪里
#
# 在每个头里，一个 token 有查询 $q$，每个 token 有键 $k$，注意力为
#
# $$a_{ij} = \mathrm{softmax}_j \big( q_i \cdot k_j / \sqrt{d} \big)$$
#
# 我们对两个只有连词不同的句子计算注意力，并用 torch.nn 核对。

# %%
pair = ["这家店菜好吃，但是价格太贵", "这家店菜好吃，尽管价格太贵"]
tokens = encode(pair)
mask = tokens != 0
probabilities = bert.apply(state.params, tokens, cfg).softmax(-1)[:, 1]
states = bert.hidden_states(state.params, tokens, cfg)
maps = []
for p, h in zip(state.params["blocks"], states[:-1], strict=True):
    q, k, _ = queries_keys_values(p["attn"], h, cfg.heads)  # (2, 4, 18, 16): texts, heads, tokens, depth
    logits = q @ k.mT / 16**0.5  # (2, 4, 18, 18)
    maps.append(logits.masked_fill(~mask[:, None, None, :], -torch.inf).softmax(-1))
    _, expected = theirs(p).self_attn(h, h, h, key_padding_mask=~mask, average_attn_weights=False)
    torch.testing.assert_close(maps[-1], expected.detach(), rtol=1e-3, atol=1e-4)

# %% [markdown] lang="en"
# From [CLS], in the last block. `fonts.use` finds an installed font with Chinese characters; without one, boxes are
# drawn and a line names a package to install. Attention tells where a head looks, not why the net decides; that the
# conjunction alone turns the answer, the two probabilities show.

# %% [markdown] lang="zh"
# 下图是最后一个模块中从 [CLS] 出发的注意力。`fonts.use` 会找到系统里带汉字的字体；若没有，图中显示方框，
# 并提示该安装哪个软件包。注意力说明一个头在看哪里，不说明网络为何这样决定；而只换一个连词答案就反转，
# 这由两个概率可以看出。

# %%
figure, axes = plt.subplots(2, 1, figsize=(8, 4.6), layout="constrained")
for axis, ids, attention, probability in zip(axes, tokens, maps[-1], probabilities, strict=True):
    live = int((ids != 0).sum())
    picture = axis.imshow(attention[:, 0, :live].numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axis.set_xticks(range(live), [tokenizer.tokenizer.id_to_token(i) for i in ids[:live].tolist()])
    axis.set_yticks(range(4), ["1", "2", "3", "4"])
    axis.set_ylabel("head")
    axis.set_title(f"probability of good: {probability:.1%}", fontsize=11)
figure.colorbar(picture, ax=axes, label="attention from [CLS]")
fonts.use(figure)
plt.show()

# %% [markdown] lang="en"
# ## Published Chinese weights
#
# For real texts start from weights that have read millions of them. RBT3 is a Chinese BERT of three layers, 38 million
# parameters (`HF_ENDPOINT` names a mirror of the hub); its head is drawn anew, for any number of classes:
#
# ```py
# params, cfg = bert.from_pretrained("hfl/rbt3", "sequence", classes=2, key=random.key(0))
# ```
#
# The script does all of it for a file of labelled texts, also with LoRA, and puts TF-IDF beside the result:
#
# ```sh
# python experiments/finetune_text.py --weights hfl/rbt3 --data FILE.tsv --lora 8
# ```

# %% [markdown] lang="zh"
# ## 使用公开的中文权重
#
# 真实文本应当从读过大量文本的权重开始。RBT3 是三层的中文 BERT，
# 有 3800 万个参数（环境变量 `HF_ENDPOINT` 可以指定镜像站）；分类头重新初始化，类别数任意：
#
# ```py
# params, cfg = bert.from_pretrained("hfl/rbt3", "sequence", classes=2, key=random.key(0))
# ```
#
# 脚本会对一个带标签的文本文件完成全部工作，也支持 LoRA，并给出 TF-IDF 的结果作对照：
#
# ```sh
# python experiments/finetune_text.py --weights hfl/rbt3 --data FILE.tsv --lora 8
# ```

# %% [markdown] lang="en"
# ## Where to go from here
#
# [finetune_text.py](../README.md#finetune_text), with explanations of single answers;
# [pretrain.py](../README.md#pretrain), to let a BERT read your own texts first; [ner.py](../README.md#ner) for a label
# per token. The nets are in [nets/README.md](../../nets/README.md#texts-from-both-sides).

# %% [markdown] lang="zh"
# ## 接下来
#
# [finetune_text.py](../README.md#finetune_text)，还能解释单个预测；[pretrain.py](../README.md#pretrain)，
# 先让 BERT 读您自己的文本；[ner.py](../README.md#ner) 给每个 token 打标签。
# 网络见 [nets/README.md](../../nets/README.md#texts-from-both-sides)。
