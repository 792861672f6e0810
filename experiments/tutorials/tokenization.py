# %% [markdown] lang="en"
# # Tokenizers: from characters to byte pairs
#
# A language model reads numbers, not letters. A **tokenizer** cuts a text into pieces and numbers them. We go from
# characters to bytes to byte pairs, write the last in about forty lines, and find the same tokens as the `tokenizers`
# library. Then we look at WordPiece and unigram pieces, at Chinese, and at what a large vocabulary costs.
#
# You need to know a little Python.

# %% [markdown] lang="zh"
# # 分词器：从字符到字节对
#
# 语言模型读的是数字，不是文字。**分词器**把文本切成小段并编号。我们从字符讲到字节，再到字节对（BPE），
# 用大约四十行代码实现它，并得到与 `tokenizers` 库相同的结果。然后看看 WordPiece 和 Unigram，看看中文，
# 以及大词表的代价。
#
# 读者只需要了解一点 Python。

# %%
import json
import re
from collections import Counter
from dataclasses import replace

import matplotlib.pyplot as plt
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from core import random, tree
from nets.language import gpt2
from train.data import DataError
from train.data.text import subwords
from train.data.text.text import embedded_text
from train.data.text.tokenizers import BYTES, CharTokenizer, train_byte_pairs

# %% [markdown] lang="en"
# ## Two texts
#
# English: the language reference that every Python brings along. Chinese: sentences put together from parts at random.
# That is a small language, six parts and a few words for each, so its figures are kinder than those of real Chinese.

# %% [markdown] lang="zh"
# ## 两种文本
#
# 英文用每个 Python 都自带的语言参考手册。中文用随机拼成的句子：这是一门词很少、句式固定的小语言，
# 所以下面的数字会比真实的中文好看。

# %%
english = embedded_text()
parts = [
    "今天 明天 昨天 周末 早上 晚上 下午 春天".split(),
    "北京 上海 广州 成都 西安 杭州 哈尔滨 乌鲁木齐".split(),
    "下雨 下雪 刮大风 天气很好 有点冷 热得很 阴转晴".split(),
    "，我 ，我们 ，她 ，他们 ，老师 ，学生们 ，小王的朋友".split(),
    "想 要 正在 喜欢 可以 不想 打算 准备".split(),
    "看书 喝茶 包饺子 写作业 听音乐 打篮球 坐地铁 去图书馆 读论文 训练神经网络 学习机器学习 调试分词器".split(),
]
columns = [random.randint(random.key(i), (3000,), 0, len(words)).tolist() for i, words in enumerate(parts)]
sentences = [
    "".join(words[i] for words, i in zip(parts, row, strict=True)) + "。" for row in zip(*columns, strict=True)
]
chinese = "\n".join(sentences)
print(f"English: {len(english):,} characters, {len(set(english))} different")
print(f"Chinese: {len(chinese):,} characters, {len(set(chinese))} different;", sentences[0])

# %% [markdown] lang="en"
# ## Characters, and bytes
#
# The simplest tokenizer has a number for each character of its text. What it has not seen it cannot read. Bytes know no
# such limit: UTF-8 writes any text with 256 of them, a Latin letter as one byte and a common Chinese character as
# three. But the texts become long, and a model works for each token.

# %% [markdown] lang="zh"
# ## 字符与字节
#
# 最简单的分词器给文本里的每个字符一个编号，没见过的字符就读不了。字节没有这个限制：UTF-8 用 256 种字节写出任何文本，
# 一个拉丁字母占一个字节，一个常用汉字占三个字节。但是文本会变长，而模型要为每个 token 做计算。

# %%
characters = CharTokenizer.from_text(english)
ids = characters.encode("to be")
print("characters:", ids, "->", characters.decode(ids))
try:
    characters.encode("存在")
except DataError as error:
    print("error:", error)
for text in ("to be", "存在"):
    print("bytes:", list(text.encode()), "->", bytes(list(text.encode())).decode())

# %% [markdown] lang="en"
# ## Byte pairs, by hand
#
# Byte pair encoding (Sennrich et al. 2016, arXiv:1508.07909) begins with bytes, and gives the most frequent pair of
# neighbours a number of its own, again and again. Frequent words become one token; rare ones fall apart into pieces,
# and nothing is unknown. Pairs do not cross the borders of words, so it is enough to count words, each with its
# frequency. To encode, the same merges are made in the same order.

# %% [markdown] lang="zh"
# ## 手写字节对编码
#
# 字节对编码 BPE（Sennrich et al. 2016, arXiv:1508.07909）从字节出发，一次又一次地给出现最多的相邻对一个新编号。
# 常见的词变成一个 token，罕见的词拆成几段，没有什么是未知的。合并不跨越词的边界，所以只需统计词及其频数。
# 编码时按同样的顺序做同样的合并。

