"""The figures of a reward model's scores on pairs and lists, by hand; RewardBench's sections."""

import math
from typing import Any

import numpy as np
import pytest

from pipeline.evals import length_only, reward_accuracy, reward_bench
from pipeline.evals.reward_accuracy import HeldOut


def row(answers: list[str], **fields: Any) -> dict[str, Any]:
    said = [[{"role": "assistant", "content": answer}] for answer in answers]
    usual = {"ranks": list(range(len(answers))), "kind": "", "margin": 0.0, "preference": 1.0, "reference": ""}
    return {"prompt": [{"role": "user", "content": "?"}], "answers": said, **usual, **fields}


ROWS = [
    row(["aaaa", "bb", "c"], ranks=[0, 1, 1]),
    row(["dd", "ee"], margin=2.0, kind="hard"),
    row(["ff", "gg"], preference=0.5),
]
HELD = HeldOut([0, 2, 3], ROWS, [[1]] * 7)
VALUES = np.array([[2.0, 1.0, 3.0, 0.5, 0.0, 4.0, 1.0], [2.0, 1.0, 0.0, 0.0, 0.5, 4.0, 1.0]])


def sigma(delta: float) -> float:
    return 1 / (1 + math.exp(-delta))


def test_items_are_all_pairs_with_the_members_mean() -> None:
    items = reward_accuracy.items(HELD, VALUES, [2.0, 1.0], gold_A=[3, 2, 1, 0, 1, 1, 1])
    assert HELD.pairs == 5
    assert [(item["item"], item["places"]) for item in items] == [
        (0, [0, 1]), (0, [0, 2]), (0, [1, 2]), (2, [0, 1]), (3, [0, 1]),
    ]  # fmt: skip
    assert [item["preference"] for item in items] == [1.0, 1.0, 0.5, 1.0, 0.5]
    assert (items[1]["chosen"], items[1]["rejected"]) == (2.0, 1.5)
    assert items[1]["members"] == [-2.0, 2.0]
    assert items[1]["probability"] == pytest.approx((sigma(-2) + sigma(2)) / 2)
    assert items[3]["probability"] == pytest.approx((sigma(1) + sigma(-0.5)) / 2, abs=1e-6)
    assert (items[0]["chosen_chars"], items[0]["rejected_chars"], items[0]["gold"]) == (4, 2, [3, 2])


def test_figures_by_hand() -> None:
    """Of the three pairs that are no ties the first two are right by the mean, the third is a tie of scores (½)."""
    items = reward_accuracy.items(HELD, VALUES, [1.0, 1.0], gold_A=[3, 2, 1, 0, 1, 1, 1])
    found = reward_accuracy.figures(items, length_only.fit([4], [1]), 0)
    values = {name: each.value for name, each in found.items()}
    assert values["accuracy"] == pytest.approx(2.5 / 3)
    assert (values["accuracy/hard"], found["accuracy"].n) == (0.5, 3)
    assert values["member_accuracy/0"] == pytest.approx(2 / 3)
    assert values["member_accuracy/1"] == pytest.approx(2 / 3)
    assert values["members_disagree"] == pytest.approx(2 / 3)
    assert (values["accuracy_by_label_margin/0"], values["accuracy_by_label_margin/2"]) == (1.0, 0.5)
    # gold tells apart the three pairs of the list and the hard one; there it likes the rejected answer, and the scores
    # are equal; of the tie in the list it likes the first, whose mean score is lower
    assert values["gold_agreement"] == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    assert values["gold_agreement_of_labels"] == pytest.approx(2 / 3)
    p = [item["probability"] for item in items]
    mu = [1.0, 1.0, 0.5, 1.0, 0.5]
    nats = [-m * math.log(q) - (1 - m) * math.log(1 - q) for m, q in zip(mu, p, strict=True)]
    assert values["nll"] == pytest.approx(sum(nats) / 5)
    chars, scores = [4, 2, 1, 2, 2, 2, 2], VALUES.mean(axis=0)
    assert values["length_pearson"] == pytest.approx(np.corrcoef(chars, scores)[0, 1], abs=1e-4)
    assert "accuracy_by_margin/1" not in values  # fewer pairs than quarters


