"""label: which of two answers is the better one, said by a reward, by a judge with a constitution, or by a person.

The rows are preferences for reward and dpo, by this stage's name (`data: [label]`). A judge compares in both orders,
so that what a place on the page adds falls out (RLAIF; Bai et al. 2022, "Constitutional AI", section 4; Lee et al.
2023); a person's labels are what `llmpipe label` writes. With a known reward and `noise` the labels are drawn by
Bradley and Terry's model, as Gao et al. 2023 stand a gold reward for people. docs/sample.md explains every field.

Departures: ties are kept, as rows of `preference: 0.5`; a judge behind an address that gives two verdicts in the two
orders has given a tie.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from pipeline.errors import ConfigError, DataError
from pipeline.recipe import Data, File, Ref, StageConfig, field
from pipeline.reward_config import Reward

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from pipeline.data.answers import Answers, Pair
    from pipeline.rl.comparing import Comparer, RemoteComparer
    from pipeline.runtime import Runtime

    Find = Callable[[Sequence[int]], list[dict[str, Any]]]


class LabelConfig(StageConfig):
    """What label can be told. One of `reward`, `judge`, `judge_url` and `labels` says who labels."""

    data: Data = field(..., "answers: several to a prompt, over all rows and sources; or pairs to be labelled anew")
    reward: Reward | None = field(None, "what scores the answers, in the same forms as ppo's")
    init: Ref | None = field("sft", "reward: whose tokens the answers are read in")
    judge: Ref | None = field(None, "a language model that compares by `constitution`")
    judge_url: str | None = field(None, "likewise, behind an OpenAI-compatible address: http://127.0.0.1:8000/v1")
    judge_model: str | None = field(None, "judge_url: the model's name there")
    constitution: File | None = field(None, "judge, judge_url: a text file with the rules to compare by")
    labels: File | None = field(None, "a person's labels, as `llmpipe label` writes them")

    pairs: Literal["one", "all"] = field("one", "of each prompt's answers: one pair, drawn by the seed, or all")
    tie_margin: float = field(
        0.0, "scores that differ by no more are a tie; of a judge: chances that are no further from 0.5", ge=0
    )
    ties: Literal["keep", "leave_out"] = field("keep", "ties become rows of `preference: 0.5`, or none")
    noise: float = field(0.0, "reward: scores this far apart make a label right in 73 of 100; 0 for always", ge=0)
    soft: bool = field(False, "`preference` is the chance that the chosen side is better, not 1")

    batch_size: int = field(64, "rows read side by side; a kill loses no more prompts", unit="rows", gt=0)
    bf16: bool | None = field(None, "run the models in bf16; where the hardware gains by it unless set")

    @model_validator(mode="after")
    def _is_one_thing(self) -> LabelConfig:
        who = [name for name in ("reward", "judge", "judge_url", "labels") if getattr(self, name) is not None]
        if len(who) != 1:
            what = f"{' and '.join(who)} label" if who else "nobody labels"
            raise ValueError(f"{what}: one of reward, judge, judge_url and labels")
        has_judge = who[0] in ("judge", "judge_url")
        if has_judge != (self.constitution is not None):
            raise ValueError(f"{who[0]} {'needs' if has_judge else 'takes no'} constitution")
        if (self.judge_url is None) != (self.judge_model is None):
            raise ValueError("judge_url and judge_model go together")
        if self.noise and self.reward is None:
            raise ValueError("noise is of a reward's scores")
        if self.soft and (self.labels or (self.reward is not None and not self.noise)):
            raise ValueError("soft: a person says no chances, and of scores they are by `noise`")
        return self


INPUTS = {
    "init": "causal-lm",
    "reward": "reward-model",
    "reward.model": "reward-model",
    "reward.models": "reward-model",
    "reward.judge": "causal-lm",
    "judge": "causal-lm",
}
KIND = "rows"
RESULT_VERSION = 1


def run(config: LabelConfig, inputs: dict[str, Any], out: Path, runtime: Runtime) -> dict[str, float]:
    """Write rows.jsonl; returns how many, how many of them ties, and how sure the labels are."""
    import json
    import shutil

    from pipeline.data.answers import pairs_of, read_answers
    from pipeline.rl.parts import Work, cut, do, said_of

    # 1. answers, and the pairs of them that are compared
    groups = read_answers(config.data, runtime.say)
    pairs = [pairs_of(group, number, config.pairs, config.seed) for number, group in enumerate(groups)]
    asked = [number for number, each in enumerate(pairs) if each]
    runtime.say(f"{sum(map(len, pairs)):,} pairs of answers to {len(asked):,} of {len(groups):,} prompts")

    # 2. the chance that the first of each is the better one, in parts that survive a kill
    with said_of("label"):
        find = _labeller(config, inputs, groups, pairs, runtime)
        lengths = [sum(map(len, groups[number].texts)) for number in asked]
        work = Work("label", "pairs", lambda places: find([asked[place] for place in places]), _count, lambda items: {})
        items, _ = do(work, cut(lengths, max(1, config.batch_size // 2)), runtime)

    # 3. rows
    compared = [
        {"group": number, "pair": pair, **found}
        for number, item in zip(asked, items, strict=True)
        for pair, found in zip(pairs[number], item["found"], strict=True)
        if found is not None
    ]
    rows = [row for each in compared if (row := _row(config, groups, each)) is not None]
    if not rows:
        raise DataError(f"no row is left of {len(compared):,} labelled pairs", where="label.ties", mend="ties: keep")
    if runtime.is_main:
        with (out / "rows.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        if config.labels is not None:
            shutil.copyfile(config.labels, out / "labels.jsonl")
    figures = _figures(config, groups, compared, rows)
    runtime.metrics.log(len(compared), None, **figures)
    return figures


def _count(item: dict[str, Any]) -> int:
    return len(item["found"])


def _labeller(
    config: LabelConfig, inputs: dict[str, Any], groups: list[Answers], pairs: list[list[Pair]], runtime: Runtime
) -> Find:
    """What labels the pairs of some groups: an item each, `found` a dict for each pair with `chance`, that the first
    answer is the better one, or None where nothing was said."""
    if config.labels is not None:
        return _by_person(config.labels, groups, pairs)
    if config.reward is not None:
        return _by_reward(config, inputs, groups, pairs, runtime)
    return _by_judge(config, inputs, groups, pairs, runtime)


def _by_person(path: Path, groups: list[Answers], pairs: list[list[Pair]]) -> Find:
    from pipeline.data.labels import CHANCES, key_of, read_labels

    said = read_labels(path)
    shown = {
        key_of(group.prompt, group.texts[a], group.texts[b])
        for group, each in zip(groups, pairs, strict=True)
        for a, b in each
    }
    strange = [key for key in said if key not in shown]
    if strange:
        raise DataError(
            f"{len(strange)} of {len(said)} labels are of pairs that this data, `pairs` and `seed` don't give; the "
            f"first is of {strange[0][0][:80]}",
            where=str(path),
            mend="the data that was labelled, or a labels file of its own for this data",
        )

    def find(numbers: Sequence[int]) -> list[dict[str, Any]]:
        items = []
        for number in numbers:
            texts, found = groups[number].texts, []
            for a, b in pairs[number]:
                label = said.get(key_of(groups[number].prompt, texts[a], texts[b]), "skip")
                found.append(None if label == "skip" else {"chance": CHANCES[label]})
            items.append({"found": found})
        return items

    return find


def _by_judge(
    config: LabelConfig, inputs: dict[str, Any], groups: list[Answers], pairs: list[list[Pair]], runtime: Runtime
) -> Find:
    from pipeline.rl.comparing import RemoteComparer, load_comparer
    from pipeline.rl.judge_api import RemoteJudge
    from pipeline.rl.scoring import text_in

    assert config.constitution is not None
    constitution = text_in(config.constitution)
    judge: Comparer | RemoteComparer
    if config.judge_url is not None:
        assert config.judge_model is not None
        judge = RemoteComparer(RemoteJudge(config.judge_url, config.judge_model, constitution))
    else:
        bf16 = runtime.bf16 if config.bf16 is None else config.bf16
        judge = load_comparer(inputs["judge"], constitution, batch_size=config.batch_size, bf16=bf16, runtime=runtime)

    def find(numbers: Sequence[int]) -> list[dict[str, Any]]:
        asked = [(groups[number], pair) for number in numbers for pair in pairs[number]]
        texts = [(group.texts[a], group.texts[b]) for group, (a, b) in asked]
        said = iter(judge.compare([group.prompt for group, _ in asked], texts))
        return [{"found": [vars(next(said)) for _ in pairs[number]]} for number in numbers]

    return find


def _by_reward(
    config: LabelConfig, inputs: dict[str, Any], groups: list[Answers], pairs: list[list[Pair]], runtime: Runtime
) -> Find:
    import torch

    scores_of = _scores(config, inputs, groups, runtime)

    def found(number: int, scores: dict[int, float]) -> list[dict[str, Any]]:
        drawn = torch.rand(len(pairs[number]), generator=runtime.generator("labels", number), dtype=torch.float64)
        result = []
        for (a, b), u in zip(pairs[number], drawn.tolist(), strict=True):
            margin = scores[a] - scores[b]
            if abs(margin) <= config.tie_margin:
                chance = 0.5
            elif not config.noise:
                chance = float(margin > 0)
            else:
                likely = torch.sigmoid(torch.tensor(margin / config.noise, dtype=torch.float64)).item()
                chance = likely if config.soft else float(u < likely)
            result.append({"chance": chance, "scores": [scores[a], scores[b]]})
        return result

    def find(numbers: Sequence[int]) -> list[dict[str, Any]]:
        needed = [
            (number, place) for number in numbers for place in sorted({p for pair in pairs[number] for p in pair})
        ]
        scores_B = scores_of(needed)
        by_group: dict[int, dict[int, float]] = {number: {} for number in numbers}
        for (number, place), score in zip(needed, scores_B.tolist(), strict=True):
            by_group[number][place] = score
        return [{"found": found(number, by_group[number])} for number in numbers]

    return find


def _scores(
    config: LabelConfig, inputs: dict[str, Any], groups: list[Answers], runtime: Runtime
) -> Callable[[Sequence[tuple[int, int]]], Tensor]:
    """(group, place of an answer in it) for each of B answers -> their scores, float32 [B]."""
    from pipeline.data.chat import stop_token_id
    from pipeline.data.tokenizers import load_tokenizer
    from pipeline.model.build import reach
    from pipeline.rl.functions import check_references
    from pipeline.rl.scoring import answers_as_rollout, load_scorer, reward_models_of

    assert config.reward is not None
    check_references(config.reward, [{"prompt": groups[0].prompt, "reference": ""}])
    if inputs["init"] is None:
        mend = "label.init: a model of the same tokens as the reward model's, such as the sft stage"
        raise ConfigError("a reward reads tokens, and `init` is null", where="label.init", mend=mend)
    tokenizer = load_tokenizer(inputs["init"].model)
    stop_id = stop_token_id(tokenizer)
    pad_id = stop_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    bf16 = runtime.bf16 if config.bf16 is None else config.bf16
    scorer = load_scorer(
        config.reward,
        inputs,
        tokenizer,
        stop_id=stop_id,
        pad_id=pad_id,
        batch_size=config.batch_size,
        bf16=bf16,
        runtime=runtime,
    )

    reaches = [reach(each.model) for each in reward_models_of(inputs, INPUTS)]
    longest = min((found for found in reaches if found is not None), default=None)

    def scores(asked: Sequence[tuple[int, int]]) -> Tensor:
        prompts = [groups[number].prompt for number, _ in asked]
        texts = [groups[number].texts[place] for number, place in asked]
        rollout = answers_as_rollout(tokenizer, prompts, texts, pad_id, stop_id)
        length = int((rollout.prompt_lengths_B + rollout.lengths_B).max())
        if longest is not None and length > longest:
            raise DataError(
                f"prompt and answer of {length} tokens, and the reward model reads {longest}",
                where="label.data",
                mend="leave such rows out: sample's max_prompt_length and response_length",
            )
        return scorer.score(rollout, [{"prompt": prompt, "reference": ""} for prompt in prompts])[0]

    return scores


def _is_tie(config: LabelConfig, chance: float) -> bool:
    """Whether neither is better. Scores that are near have been made a chance of one half already."""
    return abs(chance - 0.5) <= (config.tie_margin if config.constitution else 0.0)


def _row(config: LabelConfig, groups: list[Answers], each: dict[str, Any]) -> dict[str, Any] | None:
    """The preference row of a labelled pair; None for a tie that is left out."""
    group, chance = groups[each["group"]], each["chance"]
    is_tie = _is_tie(config, chance)
    if is_tie and config.ties == "leave_out":
        return None
    texts = [group.texts[place] for place in each["pair"]]
    scores = each.get("scores")
    if chance < 0.5:
        texts, scores = texts[::-1], scores and scores[::-1]
    sure = max(chance, 1 - chance) if config.soft else 1.0
    row = {"prompt": group.prompt, "chosen": texts[0], "rejected": texts[1]}
    row["preference"] = 0.5 if is_tie else round(sure, 6)
    return row | ({"score_chosen": round(scores[0], 6), "score_rejected": round(scores[1], 6)} if scores else {})


def _figures(
    config: LabelConfig, groups: list[Answers], compared: list[dict[str, Any]], rows: list[dict[str, Any]]
) -> dict[str, float]:
    """Counts; of a judge how often the place decided; of labels that the data had before how often these agree; of
    several sources how often the first one's answer is better than another's, a tie counting half."""
    n = len(compared)
    ties = sum(_is_tie(config, each["chance"]) for each in compared)
    found = {"rows": float(len(rows)), "pairs": float(n), "ties": ties / n}
    if config.constitution is not None:
        found["swayed"] = sum(each["is_swayed"] for each in compared) / n
        found["unread"] = sum(each["unread"] for each in compared) / (2 * n)
    agrees, wins = [], []
    for each in compared:
        group, (a, b), chance = groups[each["group"]], each["pair"], each["chance"]
        is_tie = _is_tie(config, chance)
        if not is_tie:
            sides = (group.texts[a], group.texts[b]) if chance > 0.5 else (group.texts[b], group.texts[a])
            before = sides in group.was_better
            agrees += [float(before)] if before or sides[::-1] in group.was_better else []
        won = 0.5 if is_tie else float(chance > 0.5)
        if (group.sources[a] == 0) != (group.sources[b] == 0):  # the first source against any other
            wins.append(won if group.sources[a] == 0 else 1 - won)
    if agrees:
        found["agreement"] = sum(agrees) / len(agrees)
    if wins:
        found["win_rate"] = sum(wins) / len(wins)
    return found