# %%
WORDS = r" ?\w+| ?[^\w\s]+|\s+"  # a word with the space before it, marks, or white space
BYTE_OF_ID = [BYTES[letter] for letter in sorted(BYTES)]  # ids 0 to 255, in the library's order
ID_OF_BYTE = {byte: i for i, byte in enumerate(BYTE_OF_ID)}


def letters(word):
    return tuple(ID_OF_BYTE[byte] for byte in word.encode())


def merge(word, pair, new):
    """A word with each occurrence of the pair replaced by the new id."""
    out, i = [], 0
    while i < len(word):
        here = word[i : i + 2] == pair
        out.append(new if here else word[i])
        i += 2 if here else 1
    return tuple(out)


def train(text, size):
    """{pair of ids: new id}, in the order of learning."""
    words = {letters(word): count for word, count in Counter(re.findall(WORDS, text)).items()}
    merges = {}
    for new in range(256, size):
        pairs = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:], strict=False):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))  # the most frequent; of equals the smallest ids
        merges[best] = new
        words = {merge(word, best, new): count for word, count in words.items()}
    return merges


def encode(text, merges):
    out = []
    for word in map(letters, re.findall(WORDS, text)):
        while known := [pair for pair in zip(word, word[1:], strict=False) if pair in merges]:
            first = min(known, key=merges.get)  # the pair that was learned first
            word = merge(word, first, merges[first])
        out += word
    return out


def decode(ids, merges):
    pieces = [bytes([byte]) for byte in BYTE_OF_ID]
    for a, b in merges:
        pieces.append(pieces[a] + pieces[b])
    return b"".join(pieces[i] for i in ids).decode(errors="replace")


sample = english[:60_000]
merges = train(sample, 456)
print("the last pieces learned:", [decode([i], merges) for i in range(436, 456)])
ids = encode("The tokenizer returns 存在", merges)
print(len(ids), "tokens:", [decode([i], merges) for i in ids])
assert decode(ids, merges) == "The tokenizer returns 存在"

# %% [markdown] lang="en"
# ## The library agrees
#
# The same words, the same size, learned by the `tokenizers` library, written in Rust and much faster. All merges are
# equal, in order, and so are the tokens of another text.

# %% [markdown] lang="zh"
# ## 与库的结果一致
#
# 同样的切词规则、同样的大小，让 `tokenizers` 库来学；它用 Rust 写成，快得多。所有合并及其顺序都相同，
# 另一段文本的 token 也相同。

# %%
library = tokenizers.Tokenizer(models.BPE())
split = pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated")
library.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
library.train_from_iterator(
    [sample], trainers.BpeTrainer(vocab_size=456, initial_alphabet=sorted(BYTES), show_progress=False)
)
learned = json.loads(library.to_str())["model"]
numbered = [tuple(learned["vocab"][piece] for piece in pair) for pair in learned["merges"]]
assert numbered == list(merges)
assert encode(english[-5000:], merges) == library.encode(english[-5000:]).ids  # text that neither has seen
print(len(numbered), "merges are equal")

# %% [markdown] lang="en"
# ## Chinese
#
# Pairs learned from English know no Chinese character; each costs its three bytes. Learned from both texts, characters
# and whole words become tokens. This is why the same text costs more with one model than with another.

# %% [markdown] lang="zh"
# ## 中文
#
# 只从英文学来的字节对不认识任何汉字，每个汉字都要花三个字节。从两种文本一起学，汉字乃至整个词都会成为 token。
# 同一段文本在不同的模型上开销不同，原因就在这里。

# %%
held_english, held_chinese = english[-40_000:], chinese[-8_000:]
texts = [english[:150_000], chinese[:-8_000]]
of_english, of_both = train_byte_pairs(texts[:1], 2000), train_byte_pairs(texts, 2000)
for name, tokenizer in {"English pairs": of_english, "pairs of both": of_both}.items():
    for language, text in {"English": held_english, "Chinese": held_chinese}.items():
        print(f"{name} on {language}: {len(text) / len(tokenizer.encode(text)):.2f} characters per token")

# %% [markdown] lang="en"
# ## WordPiece and unigram pieces
#
# Two more ways to the same end. **WordPiece** (BERT) takes the longest known piece from the left, marks those that go
# on with a word by ##, and cuts Chinese into single characters; a word with an unknown character is [UNK]. **Unigram**
# pieces (T5) have probabilities, learned by EM, and a text becomes its most probable pieces; a space is part of the
# piece after it, here written as _. `train.data.text.subwords` learns both by the library.

# %% [markdown] lang="zh"
# ## WordPiece 与 Unigram
#
# 通向同一目标的另外两种办法。**WordPiece**（BERT）从左边起取已知的最长一段，词中间的段以 ## 标记，汉字一律切成单字；
# 含有未知字符的词整个变成 [UNK]。**Unigram**（T5）的每一段都有概率，由 EM 算法学得，文本切成概率最大的那种切法；
# 空格属于它后面的一段，这里写作 _。`train.data.text.subwords` 用该库学习这两种。

