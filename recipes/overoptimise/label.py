"""label: pairs of a model's own answers, labelled by a reward known in closed form, as rows for reward and dpo.

The setting of Gao et al. 2023 ("Scaling laws for reward model overoptimization"): a gold reward stands for people, and
a proxy learns from its labels. A label is drawn by Bradley and Terry's model, so that people of one mind about two
answers that are far apart differ about two that are near (as in Coste et al. 2023 a share of labels is then wrong):

    P(a is chosen over b) = 1 / (1 + exp(-(gold(a) - gold(b)) / noise))

A stage of one's own: kind `rows`, and `data: [{source: label}]` in a later stage reads what it writes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.recipe import Data, Ref, StageConfig, field


class LabelConfig(StageConfig):
    """What label can be told."""

    init: Ref = field("sft", "the model that answers")
    data: Data | None = field(None, "rows whose prompts are answered; those sft was trained on unless set")
    held_out: float = field(0.05, "share of the rows of files that is left out, as in sft", ge=0, lt=1)
    gold: str = field(..., "what labels: a function of answers, ./gold.py:gold")
    pairs: int = field(1000, "pairs of answers, each to a prompt of its own", unit="pairs", gt=0)
    noise: float = field(0.1, "how far apart two answers' gold must be for a label to be fairly sure", ge=0)
    max_prompt_length: int | None = field(None, "leave out longer prompts, chat template included", unit="tokens", gt=0)
    response_length: int = field(48, "tokens of an answer at most", unit="tokens", gt=0)


INPUTS = {"init": "causal-lm"}
KIND = "rows"
DEFAULTS = {"data": "demonstrations"}
RESULT_VERSION = 1


def run(config: LabelConfig, inputs: dict[str, Any], out: Path, runtime: Any) -> dict[str, float]:
    """Write rows.jsonl; returns how many rows, their gold, and the share of labels against it."""
    import torch
    from speaker import Speaker

    from pipeline.data.formats import read_rows
    from pipeline.rl.scoring import function_scores
    from pipeline.usercode import load_member

    # 1. two answers to each prompt
    rows = read_rows(config.data, "prompt", held_out=config.held_out, say=runtime.say)
    speaker = Speaker.load(inputs["init"], config.response_length, runtime)
    asked = [row for row in speaker.prompts(rows, config.pairs, config.max_prompt_length) for _ in range(2)]
    texts = speaker.say(asked, runtime.generator("answers")).texts

    # 2. what each is worth, and which is chosen
    golds = function_scores(
        load_member(config.gold), config.gold, [row["prompt"][-1]["content"] for row in asked], texts, asked
    ).double()
    margins = golds[0::2] - golds[1::2]
    chances = torch.sigmoid(margins / config.noise) if config.noise else (margins > 0).double()
    drawn = torch.rand(len(margins), generator=runtime.generator("labels"), dtype=torch.float64)
    is_first = (drawn < chances).tolist()
    is_wrong = ((drawn < chances) != (margins > 0)).tolist()

    # 3. the pairs in which there is something to tell apart
    kept = wrong = 0
    with (out / "rows.jsonl").open("w", encoding="utf-8") as file:
        for place in range(len(is_first)):
            pair = texts[2 * place : 2 * place + 2]
            if pair[0].strip() == pair[1].strip() or not all(text.strip() for text in pair):
                continue
            chosen, rejected = pair if is_first[place] else pair[::-1]
            row = {"prompt": asked[2 * place]["prompt"], "chosen": chosen, "rejected": rejected}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            kept += 1
            wrong += is_wrong[place]
    figures = {"rows": float(kept), "gold": float(golds.mean()), "gold_std": float(golds.std())}
    figures["wrong_labels"] = wrong / max(1, kept)
    runtime.metrics.log(kept, None, **figures)
    return figures
