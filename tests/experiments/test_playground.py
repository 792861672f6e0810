import functools

import pytest

from tests.experiments.runs import call, flag_id, is_png, refused, result

QUICK = ("--steps", "300", "--lengths", "16", "32", "--rounds", "1", "--name", "one")
PICTURES = ("positions", "masks", "smoothed_targets", "learning_rate", "attention_maps", "cost")
refuse = functools.partial(refused, "playground")


def test_pictures_and_figures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("playground", *QUICK) == 0
    folder = tmp_path / "runs" / "playground" / "one"
    assert all(is_png(folder / f"{name}.png") for name in PICTURES)
    figures = result(folder)
    assert figures["reversed_letters_right"] > 0.95
    # The peak of width^-0.5 min(step^-0.5, step warmup^-1.5) is at the end of the warm-up.
    assert figures["peak_width_512"] == pytest.approx((512 * 4000) ** -0.5, rel=1e-3)
    assert figures["divergence_when_sure_0.4"] > figures["divergence_when_sure_0.1"] > 0.1
    assert figures["divergence_when_sure_0.0"] < 1e-3
    assert all(figures[f"ms/{method}/{n}"] > 0 for method in ("explicit", "fused") for n in (16, 32))


def test_attention_of_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for part in ("train", "val", "test"):
        for language, lines in (("de", "Der Bus\nAm Montag\n"), ("en", "the bus\non Monday\n")):
            (tmp_path / f"{part}.{language}").write_text(lines, encoding="utf-8")
    options = ("--data", ".", "--steps", "2", "--vocabulary", "300", "--tokens", "20", "--no-compile")
    assert call("translate", *options, "--eval-every", "1000", "--name", "trained") == 0
    assert call("playground", *QUICK, "--steps", "1", "--run", "runs/translate/trained", "Der Bus") == 0
    folder = tmp_path / "runs" / "playground" / "one"
    assert is_png(folder / "attention_maps.png") and is_png(folder / "attention_maps" / "cross.png")
    assert "translation" in result(folder)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rounds", "0"], "--rounds is 0; expected at least 1"),
        (["--lengths", "0"], "--lengths is 0; expected at least 1"),
        (["--run", "nowhere"], "nowhere"),
    ],
    ids=flag_id,
)
def test_refused_in_one_line(flags, message, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert message in refuse(capfd, *QUICK[:-2], *flags)
