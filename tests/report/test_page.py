"""The page of a run: its numbers are the manifests', it loads nothing, and what a model wrote stays text."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pipeline.artifacts import Store
from pipeline.report.page import LARGEST, page_of
from pipeline.report.records import read_run
from tests.report.written_run import answer, result, training, write_demo, write_evaluation, write_stage

LOADING = ("src", "href", "action", "data", "poster", "srcset", "formaction", "xlink:href")


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, name: str, **wanted: str) -> list[str | None]:
        """The attribute `name` of all tags that have it, and the wanted ones (`data_x` for `data-x`)."""
        asked = {key.replace("_", "-"): value for key, value in wanted.items()}
        return [a[name] for _, a in self.tags if name in a and asked.items() <= a.items()]

    def figures(self) -> list[str | None]:
        return self.values("data-figure")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `root`, for tests that leave it as it is."""
    root = tmp_path_factory.mktemp("whole") / "artifacts"
    write_demo(root)
    return root


@pytest.fixture(scope="module")
def text(whole: Path) -> str:
    """Its page."""
    return page_of(read_run(Store(whole), "demo"), 2.0)


def page(root: Path, run: str = "demo", price: float = 2.0) -> Page:
    return Page(page_of(read_run(Store(root), run), price))


def test_the_numbers_are_the_manifests(whole: Path, text: str):
    found = Page(text)
    manifests = {path.parent.name: json.loads(path.read_text()) for path in whole.glob("demo/*/manifest.json")}
    seconds = dict(zip(found.values("data-stage"), found.values("data-seconds"), strict=True))
    assert {name: float(value or 0) for name, value in seconds.items()} == {
        name: manifest["seconds"] for name, manifest in manifests.items()
    }
    assert found.values("data-tokens") == ["5000", *["1000"] * 5]
    assert found.values("data-flops") == ["", *["2000000000000.0"] * 5]
    # ppo: an hour on two devices at 2 euros; pretrain: 90.5 s
    costs = dict(zip(found.values("data-stage"), map(float, filter(None, found.values("data-cost"))), strict=True))
    assert costs["ppo"] == 4.0
    assert costs["pretrain"] == pytest.approx(90.5 / 3600 * 2)
    assert found.values("data-value", data_total="seconds") == [str(10 + 90.5 * 4 + 3600.0)]
    assert found.values("data-value", data_total="tokens") == [
        "5000"
    ]  # five stages of 1000; tokenize's are no training
    assert found.values("data-value", data_total="flops") == ["10000000000000.0"]
    assert found.values("data-value", data_final="ppo", data_metric="parameters") == ["1234567.0"]
    results = {row["model"]: row["value"] for row in map(json.loads, (whole / "demo/eval/results.jsonl").open())}
    assert {model: float(found.values("data-value", data_model=model)[0] or 0) for model in results} == results


@pytest.mark.slow
def test_a_cpu_has_no_price_but_one_that_is_given(root: Path):
    text = page_of(read_run(Store(root), "demo"), None)
    assert "an hour" not in text
    assert "cost" not in Page(text).values("data-label")
    file = root / "demo" / "ppo" / "manifest.json"  # an hour on two devices
    file.write_text(json.dumps(json.loads(file.read_text()) | {"device": "NVIDIA H100 80GB HBM3"}))
    found = Page(page_of(read_run(Store(root), "demo"), None))
    assert found.values("data-value", data_total="cost") == ["5.0"]
    costs = dict(zip(found.values("data-stage"), found.values("data-cost"), strict=True))
    assert (costs["ppo"], costs["sft"]) == ("5.0", "")
    assert "at €2.50 an hour" in found.text


def test_every_stage_is_drawn_once_in_each_graph(text: str):
    for name in ("tokenize", "pretrain", "sft", "ppo", "dpo", "eval"):
        assert text.count(f"<title>{name}</title>") == 2


