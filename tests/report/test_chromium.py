"""The page in Debian's Chromium: no complaint, every figure drawn, nothing sideways; light, dark, wide and narrow."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.artifacts import Store
from pipeline.report.compare import comparison_of
from pipeline.report.page import page_of
from pipeline.report.records import read_run
from tests.report.chromium import CHROMIUM, Browser
from tests.report.written_run import PROMPT, answer, training, write_demo, write_evaluation, write_stage

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: `apt-get install chromium`, as .ci/run does"),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The page of a run that holds everything, of an unfinished one, and of both."""
    folder = tmp_path_factory.mktemp("pages")
    root = folder / "artifacts"
    write_demo(root)
    long = "x" * 300  # no place to break at
    items = [answer("ppo", 0, long, 0.1, [*PROMPT, {"role": "assistant", "content": long}])]
    items += [
        {"model": "reward", "task": "reward_accuracy", "item": i, "probability": 0.5 + i / 100, "preference": i % 3 > 0}
        for i in range(50)
    ]
    named = {"fingerprint": "f" * 64, "value": 0.6, "low": 0.5, "high": 0.7, "n": 50}
    rows = [
        *({"model": f"ppo{i or ''}", "task": "greedy", "metric": "gold", **named} for i in range(12)),
        {"model": "reward", "task": "reward_accuracy", "metric": "accuracy", **named},
    ]
    write_evaluation(root, rows, items, name="second")
    for name in "abcde":
        write_stage(root, name, type_="dpo", inputs={"init": ["demo/sft"]})
    for seed in range(8):
        sides = {"rewards/chosen": lambda i: i, "rewards/rejected": lambda i: -i}
        parents, rows = {"init": ["demo/sft"]}, training(loss=lambda i: i, **sides)
        write_stage(root, f"many@seed={seed}", type_="dpo", inputs=parents, config={"seed": seed}, metrics=rows)
    for turn in (1, 2, 3):
        more = {"metrics": {"rows": 10.0, "score": turn / 2}}
        write_stage(root, f"sample@{turn}", type_="sample", kind="rows", inputs={"init": ["demo/sft"]}, more=more)
    write_stage(root, "pretrain", run="begun", metrics=training(3, loss=lambda i: i), unfinished=True)
    demo, begun = (read_run(Store(root), name) for name in ("demo", "begun"))
    found = {"demo": page_of(demo, 2.5), "begun": page_of(begun, 2.5), "both": comparison_of(demo, begun, 2.5)}
    for name, text in found.items():
        (folder / f"{name}.html").write_text(text)
    return {name: folder / f"{name}.html" for name in found}


BACKGROUND = {False: "rgb(251, 251, 250)", True: "rgb(19, 22, 25)"}
SIZES = "[...document.querySelectorAll('figure svg.plot')].map(e => [e.clientWidth, e.clientHeight])"
SCALES = """[...document.querySelectorAll('.graph svg')].filter(e => e.clientWidth)
    .map(e => e.clientWidth / e.viewBox.baseVal.width)"""
SIDEWAYS = """[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1
    && !e.closest('.graph, details:not([open])')).map(e => e.outerHTML.slice(0, 200))"""


@pytest.mark.parametrize("name", ["demo", "begun", "both"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("is_dark", [False, True])
def test_every_page_is_drawn(browser: Browser, pages: dict[str, Path], name: str, width: int, is_dark: bool):
    browser.complaints.clear()
    browser.asked.clear()
    browser.show(pages[name], width=width, is_dark=is_dark)
    browser.value("document.querySelectorAll('details').forEach(e => { e.open = true; })")
    assert browser.complaints == []
    assert browser.asked == [pages[name].as_uri()]
    data = json.loads(re.findall(r'id="data">(.*?)</script>', pages[name].read_text())[0])
    titles = browser.value("[...document.querySelectorAll('figcaption')].map(e => e.firstChild.textContent)")
    assert titles == [each["title"] for each in data]
    sizes = browser.value(SIZES)
    assert len(sizes) == len(data) > 0
    assert all(w >= 250 and h >= 140 for w, h in sizes)
    assert browser.value("document.documentElement.scrollWidth <= innerWidth")
    assert browser.value(SIDEWAYS) == []
    assert browser.value("getComputedStyle(document.body).backgroundColor") == BACKGROUND[is_dark]
    shown = browser.value("[...document.querySelectorAll('.graph svg')].map(e => getComputedStyle(e).display)")
    assert shown == ([] if name == "both" else ["none", "block"] if width == 390 else ["block", "none"])
    assert all(scale > 0.59 for scale in browser.value(SCALES)), "the graph can be read"


def test_pointing_at_a_figure_shows_its_values(browser: Browser, pages: dict[str, Path]):
    browser.show(pages["begun"], width=1280)
    browser.value("document.querySelector('svg.plot').scrollIntoView({block: 'center'})")
    place = browser.value(
        "(r => [r.x, r.y, r.width, r.height])(document.querySelector('svg.plot').getBoundingClientRect())"
    )
    browser.point_at(place[0] + place[2] * 0.97, place[1] + place[3] * 0.5)
    shown = browser.value("[...document.querySelectorAll('figure .tip:not([hidden]) div')].map(e => e.textContent)")
    assert shown == ["step 30", "training 3"]


def test_text_stands_out_from_what_it_stands_on(browser: Browser, pages: dict[str, Path]):
    for is_dark in (False, True):
        browser.show(pages["demo"], width=1280, is_dark=is_dark)
        for name, least in (("--ink", 7.0), ("--soft", 4.5), ("--accent", 4.5), ("--good", 4.5), ("--c1", 3.0)):
            assert contrast(browser, name, "--card") >= least, (name, is_dark)
        for number in range(1, 9):
            assert contrast(browser, f"--c{number}", "--card") >= 3.0, (number, is_dark)


def contrast(browser: Browser, front: str, back: str) -> float:
    """WCAG 2.1's ratio of two colours of the page."""
    light, dark = sorted((_luminance(browser, name) for name in (front, back)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(browser: Browser, name: str) -> float:
    text = browser.value(f"getComputedStyle(document.documentElement).getPropertyValue('{name}').trim()")
    parts = [int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
