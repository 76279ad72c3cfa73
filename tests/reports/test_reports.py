"""A study's files: Markdown, pictures, a page that a browser shows without a network, and what wandb is
told.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure
from wandb_files import history, offline_run

from dare_train.evaluation.wandb_run import studying
from dare_train.reports import drawing
from dare_train.reports.document import Chart, Curve, Study, Table
from dare_train.reports.drawing import png
from dare_train.reports.page import html
from dare_train.reports.writing import write_study

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FIRST, SECOND = (0x1F, 0x5F, 0xA8), (0xC8, 0x55, 0x1B)
"""Colours of the first two curves; the page itself uses only the first."""


def study(**changes: object) -> Study:
    curves = (
        Curve.over("one & two", {0.0: [0.9], 0.5: [0.8, 0.9], 0.9: [0.4, 0.5, 0.6]}),
        Curve(label="<calculated>", x=(0.0, 0.5, 0.9), y=(0.9, 0.7, 0.3)),
    )
    chart = Chart(
        name="trial-accuracy",
        title="Accuracy",
        caption="What was measured.",
        x="p",
        y="accuracy",
        curves=curves,
        levels={"all": 0.9},
    )
    table = Table(
        title="Rates",
        columns=("p", "accuracy", "count"),
        rows=(("0", 0.123456, 12345), ("<b>", 1.0, 1)),
        note="A note.",
    )
    fields = dict(
        name="trial", title="A <trial>", question="Does it work?", findings=("It does & more.",),
        setup={"seed": 3}, data={"x": [1.5]},
        tables=(table,), charts=(chart,),
    )  # fmt: skip
    return Study(**{**fields, **changes})  # type: ignore[arg-type]


def test_markdown_and_json_say_the_same() -> None:
    text = study().markdown()
    assert text.startswith(
        "# A <trial>\n\nDoes it work?\n\n* It does & more.\n\n**Rates**\n\n| p | accuracy | "
        "count |\n| --- | --- | --- |\n"
    )
    assert "| 0 | 0.1235 | 12,345 |\n" in text
    assert text.endswith("\nA note.\n")
    found = json.loads(study().json())
    assert (found["study"], found["x"], found["setup"]["seed"]) == ("trial", [1.5], 3)
    assert {"python", "torch", "numpy"} <= found["setup"].keys()


def test_pictures_show_every_curve_and_are_the_same_every_time() -> None:
    chart = study().charts[0]
    assert png(chart) == png(chart)
    picture = (matplotlib.image.imread(io.BytesIO(png(chart)))[..., :3] * 255).round().astype(int)
    assert picture.shape[0] > 600
    for colour in (FIRST, SECOND):
        assert (np.abs(picture - colour).sum(-1) < 12).sum() > 200


@pytest.mark.parametrize(
    "change",
    [
        dict(log_x=True),
        dict(log_y=True),
        dict(ticks=("a long name",) * 9),
        dict(y_range=(0.5, 1.0)),
        dict(curves=()),
    ],
)
def test_charts_of_every_kind_are_drawn(change: dict[str, object]) -> None:
    chart = study().charts[0]
    fields = {**{name: getattr(chart, name) for name in chart.__dataclass_fields__}, **change}
    assert png(Chart(**fields)) != png(chart)


def ticks_of(chart: Chart) -> list[tuple[str, float, float]]:
    """What stands at the x axis, and from where to where, left to right."""
    figure = Figure(figsize=(8.0, 5.4), layout="constrained")
    axis = figure.subplots()
    drawing._fill(axis, chart)
    figure.draw_without_rendering()
    labels = [label for label in axis.get_xticklabels() if label.get_text()]
    boxes = [label.get_window_extent() for label in labels]
    return [(label.get_text(), box.x0, box.x1) for label, box in zip(labels, boxes, strict=True)]


def chart_of(*places: float, log_x: bool) -> Chart:
    curve = Curve(label="one", x=places, y=tuple(range(len(places))))
    return Chart(name="one", title="", caption="", x="x", y="y", curves=(curve,), log_x=log_x)


@pytest.mark.parametrize(
    "places",
    [
        (1.22, 1.74, 2.16, 4.01, 4.05, 4.31, 4.46, 5.98, 6.95, 7.82, 7.95, 18.7, 19.8, 32.0),
        (0.00123, 0.00124, 0.0999, 0.1, 0.101, 1.0, 10.0, 11.0, 12.0, 13.0, 1000.0),
        (1.0, 1.01, 1.02, 1.3),
    ],
)
def test_numbers_at_a_logarithmic_axis_do_not_touch(places: tuple[float, ...]) -> None:
    found = ticks_of(chart_of(*places, log_x=True))
    assert found[0][0] == f"{places[0]:.3g}"
    assert all(end + 2 < begin for (_, _, end), (_, begin, _) in pairwise(found)), found


def test_whole_numbers_have_whole_ticks() -> None:
    assert {text for text, _, _ in ticks_of(chart_of(0, 1, 2, log_x=False))} >= {"0", "1", "2"}
    assert "0.6" in {text for text, _, _ in ticks_of(chart_of(0.5, 1, 1.5, log_x=False))}


def test_the_page_holds_everything_and_asks_for_nothing(tmp_path: Path) -> None:
    page = write_study(study(), tmp_path / "out")
    assert sorted(path.name for path in page.parent.iterdir()) == [
        "trial-accuracy.png",
        "trial.html",
        "trial.json",
        "trial.md",
    ]
    text = page.read_text()
    assert "A &lt;trial&gt;" in text
    assert "&lt;b&gt;" in text
    assert "<b>" not in text
    assert re.findall(r'(?:src|href)="(?!data:)|url\(', text) == []
    assert "<script" not in text


def test_pictures_of_metrics_of_any_name_lie_in_the_folder(tmp_path: Path) -> None:
    chart = study().charts[0]
    names = ("trial-arc_easy/acc_norm", "../../up", "trial-arc_easy-acc_norm", "x" * 300)
    several = replace(study(), charts=tuple(replace(chart, name=name) for name in names))
    page = write_study(several, tmp_path / "in" / "out")
    assert {path.name for path in page.parent.glob("*.png")} == {
        "trial-arc_easy-acc_norm.png",
        "-..-up.png",
        "trial-arc_easy-acc_norm-2.png",
        f"{'x' * 100}.png",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def browser() -> str:
    paths = [path for name in BROWSERS if (path := shutil.which(name))]
    if not paths:
        missing = (
            f"no browser: one of {', '.join(BROWSERS)} is needed (scripts/browser installs one, as root)"
        )
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    return paths[0]


def shown(page: Path, folder: Path) -> tuple[np.ndarray, str]:
    """The pixels of a page in a headless browser without a network, and what it complained about."""
    picture = folder / "page.png"
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--window-size=1000,1600",
        "--enable-logging=stderr",
    ]
    offline = [
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={folder / 'profile'}",
        f"--screenshot={picture}",
    ]
    done = subprocess.run(
        [browser(), *options, *offline, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert picture.exists(), done.stderr
    pixels = (matplotlib.image.imread(picture)[..., :3] * 255).round().astype(int)
    return pixels, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def test_a_browser_shows_the_page_from_disk(tmp_path: Path) -> None:
    pixels, complaints = shown(write_study(study(), tmp_path / "out"), tmp_path)
    assert complaints == ""
    for colour in (FIRST, SECOND):
        assert (np.abs(pixels - colour).sum(-1) < 30).sum() > 100, "the picture of the chart is not there"
    blank = tmp_path / "without.html"
    blank.write_text(html(study(charts=()), {}))
    pixels, _ = shown(blank, tmp_path)
    assert (np.abs(pixels - SECOND).sum(-1) < 30).sum() == 0, "the colour is there without the chart"


def test_the_browser_refuses_what_the_page_does_not_hold(tmp_path: Path) -> None:
    page = write_study(study(), tmp_path / "out")
    page.write_text(
        page.read_text().replace(
            "</body>", "<script>document.title = 'run'</script><img src='http://example.com/a.png'></body>"
        )
    )
    _, complaints = shown(page, tmp_path)
    assert complaints.count("Content Security Policy") >= 2


def test_wandb_gets_curves_tables_pictures_and_the_page(tmp_path: Path, quiet: Path) -> None:
    with studying("trials"):
        write_study(study(), tmp_path / "out")
    records = offline_run(quiet)
    (row,) = history(records)
    assert row["trial/trial-accuracy/picture/_type"] == "image-file"
    assert row["trial/page/_type"] == "html-file"
    assert (row["trial/table/0/_type"], row["trial/table/0/nrows"]) == ("table-file", 2)
    assert row["trial/trial-accuracy_table/nrows"] == 3 + 3, "each point of each curve"
    settings = json.dumps(
        [json.loads(item.value_json) for record in records for item in record.config.update]
    )
    assert "wandb/lineseries/v0" in settings
    summary = {item.key: json.loads(item.value_json) for record in records for item in record.summary.update}
    assert summary["trial/findings"] == ["It does & more."]


def test_nothing_is_told_without_a_run(tmp_path: Path, quiet: Path) -> None:
    with studying(None):
        write_study(study(), tmp_path / "out")
    assert list(quiet.rglob("*.wandb")) == []