def test_curves_hold_what_was_measured(text: str):
    found = Page(text)
    data = json.loads(re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)[0])
    assert [int(number or 0) for number in found.figures()] == list(range(len(data)))
    losses = [curve for each in data for curve in each["curves"] if curve["label"] == "training"]
    assert losses[0] == {"label": "training", "x": [10, 20, 30, 40, 50], "y": [4, 3, 2, 1, 0]}
    assert [each["curves"][0]["y"] for each in data if each["title"] == "reward"] == [[0.5, 0.5, 1, 1.5, 2]]
    over = [each for each in data if each["xlabel"] == "√KL"]
    assert over[0]["curves"] == [{"label": "proxy", "x": [0.5, 1, 1.5, 2, 2.5], "y": [1, 2, 3, 4, 5]}]
    stacked = next(each for each in data if each["kind"] == "stack")
    assert {curve["label"]: curve["y"] for curve in stacked["curves"]} == {"generate": [1.5] * 5, "train": [2.5] * 5}


def page_text(root: Path) -> str:
    return page_of(read_run(Store(root), "demo"), 2.0)


@pytest.mark.slow
def test_it_loads_nothing_and_the_same_artifacts_make_the_same_bytes(root: Path, text: str):
    assert text == page_text(root)
    assert not re.search(r"https?://(?!www\.w3\.org)", text)
    for tag, attributes in Page(text).tags:
        assert tag not in ("link", "img", "iframe", "object", "embed") or attributes.get("href") == "data:,"
        for name in LOADING:
            assert (attributes.get(name) or "#").startswith(("#", "data:,")), (tag, attributes)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}"


def test_what_a_model_wrote_stays_text(tmp_path: Path):
    root = tmp_path / "artifacts"
    metrics = training(**{"loss": lambda i: i, HOSTILE: lambda i: i, "sample": lambda i: HOSTILE})
    write_stage(
        root, "sft", metrics=metrics, config={"prompt": HOSTILE}, more={"device": HOSTILE, "git_commit": HOSTILE}
    )
    write_stage(root, "other", type_="sft", config={"prompt": "harmless"}, more={"versions": {HOSTILE: HOSTILE}})
    hostile = [{"role": HOSTILE, "content": HOSTILE}]
    items = [answer(model, 0, HOSTILE, 0.5, hostile) | {"reference": HOSTILE} for model in ("sft", HOSTILE)]
    write_evaluation(
        root, [result("sft", HOSTILE, HOSTILE, 0.5, 0.1), result(HOSTILE, "greedy", "gold", 0.5, 0.1)], items
    )
    text = page_of(read_run(Store(root), "demo"), 2.0)
    found = Page(text)
    assert [tag for tag, _ in found.tags].count("script") == 2  # the page's own: its data and its program
    assert "img" not in [tag for tag, _ in found.tags]
    assert not [name for _, attributes in found.tags for name in attributes if name.startswith("on")]
    assert "{{ 7*7 }}" in found.text
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in text


def test_a_run_without_an_evaluation(tmp_path: Path):
    root = tmp_path / "artifacts"
    write_stage(root, "sft", metrics=training(loss=lambda i: i))
    found = page(root)
    assert "no finished evaluation" in found.text
    assert "results" not in found.values("class")
    assert len(found.figures()) == 1


@pytest.mark.slow
def test_an_unfinished_run(root: Path):
    rows = training(3, loss=lambda i: 1 / i)
    folder = write_stage(root, "late", metrics=rows, config={"init": "sft", "max_steps": 50}, unfinished=True)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "ti')  # is being written
    found = page(root)
    assert "unfinished, step 30 of 50" in found.text
    (folder / "failed.json").write_text(
        '{"error": "step 31: the loss is nan\\n  mend: less", "time": "2026-01-02T03:04:05Z"}'
    )
    broken = page(root).text
    assert "failed, step 30 of 50" in broken
    assert "2026-01-02 03:04:05 UTC: step 31: the loss is nan" in broken
    assert found.values("data-seconds")[-1] == "6.0"
    assert read_run(Store(root), "demo").stage("late").parents == ("sft",)
    only = root.parent / "only"
    write_stage(only, "pretrain", metrics=rows, unfinished=True)
    alone = page(only)
    assert len(alone.figures()) == 1
    assert "llmpipe run /dev/stdin" not in alone.text  # nothing is known yet of how to make it again