def test_quarters_by_margin() -> None:
    """Eight pairs, right where they are sure: gaps 1 to 8, the smallest three the wrong way round."""
    rows = [row(["a", "b"]) for _ in range(8)]
    gaps = [-1.0, -2.0, -3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    values = np.array([[each for gap in gaps for each in (gap, 0.0)]])
    items = reward_accuracy.items(HeldOut(list(range(8)), rows, []), values, [1.0])
    found = reward_accuracy.figures(items, length_only.fit([], []), 0)
    assert [found[f"accuracy_by_margin/{quarter}"].value for quarter in (1, 2, 3, 4)] == [0.0, 0.5, 1.0, 1.0]
    assert not [name for name in found if name.startswith(("member", "gold", "accuracy_by_label"))]


def test_pairs_of_one_list_are_drawn_together() -> None:
    """One list of three and one of two: two rows, so a resample is one of three: both, the first twice, the second."""
    items = reward_accuracy.items(HeldOut([0, 1], [row(["a", "b", "c"]), row(["d", "e"])], []),
                                  np.array([[3.0, 2.0, 1.0, 0.0, 1.0]]), [1.0])  # fmt: skip
    figures = reward_accuracy.figures(items, length_only.fit([], []), 0)
    found, error = figures["accuracy"], figures["ece"]
    assert (found.value, found.low, found.high, found.n) == (0.75, 0.0, 1.0, 4)
    # claims of the list: σ(1) twice and σ(2), all right; of the pair σ(1), wrong, which drawn alone is the worst; both
    # are the best, since the σ(1) are of one bin and partly cancel
    both = (abs(2 * (1 - sigma(1)) - sigma(1)) + (1 - sigma(2))) / 4
    assert (error.value, error.low, error.high) == pytest.approx((both, both, sigma(1)), abs=1e-5)
    assert error.n == 4


def bench(subset: str, right: list[bool]) -> list[dict[str, Any]]:
    return [{"kind": subset, "chosen": 1.0 * each, "rejected": 0.5} for each in right]


def test_sections_weigh_their_subsets_as_the_benchmark_does() -> None:
    """Chat Hard of 37 and 100 prompts; math-prm as much as the six languages, of which two are there: 984 and 328."""
    items = [
        *bench("mt-bench-hard", [True]), *bench("llmbar-natural", [True, False]),
        *bench("math-prm", [True, False, False, False]), *bench("hep-go", [True]), *bench("hep-rust", [False]),
        *bench("of mine", [False]),
    ]  # fmt: skip
    found = {name: each.value for name, each in reward_bench.figures(items, 0).items()}
    assert found["section/chat_hard"] == pytest.approx((37 * 1 + 100 * 0.5) / 137)
    assert found["section/reasoning"] == pytest.approx((984 * 0.25 + 164 * 1 + 164 * 0) / 1312)
    assert found["accuracy/of mine"] == 0.0
    assert found["accuracy"] == pytest.approx(4 / 10)
    assert "score" not in found  # two sections are missing
    items += [*bench("alpacaeval-easy", [True]), *bench("donotanswer", [False])]
    found = {name: each.value for name, each in reward_bench.figures(items, 0).items()}
    assert found["score"] == pytest.approx((found["section/chat_hard"] + found["section/reasoning"] + 1 + 0) / 4)


def test_the_weights_are_the_sections_sizes() -> None:
    """358 + 456 + 740 prompts, and 984 of code twice: the filtered set has 2,985 rows, 447 of them math-prm."""
    sizes = {section: sum(weights.values()) for section, weights in reward_bench.SECTIONS.items()}
    assert sizes == {"chat": 358, "chat_hard": 456, "safety": 740, "reasoning": 1968}
    assert sum(sizes.values()) - 984 + 447 == 2985


def test_each_subset_weighs_what_the_benchmarks_code_says() -> None:
    """EXAMPLE_COUNTS of allenai/reward-bench; a swap within a section leaves the sections' sums as they are."""
    weights = {name: weight for section in reward_bench.SECTIONS.values() for name, weight in section.items()}
    assert weights == {
        "alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28, "mt-bench-med": 40,
        "mt-bench-hard": 37, "math-prm": 984, "refusals-dangerous": 100, "refusals-offensive": 100,
        "llmbar-natural": 100, "llmbar-adver-neighbor": 134, "llmbar-adver-GPTInst": 92, "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46, "xstest-should-refuse": 250, "xstest-should-respond": 154, "donotanswer": 136,
        "hep-cpp": 164, "hep-go": 164, "hep-java": 164, "hep-js": 164, "hep-python": 164, "hep-rust": 164,
    }  # fmt: skip