# %%
word_piece = subwords.train_word_piece(texts, 2000)
unigram = subwords.train_unigram([*texts[0].splitlines(), *texts[1].splitlines()], 2000)
for text in ("The interpreter's tokenizer returns naïve 🙂 pieces", "明天西安有点冷，学生们打算训练神经网络。"):
    print(text)
    for name, tokenizer in {"byte pairs": of_both, "WordPiece": word_piece, "unigram": unigram}.items():
        ids = tokenizer.encode(text)
        pieces = [tokenizer.decode([i]) if name == "byte pairs" else tokenizer.tokenizer.id_to_token(i) for i in ids]
        print(f"  {name:10} {len(ids):2}:", " ".join(piece.strip().replace("▁", "_") for piece in pieces))

# %% [markdown] lang="en"
# Byte pairs give back every text. The others do not: WordPiece forgets spaces, and unknown characters are lost. (A � is
# a byte that is no character by itself: the emoji has four.)

# %% [markdown] lang="zh"
# 字节对能还原任何文本，另外两种不能：WordPiece 会丢掉空格，未知字符也会丢失。（� 是单独不成字符的字节：
# 这个表情符号占四个字节。）

# %% [markdown] lang="en"
# ## What a vocabulary costs
#
# More tokens make texts shorter, so a context of fixed length holds more, and each step says more. But each token has a
# row in the embedding, and rare tokens are seen seldom and learned badly. With $V$ tokens of width $C$ the table has
#
# $$V \cdot C$$
#
# parameters: of GPT-2's 124 million, 39 million. We measure the gain on text that was held out, and the cost for a net
# of GPT-2's size.

# %% [markdown] lang="zh"
# ## 词表的代价
#
# 词表越大，文本越短，固定长度的上下文就能容纳更多内容，每一步也说得更多。但每个 token 在嵌入表里都占一行，
# 罕见的 token 很少见到，也就学不好。$V$ 个 token、宽度为 $C$ 时，嵌入表有
#
# $$V \cdot C$$
#
# 个参数：GPT-2 的 1.24 亿个参数中占 3900 万。我们在留出的文本上测量收益，并对 GPT-2 大小的网络计算代价。

# %%
sizes = (300, 500, 1000, 2000, 4000)
gain = {"English": [], "Chinese sentences": []}
for size in sizes:
    tokenizer = train_byte_pairs(texts, size)
    for (_, curve), text in zip(gain.items(), (held_english, held_chinese), strict=True):
        curve.append(len(text) / len(tokenizer.encode(text)))

vocabularies = [1_000, 4_000, 16_000, 50_257, 128_000]
share = []
for vocabulary in vocabularies:
    model = gpt2.spec(replace(gpt2.PRESETS["gpt2"], vocabulary=vocabulary))
    share.append(tree.count(model["tokens"]) / tree.count(model))
    print(f"{vocabulary:>7,} tokens: {tree.count(model):>11,} parameters, {share[-1]:.0%} of them in the embedding")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
for (language, curve), marker in zip(gain.items(), "os", strict=True):
    left.plot(sizes, curve, marker=marker, label=language)
left.set_xscale("log")
left.set_xticks(sizes, [f"{size}" for size in sizes])
left.minorticks_off()
left.set_xlabel("tokens of the vocabulary")
left.set_ylabel("characters per token, held out")
left.legend(loc="upper left")
right.plot(vocabularies, [100 * value for value in share], marker="o", color="tab:green")
right.set_xscale("log")
right.set_xticks(vocabularies, [f"{size / 1000:.0f}k" for size in vocabularies])
right.minorticks_off()
right.set_ylim(bottom=0)
right.set_xlabel("tokens of the vocabulary")
right.set_ylabel("percent of GPT-2 in its embedding")
plt.show()

# %% [markdown] lang="en"
# ## Where to go from here
#
# [compare_tokenizers.py](../README.md#compare_tokenizers) compares the three on any text and draws their merges.
# [gpt.py](../README.md#gpt) trains on characters, or with `--tokenizer` on byte pairs;
# [Chinese text](../README.md#chinese-text) has an example. The tokenizers are listed in
# [train/README.md](../../train/README.md#data).

# %% [markdown] lang="zh"
# ## 接下来
#
# [compare_tokenizers.py](../README.md#compare_tokenizers) 在任意文本上比较这三种分词器，并画出合并过程。
# [gpt.py](../README.md#gpt) 用字符训练，加 `--tokenizer` 则用字节对；
# [Chinese text](../README.md#chinese-text) 里有中文的例子。
# 所有分词器列在 [train/README.md](../../train/README.md#data)。