@pytest.mark.slow
def test_a_long_run_of_many_variants_stays_small(tmp_path: Path):
    root = tmp_path / "artifacts"
    names = [f"dpo@beta={beta}@seed={seed}" for beta in (0.1, 0.2, 0.3) for seed in range(8)]
    metrics = training(2000, **{name: lambda i: i % 17 for name in ("loss", "grad_norm", "rewards/margins", "entropy")})
    for name in names:
        write_stage(root, name, type_="dpo", config={"seed": int(name[-1])}, metrics=metrics)
    long = "word " * 4000
    items = [answer(name, i, long, 0.5) for name in names for i in range(10)]
    write_evaluation(root, [result(name, "greedy", "gold", 0.5, 0.1) for name in names], items)
    text = page_of(read_run(Store(root), "demo"), 2.0)
    assert len(text.encode()) < LARGEST
    assert len(Page(text).figures()) == 4  # drawn together


def test_the_rounds_of_a_repeat_are_drawn_over_the_rounds(tmp_path: Path):
    root = tmp_path / "artifacts"
    for turn in (1, 2, 3):
        more = {"metrics": {"rows": 10.0, "score": turn / 2}}
        write_stage(root, f"sample@{turn}", type_="sample", kind="rows", more=more)
    data = json.loads(re.findall(r'id="data">(.*?)</script>', page_text(root))[0])
    assert [(each["title"], each["xlabel"]) for each in data] == [("score", "round")]  # rows are the same in each
    assert data[0]["curves"] == [{"label": "score", "x": [1, 2, 3], "y": [0.5, 1, 1.5]}]
    below = page_text(root).split("matplotlib.axis_1")[1].split("matplotlib.axis_2")[0]
    assert re.findall(r">([\d.]+)</text>", below) == ["1", "2", "3"]  # there is no round 1.5


@pytest.mark.slow
def test_a_kept_blame_is_shown_in_colours_and_escaped(root: Path):
    manifest = json.loads((root / "demo" / "dpo" / "manifest.json").read_text())
    row = {
        "model": "demo/dpo",
        "fingerprint": manifest["fingerprint"],
        "prompt": HOSTILE,
        "system": None,
        "answer": "a b",
        "generated": True,
        "asked_in": "its chat template",
        "stages": [
            {"reference": name, "tokens": count, "gain": gain}
            for name, count, gain in (("demo/sft", 1, 2.25), ("demo/dpo", 0, -0.5))
        ],
        "tokens": [
            {"text": "a", "owner": 0, "logprobs": [-1.0, -1.5], "gains": [2.25, -0.5]},
            {"text": HOSTILE, "owner": None, "logprobs": [-3.0, -4.0], "gains": [-1.0, -1.0]},
        ],
        "nearest": [{"stage": "demo/sft", "notes": [], "rows": [{"where": "x:1", "shared": "a", "text": HOSTILE}]}],
        "caution": "Correlation, not cause.",
    }
    (root / "demo" / "blame.jsonl").write_text(json.dumps(row) + "\n")
    text = page_text(root)
    found = Page(text)
    assert "<script>alert" not in text
    assert "demo/sft: 1 token, +2.2 nats" in found.text
    assert "demo/dpo: 0 tokens, -0.5 nats" in found.text
    pieces = [
        attributes for tag, attributes in found.tags if tag == "span" and "log p" in (attributes.get("title") or "")
    ]
    assert [piece.get("style") for piece in pieces] == ["--k: var(--c1)", None]
    assert pieces[0]["title"] == "demo/sft: log p -1.00 (+2.25)\ndemo/dpo: log p -1.50 (-0.50)"
    assert 'href="#blame"' in text
    assert "Correlation, not cause." in found.text


