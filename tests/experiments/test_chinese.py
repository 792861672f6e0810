"""Chinese and Japanese text, pairs of sentences and names of classes come through whole."""

import numpy as np
import pytest
from PIL import Image

from tests.experiments.runs import call, is_png, result
from train.plots import fonts

SENTENCES = {
    "今天天气很好，我们去公园散步。": "今日は天気がいいので、公園を散歩します。",
    "她每天早上喝一杯绿茶。": "彼女は毎朝、緑茶を一杯飲みます。",
    "火车八点半从上海出发。": "列車は八時半に上海を出ます。",
    "这本书讲的是一只猫的故事。": "この本は一匹の猫の話です。",
    "请把窗户关上，外面很冷。": "外は寒いので、窓を閉めてください。",
}


@pytest.fixture
def needed(tmp_path, monkeypatch):
    """The letters that the pictures look for a font for."""
    monkeypatch.chdir(tmp_path)
    letters = set()
    monkeypatch.setattr(fonts, "fallbacks", lambda wanted: (letters.update(wanted) or [], frozenset()))
    return letters


def test_gpt_writes_the_characters_it_read(tmp_path, needed, capsys):
    text = "\n".join(SENTENCES) + "\n"
    (tmp_path / "text.txt").write_text(text * 12, encoding="utf-8")
    flags = ("--preset", "tiny", "--steps", "2", "--batch", "2", "--no-compile")
    assert call("gpt", "--text", "text.txt", *flags, "--name", "a") == 0
    sample = (tmp_path / "runs/gpt/a/sample.txt").read_text(encoding="utf-8")
    assert len(sample) > 100 and set(sample) <= set(text)
    capsys.readouterr()
    assert call("gpt", "sample", "--run", "runs/gpt/a", "--prompt", "今天", "--max-new-tokens", "9") == 0
    assert capsys.readouterr().out.startswith("今天")


@pytest.mark.slow
def test_translate_from_chinese_into_japanese(tmp_path, needed):
    lines = [f"{a} {i}\t{b} {i}\n" for i in range(20) for a, b in SENTENCES.items()]
    (tmp_path / "pairs.tsv").write_text("".join(lines), encoding="utf-8")
    flags = ("--vocabulary", "400", "--tokens", "200", "--steps", "1", "--no-compile", "--name", "a")
    assert call("translate", "--data", "pairs.tsv", "--source", "zh", "--target", "ja", *flags) == 0
    run = tmp_path / "runs/translate/a"
    assert "|tok:char|" in result(run)["bleu_signature"]
    samples = (run / "samples.txt").read_text(encoding="utf-8")
    assert any(f"  {a} " in samples and f"  = {b} " in samples for a, b in SENTENCES.items())
    assert all(is_png(run / "attention" / f"{part}.png") for part in ("encoder", "decoder", "cross"))
    assert needed & set("".join(SENTENCES))


def test_classes_with_chinese_names(tmp_path, needed, capsys):
    for name, colour in (("猫", 20), ("狗", 130), ("小鸟", 240)):
        for part in ("train", "val"):
            (tmp_path / "动物" / part / name).mkdir(parents=True)
            for i in range(4):
                noise = np.random.default_rng(i).integers(0, 9, (12, 12, 3))
                Image.fromarray((colour + noise).astype(np.uint8)).save(tmp_path / "动物" / part / name / f"{i}.png")
    flags = ("--net", "cifar-resnet8", "--size", "8", "--batch", "6", "--epochs", "1", "--workers", "0", "--no-compile")
    assert call("classify", "--data", "动物", *flags, "--name", "a") == 0
    run = tmp_path / "runs/classify/a"
    assert "小鸟" in (run / "report.txt").read_text(encoding="utf-8")
    assert is_png(run / "confusion.png") and is_png(run / "mistakes.png")
    assert needed >= set("猫狗小鸟")
    assert call("classify", "predict", "动物/val/猫/0.png", "--run", run) == 0
    assert any(name in capsys.readouterr().out for name in ("猫", "狗", "小鸟"))
