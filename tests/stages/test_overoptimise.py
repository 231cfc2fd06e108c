"""The files beside recipes/overoptimise.yaml: gold by hand, pairs as they are labelled, the points of the frontier."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from pipeline.cli.stages import recipes_folder
from pipeline.recipe import DataEntry
from pipeline.rl.best_of_n import kl_bound
from pipeline.runtime import Runtime
from pipeline.usercode import load_file
from tests.stages.ppo_runs import Parts, artifact

FOLDER = recipes_folder() / "overoptimise"
GOLD = f"{FOLDER / 'gold.py'}:gold"


@pytest.fixture(scope="module")
def gold() -> ModuleType:
    return load_file(FOLDER / "gold.py")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0.0),
        ("a of the", 0.0),  # no long word
        ("Returns absolute position of the matrix in memory", (1 - math.exp(-3 / 3))),  # 8 words, 3 of them long
        ("Returns absolute position.", (1 - math.exp(-1)) * math.exp(-((5 / 6) ** 2) / 2)),  # 3 words
        ("returns returns RETURNS returns", (1 - math.exp(-1 / 3)) * (1 / 4) ** 2 * math.exp(-((4 / 6) ** 2) / 2)),
    ],
)
def test_gold_by_hand(gold: ModuleType, text: str, expected: float):
    assert gold.gold([], [text], []) == [pytest.approx(expected)]


def test_no_single_trick_wins(gold: ModuleType):
    """A good sentence loses by more long words than are wanted, by the same one again, and by going on."""
    words = ["absolute", "boundary", "callable", "document", "encoding", "function", "generate", "hashable"]
    best = gold.worth(" ".join(words))
    assert best == pytest.approx(1 - math.exp(-8 / 3))
    more = ["operator", "position", "quotient", "register", "sentence", "template"]
    assert gold.worth(" ".join([*words, *more])) < best
    assert gold.worth(" ".join([*words[:7], words[0]])) < best
    assert gold.worth(" ".join(words * 3)) < 0.05
    assert all(0 <= gold.worth(" ".join(words[:count])) < 1 for count in range(9))


@pytest.fixture
def labelled(parts: Parts, runtime: Callable[[str], tuple[Path, Runtime]]) -> Callable[..., Any]:
    """(rows, figures) of a run of label."""
    stage = load_file(FOLDER / "label.py")

    def run(name: str = "label", **values: Any) -> tuple[list[dict[str, Any]], dict[str, float]]:
        out, runtime_ = runtime(name)
        given = {
            "data": (DataEntry(source=str(parts.data)),),
            "gold": GOLD,
            "pairs": 60,
            "response_length": 16,
            **values,
        }
        figures = stage.run(stage.LabelConfig(**given), {"init": parts.init}, out, runtime_)
        return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()], figures

    return run


def test_without_noise_the_better_answer_is_chosen(labelled: Callable[..., Any], gold: ModuleType):
    rows, figures = labelled(noise=0.0)
    assert figures["rows"] == len(rows) > 20
    assert figures["wrong_labels"] < 1 / len(rows)
    margins = [gold.worth(row["chosen"]) - gold.worth(row["rejected"]) for row in rows]
    assert min(margins) >= 0
    assert max(margins) > 0
    assert all(row["prompt"][-1]["role"] == "user" and row["chosen"] != row["rejected"] for row in rows)


def test_noise_makes_labels_wrong(labelled: Callable[..., Any]):
    rows, figures = labelled(noise=1e6)
    assert figures["rows"] == len(rows)
    assert 0.25 < figures["wrong_labels"] < 0.75, "as good as a coin"
    assert labelled("again", noise=1e6)[0] == rows, "the same seed gives the same rows"


@pytest.fixture
def frontier(parts: Parts, runtime: Callable[[str], tuple[Path, Runtime]]) -> tuple[Path, dict[str, float]]:
    """A frontier of the start itself as a policy, which has two evaluations on its record, and two proxies."""
    stage = load_file(FOLDER / "frontier.py")
    out, runtime_ = runtime("frontier")
    lines = [
        {"step": step, "eval_gold": gold, "eval_gold_se": 0.1, "eval_kl": kl, "eval_reward": 1.0, "eval_length": 9.0}
        for step, gold, kl in ((1, 0.4, 1.0), (3, 0.2, 4.0))
    ]
    (parts.init.path / "metrics.jsonl").write_text("\n".join(map(json.dumps, [{"step": 2}, *lines])) + "\n")
    config = stage.FrontierConfig(
        init="sft",
        policies=("ppo",),
        proxies=("reward-0", "reward-1"),
        gold=GOLD,
        data=(DataEntry(source=str(parts.data)),),
        held_out=0.5,
        prompts=12,
        samples=32,
        answers=4,
        best_of=(1, 2, 8),
        response_length=12,
    )
    inputs = {"init": parts.init, "policies": [parts.init], "proxies": [parts.reward, parts.reward]}
    figures = stage.run(config, inputs, out, runtime_)
    return out, figures


def test_the_points_of_a_frontier(frontier: tuple[Path, dict[str, float]]):
    out, figures = frontier
    points = [json.loads(line) for line in (out / "frontier.jsonl").read_text().splitlines()]
    curves = [(point["curve"], point["at"]) for point in points]
    by = ["best of n by reward-0", "best of n by reward-1", "best of n by ensemble"]
    assert curves == [("start", 0), *((c, n) for c in by for n in (1, 2, 8)), ("ppo", 1), ("ppo", 3), ("ppo", "")]
    start, one, two, eight = points[:4]
    assert one["gold"] == pytest.approx(start["gold"]), "the best of one is the start"
    assert one["kl"] == pytest.approx(0, abs=1e-9)
    for point in (two, eight):
        assert point["kl_bound"] == kl_bound(point["at"])
        assert point["kl"] == pytest.approx(point["kl_bound"], abs=0.35)
    assert one["reward"] < two["reward"] < eight["reward"]
    assert [p["gold"] for p in points[4:7]] == [p["gold"] for p in points[1:4]], "two members that are one"
    assert points[-1]["kl"] == pytest.approx(0, abs=1e-3), "the start, taken for a policy"
    assert points[-2]["gold_high"] == pytest.approx(0.2 + 0.196)
    assert figures["proxies_with_one_another"] == pytest.approx(1)
    assert abs(figures["proxies_with_gold"]) < 1
    assert (figures["ppo.peak_gold"], figures["ppo.peak_kl"]) == (0.4, 1.0)
    assert figures["best of n by ensemble.end_gold"] == pytest.approx(eight["gold"])


def test_a_frontier_is_an_evaluation_like_any_other(frontier: tuple[Path, dict[str, float]]):
    out, _ = frontier
    results = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert set(results[0]) == {"model", "fingerprint", "task", "metric", "value", "low", "high", "n"}
    assert {row["metric"] for row in results if row["model"] == "best of n by ensemble 8"} == {"gold", "kl", "reward"}
    assert [row["fingerprint"] for row in results if row["model"] == "ppo 3"] == [
        artifact(Path("sft"), "x").fingerprint
    ] * 3
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [row["model"] for row in samples] == ["sft"] * 4 + ["ppo"] * 4


@pytest.mark.parametrize(
    ("curve", "name"),
    [
        ("best of n by reward-3", "best of n, one proxy"),
        ("best of n by ensemble", "best of n, ensemble"),
        ("ppo-0", "ppo, one proxy"),
        ("ppo-ensemble-1", "ppo, ensemble"),
        ("ppo-all-0", "ppo, one proxy of all labels"),
        ("dpo-weak", "dpo"),
    ],
)
def test_every_curve_of_the_recipe_has_a_colour(curve: str, name: str):
    assert load_file(FOLDER / "figure.py").family(curve)[0] == name


def test_agreement_by_hand():
    """Two proxies over four answers: one is gold itself, the other gold turned round."""
    measures = load_file(FOLDER / "measures.py")
    gold = np.array([[0.0, 1.0], [2.0, 3.0]])
    marks = measures.Marks(gold, {"a": 2 * gold, "b": -gold, "ensemble": 0 * gold}, gold, gold, gold)
    assert measures.agreement(marks) == pytest.approx({"proxies_with_gold": 0.0, "proxies_with_one_another": -1.0})