@pytest.mark.slow
def test_a_reward_model_that_no_evaluation_asked_shows_its_own_calibration(tmp_path: Path):
    from pipeline.evals.calibration import Bin, figure

    root = tmp_path / "artifacts"
    folder = write_stage(root, "reward", kind="reward-model", more={"metrics": {"ece": 0.0764}})
    bins = [Bin(0.5, 0.55, 0.52, 0.5, 100), Bin(0.55, 0.6, float("nan"), float("nan"), 0), Bin(0.95, 1, 0.98, 0.9, 300)]
    (folder / "reliability.svg").write_text(figure(bins, HOSTILE).replace("</svg>", f"{HOSTILE}</svg>"))
    found = page(root)
    data = json.loads(re.findall(r'id="data">(.*?)</script>', page_text(root))[0])
    assert [each["title"] for each in data] == ["Reliability of reward"]
    assert data[0]["curves"] == [
        {"label": "pairs of a bin", "x": [0.52, 0.98], "y": [0.5, 0.9], "more": ["100 pairs", "300 pairs"]}
    ]
    assert "400 held-out pairs, calibration error 0.076" in found.text
    assert "no finished evaluation" in found.text
    assert [tag for tag, _ in found.tags].count("script") == 2
    assert "img" not in [tag for tag, _ in found.tags]
    (folder / "reliability.svg").write_text("<svg>of somebody else's</svg>")
    assert page(root).figures() == []


COMPARED = """\
kind,model,against,nearest,task,metric,value,low,high,n,seeds_low,seeds_high,seeds
model,dpo@beta=0.1,,,greedy,gold,0.2,0.1,0.3,100,,,
mean,dpo@beta=0.1,,,greedy,gold,0.2,0.17,0.23,100,0.1,0.3,3
difference,dpo@beta=0.2,dpo@beta=0.1,,greedy,gold,0.05,0.04,0.06,100,,,1
difference,dpo@beta=0.2,dpo@beta=0.1,,bits_per_byte,bits_per_byte,0.05,0.04,0.06,100,0.02,0.08,3
difference,dpo@beta=0.2,dpo@beta=0.1,,sampled,length,2,-1,5,100,,,1
difference,dpo@beta=0.2,dpo@beta=0.1,,sampled,gold,0.3,0.3,0.3,1,,,1
matched,dpo,ppo,kl,greedy,gold,-0.25,-0.35,-0.15,100,,,1
"""


@pytest.mark.slow
def test_means_and_differences_of_variants(tmp_path: Path):
    root = tmp_path / "artifacts"
    write_evaluation(root, [result("dpo@beta=0.1", "greedy", "gold", 0.2, 0.1)], [])
    (root / "demo" / "eval" / "table.csv").write_text(COMPARED)
    found = page(root)
    for title in ("Mean over seeds", "Difference", "Nearest in KL"):
        assert title in found.text
    rows = {
        name: re.findall(r'<td data-label="([^"]*)"(?: class="(\w+)")?><span class="value">([^<]*)</span> '
                         r'<span class="half">([^<]*)<', text)
        for name, text in re.findall(r'<tr data-variants="(.*?)">(.*?)</tr>', page_text(root), flags=re.S)
        if "beta=0.2" in text
    }  # fmt: skip
    both = "dpo@beta=0.2 − dpo@beta=0.1"
    assert rows == {
        "bits_per_byte.bits_per_byte": [(both, "worse", "+0.050", "± 0.030 | 0.010")],
        "greedy.gold": [(both, "better", "+0.050", "± – | 0.010")],
        "sampled.length": [(both, "", "+2.0", "± – | 3.0")],
        "sampled.gold": [(both, "", "+0.300", "± – | –")],  # of one item
    }
    assert "0.200 ± 0.100 | 0.030" in " ".join(found.text.split())
    assert '<td data-label="dpo − ppo" class="worse"><span class="value">-0.250' in page_text(root)
    (root / "demo" / "eval" / "table.csv").write_text("name,figure\na,b\n")
    assert "Difference" not in page(root).text.replace("Differences", "")
