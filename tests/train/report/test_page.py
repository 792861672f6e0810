"""train.report: the file without a browser, and the page in a headless Chromium."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from tests import browser
from train.report import Column, Report, page, sheets, write

COUNT = 60
HOSTILE = '</script><script>document.title = "broken"</script><b>bold</b> & \ud83d \u2028'


def example(count: int = COUNT, **changes) -> Report:
    generator = np.random.default_rng(0)
    labels = np.arange(count) % 3
    pictures = np.repeat((np.arange(count) % 250).astype(np.uint8), 12 * 12).reshape(count, 12, 12, 1)
    loss = generator.exponential(size=count)
    loss[3], loss[7] = 99.0, 0.0
    report = Report(
        title="a net on data",
        facts={"examples": str(count)},
        names=[f"number {i}" for i in range(count)],
        columns={
            "suspicion": Column("suspicion", np.linspace(0, 1, count), "How suspicious."),
            "loss": Column("loss", loss, "In nats."),
            "norm": Column("gradient norm", generator.exponential(size=count), "Its length."),
            "self_influence": Column("self-influence", np.where(np.arange(count) == 5, np.nan, 1.0), "By itself."),
        },
        rank="suspicion",
        scatter=(("norm", "loss"), ("norm", "self_influence")),
        classes=("cat", "dog", HOSTILE),
        labels=labels,
        predicted=np.roll(labels, 1),
        pictures=pictures,
        known=np.arange(count) == count - 1,
        neighbours=np.stack([(np.arange(count) + k) % count for k in (1, 2)], 1),
        cosines=np.full((count, 2), 0.5),
        redundant=((0, 1, 0.9),),
        conflicting=((2, 3, -0.9),),
        layers={"a.weight": loss, "b.bias": np.zeros(count)},
        layer_facts={"a.weight": {"mean": "1"}, "b.bias": {"mean": "0"}},
        class_rows=({"class": "cat", "examples": "20"},),
        class_cosines=np.eye(3),
        notes=("A note.",),
    )
    return report._replace(**changes)


def data_of(text: str) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])


def test_file_is_whole_and_self_contained(tmp_path):
    path = tmp_path / "report.html"
    write(path, example())
    text = path.read_text(encoding="utf-8")
    assert not re.search(r'<(script|link|img|iframe)[^>]*(src|href)="(?!data:|#)', text)
    assert "</script><script>document.title" not in text and "<b>bold" not in text
    data = data_of(text)
    assert data["columns"][1]["values"][3] == 99.0 and data["columns"][3]["values"][5] is None
    assert data["redundant"] == [[0, 1, 0.9]] and data["known"][-1] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_page_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        write(tmp_path / "file" / "report.html", example())


def decoded(url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


def test_sheets_hold_each_picture_at_its_place():
    small = np.arange(1100, dtype=np.uint16).astype(np.uint8).repeat(64).reshape(1100, 8, 8, 1)
    out = sheets.sheets(small, 1)  # tiny ones are not made smaller
    assert out.side == 8 and len(out.urls) == 2
    for i in (0, 33, 1023, 1024, 1099):
        row, column = divmod(i % sheets.PER_SHEET, sheets.COLUMNS)
        tile = decoded(out.urls[i // sheets.PER_SHEET])[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
        assert (tile == i % 256).all()


@pytest.mark.parametrize("budget", [150_000, 1_500_000])
def test_sheets_keep_to_their_budget(budget):
    noise = np.random.default_rng(0).integers(0, 255, (200, 40, 60, 3), np.uint8)
    out = sheets.sheets(noise, budget)
    assert sum(map(len, out.urls)) <= budget and out.side >= 16
    first = decoded(out.urls[0])[: out.side, : out.side]
    assert first[0].mean() > 240 and abs(first[out.side // 2].mean() - 127) < 40  # padded above, noise in the middle


def test_histograms_by_layer_are_numpys():
    values = np.random.default_rng(0).lognormal(size=500)
    out = page.layer_histograms({"a": values, "zero": np.zeros(500)})
    assert out["names"] == ["a", "zero"] and sum(out["shares"][0]) == pytest.approx(1.0, abs=1e-2)
    assert out["shares"][1] == [0.0] * page.BINS
    middle = np.average(out["centres"], weights=out["shares"][0])
    assert middle == pytest.approx(np.log10(values).mean(), abs=0.05)


def rows_of(tab) -> list[str]:
    return tab.locator("#table tbody td.example").all_inner_texts()


def at(tab, plot: int, example: int) -> tuple[float, float]:
    """Where a plot has the dot of an example, in pixels of the window."""
    tab.locator(f"#scatter{plot}").scroll_into_view_if_needed()
    return tuple(
        tab.evaluate(
            """([plot, i]) => {
          const { div, axes } = plots[plot], layout = div._fullLayout, box = div.getBoundingClientRect();
          return [box.left + layout._size.l + layout.xaxis.d2p(axes[0].values[i]),
                  box.top + layout._size.t + layout.yaxis.d2p(axes[1].values[i])];
        }""",
            [plot, example],
        )
    )


@pytest.mark.slow
def test_page_in_a_browser(tmp_path):
    write(tmp_path / "report.html", example())
    with browser.opened(tmp_path / "report.html", tmp_path / "profile") as (tab, faults):
        tab.wait_for_selector("body[data-ready=yes]")
        assert tab.title() == "a net on data" and not faults
        # Sorted by suspicion at first, then by what is clicked.
        assert rows_of(tab)[:2] == ["number 59", "number 58"] and len(rows_of(tab)) == 25
        tab.click("th[data-key=loss] button")
        assert rows_of(tab)[0] == "number 3"
        tab.click("th[data-key=loss] button")
        assert rows_of(tab)[0] == "number 7"
        tab.get_by_role("button", name="next rows").click()
        assert tab.inner_text("#position") == "26–50"
        # Search, and the filter of a class.
        tab.fill("#search", "number 1")
        assert sorted(rows_of(tab)) == sorted(["number 1", *(f"number {i}" for i in range(10, 20))])
        tab.select_option("#class", "0")
        assert sorted(rows_of(tab)) == sorted(f"number {i}" for i in (12, 15, 18))
        tab.fill("#search", "flipped")
        tab.select_option("#class", "")
        assert rows_of(tab) == ["number 59"]
        tab.fill("#search", "")
        # A dot shows its example when pointed at, and keeps it when clicked; what looks like markup stays text.
        tab.mouse.move(*at(tab, 0, 3))
        tab.wait_for_selector("#tip:not([hidden])")
        assert "number 3" in tab.inner_text("#tip")
        tab.mouse.click(*at(tab, 0, 3))
        assert tab.inner_text("#detail").startswith("number 3") and "<b>bold</b>" in tab.inner_text("#detail")
        assert tab.locator("#detail .tile").count() == 3
        # A box in one plot marks its points in the other, and leaves them in the table.
        x, y = at(tab, 0, 3)
        tab.mouse.move(x - 8, y - 8)
        tab.mouse.down()
        tab.mouse.move(x + 8, y + 8, steps=4)
        tab.mouse.up()
        tab.wait_for_selector("#unselect:not([hidden])")
        assert rows_of(tab) == ["number 3"] and tab.evaluate("plots[1].div.data[0].selectedpoints") == [3]
        tab.click("#unselect")
        assert len(rows_of(tab)) == 25
        with tab.expect_download() as download:
            tab.click("#save")
        lines = download.value.path().read_text(encoding="utf-8").splitlines()
        assert lines[0].startswith("name,label,predicted,suspicion") and len(lines) == COUNT + 1
        tab.select_option("#histogram-score", "norm")
        assert not faults and tab.title() == "a net on data"


@pytest.mark.slow
def test_page_with_ten_thousand_pictures_is_small_and_fast(tmp_path):
    """Below 20 MB, sorted and searched in less than half a second."""
    count = 10_000
    noise = np.random.default_rng(0).integers(0, 255, (count, 8, 8, 3), np.uint8).repeat(4, 1).repeat(4, 2)
    near = np.stack([(np.arange(count) + k) % count for k in range(8)], 1)
    write(tmp_path / "report.html", example(count, pictures=noise, neighbours=near, cosines=np.full((count, 8), 0.123)))
    assert (tmp_path / "report.html").stat().st_size < 20_000_000
    with browser.opened(tmp_path / "report.html", tmp_path / "profile") as (tab, faults):
        tab.wait_for_selector("body[data-ready=yes]", timeout=120_000)
        timed = "(f) => { const begin = performance.now(); f(); return performance.now() - begin; }"
        seconds = [tab.evaluate(f"({timed})(() => sortBy('{key}'))") for key in ("loss", "name", "label")]
        seconds.append(tab.evaluate(f"({timed})(() => {{ find('search').value = 'number 77'; refresh(); }})"))
        assert max(seconds) < 500 and tab.inner_text("#matches") == "111 of 10,000" and not faults


@pytest.mark.slow
def test_page_of_texts_without_labels(tmp_path):
    texts = [HOSTILE, "a b"] + ["word " * 200] * (COUNT - 2)
    nothing = dict.fromkeys(("labels", "predicted", "pictures", "known", "class_cosines", "layers", "layer_facts"))
    report = example(classes=(), texts=texts, class_rows=(), redundant=(), conflicting=(), **nothing)
    write(tmp_path / "report.html", report)
    with browser.opened(tmp_path / "report.html", tmp_path / "profile") as (tab, faults):
        tab.wait_for_selector("body[data-ready=yes]")
        tab.fill("#search", "</script>")
        assert rows_of(tab) == ["number 0"] and not faults
