"""sample: a model answers prompts, a reward scores the answers, and rows are made of what is kept.

The rows are data for the next stage, by this stage's name (`data: [sample]`): demonstrations for sft, preferences for
dpo and reward. With a reward and `keep: best` it is best-of-n and rejection-sampling fine-tuning (Touvron et al. 2023,
Llama 2, section 3.2.3), with a threshold instead ReST's Grow and Improve (Gulcehre et al. 2023), with `keep: pairs` the
data of iterative dpo, and with `keep: reference` that of SPIN (Chen et al. 2024). With `revisions` every answer is
criticised by a principle of a constitution and written anew, as often as that (Bai et al. 2022, "Constitutional AI",
section 3). docs/sample.md explains every field.

Departures: an answer without a stop token is left out, since whatever trained on it would learn to stop there; a pair
whose sides are worth the same is no pair; scores are the reward's own, neither clipped nor lowered for missing ends; a
critique may find no fault, and requests for critique and revision show one example of nothing (the paper's show some).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from pipeline.errors import DataError
from pipeline.recipe import Data, File, Ref, StageConfig, field
from pipeline.reward_config import Reward, check_url

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from pipeline.artifacts import Artifact
    from pipeline.data.shown import ShownRow
    from pipeline.rl.asking import Asking
    from pipeline.rl.parts import Item
    from pipeline.rl.prompts import Prompts
    from pipeline.rl.revising import Reviser
    from pipeline.rl.scoring import Scorer
    from pipeline.rl.speaking import Speaker
    from pipeline.runtime import Runtime


class SampleConfig(StageConfig):
    """What sample can be told."""

    init: Ref = field("sft", "the model that answers")
    reward: Reward | None = field(None, "what scores the answers, in the same forms as ppo's")
    data: Data | None = field(None, "rows whose prompts are answered; those sft was trained on unless set")
    split: Literal["train", "held_out", "all"] = field("train", "which of these rows")
    held_out: float = field(0.0, "share of the rows of files that is left out; 0 leaves that to who reads", ge=0, lt=1)
    prompts: int | None = field(None, "answer so many, drawn by the seed; all unless set", unit="prompts", gt=0)
    max_prompt_length: int | None = field(None, "leave out longer prompts, chat template included", unit="tokens", gt=0)

    num_generations: int = field(4, "answers to each prompt", unit="answers", gt=0)
    response_length: int = field(128, "tokens of an answer at most", unit="tokens", gt=0)
    stop_strings: tuple[str, ...] = field((), "an answer also ends with the token that completes one of these")
    temperature: float = field(1.0, "of sampling; 0 takes the likeliest token", ge=0)
    top_k: int = field(0, "draw from so many of the likeliest tokens; 0 for all", unit="tokens", ge=0)
    top_p: float = field(1.0, "draw from the likeliest tokens that hold this share", gt=0, le=1)

    keep: Literal["all", "best", "pairs", "reference", "revised"] = field(
        "all",
        "every answer, each prompt's best, its best over another, the data's own answer over every answer, or every "
        "revised answer over what it was at first",
    )
    against: Literal["worst", "random"] = field("worst", "pairs: what the best answer is set against")
    threshold: float | None = field(None, "the lowest score that is kept; of a pair, of its better side")
    min_margin: float = field(0.0, "pairs: scores that differ by no more are a tie, which is left out", ge=0)
    unfinished: Literal["leave_out", "keep"] = field("leave_out", "what is done with answers that did not end")

    revisions: int = field(0, "rounds of critique and revision of every answer", unit="rounds", ge=0)
    constitution: File | None = field(None, "revisions: a text file of principles; a round goes by one, by the seed")
    judge: Ref | None = field(None, "revisions: the model that criticises and revises; `init` itself unless set")
    judge_url: str | None = field(None, "likewise, behind an OpenAI-compatible address: http://127.0.0.1:8000/v1")
    judge_model: str | None = field(None, "judge_url: the model's name there")
    critique_length: int = field(128, "tokens of a critique at most", unit="tokens", gt=0)
    critique_prompt: File | None = field(None, "a file with {question}, {answer} and {principle} that asks for one")
    revision_prompt: File | None = field(
        None, "a file with {question}, {answer} and {critique} that asks for a revision"
    )

    batch_size: int = field(64, "answers written side by side; a kill loses no more", unit="answers", gt=0)
    bf16: bool | None = field(None, "run the models in bf16; where the hardware gains by it unless set")

    @model_validator(mode="after")
    def _goes_together(self) -> SampleConfig:
        if self.keep in ("best", "pairs"):
            if self.reward is None:
                raise ValueError(f"keep: {self.keep} is by scores, and there is no reward")
            if self.num_generations == 1:
                raise ValueError(f"keep: {self.keep} compares answers, and num_generations is 1")
        if self.threshold is not None and (self.reward is None or self.keep == "reference"):
            why = "there is no reward" if self.reward is None else "keep: reference goes by none"
            raise ValueError(f"a threshold is of scores, and {why}")
        for name in ("against", "min_margin"):
            if name in self.model_fields_set and self.keep != "pairs":
                raise ValueError(f"{name} is of pairs, and keep is {self.keep}")
        if self.temperature == 0 and (self.num_generations > 1 or self.top_k or self.top_p < 1):
            raise ValueError("at temperature 0 there is one answer: num_generations 1, no top_k, no top_p")
        if "" in self.stop_strings:
            raise ValueError("a stop string is text, and one is empty")
        return self

    @model_validator(mode="after")
    def _revises(self) -> SampleConfig:
        if not self.revisions:
            own = ("constitution", "judge", "judge_url", "judge_model", "critique_length")
            for name in (*own, "critique_prompt", "revision_prompt"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} is of critique and revision, and revisions is 0")
            if self.keep == "revised":
                raise ValueError("keep: revised, and revisions is 0")
            return self
        if self.constitution is None:
            raise ValueError("a critique goes by a principle: revisions needs constitution")
        if self.keep not in ("all", "revised") or self.reward is not None:
            what = "a reward" if self.reward is not None else f"keep: {self.keep}"
            raise ValueError(
                f"with revisions keep is all or revised, and not {what}: a label stage scores what is kept"
            )
        if self.judge is not None and self.judge_url is not None:
            raise ValueError("judge and judge_url: one of them")
        if (self.judge_url is None) != (self.judge_model is None):
            raise ValueError("judge_url and judge_model go together")
        if self.judge_url is not None:
            check_url(self.judge_url)
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
DEFAULTS = {"data": "demonstrations"}
RESULT_VERSION = 1


def run(config: SampleConfig, inputs: dict[str, Any], out: Path, runtime: Runtime) -> dict[str, float]:
    """Write rows.jsonl; returns how many, and what the answers were like."""
    import json

    import torch

    from pipeline.rl.best_of_n import kl_bound
    from pipeline.rl.keeping import Keeping, figures, revising_figures
    from pipeline.rl.parts import said_of
    from pipeline.rl.speaking import group_of, term_means

    # 1. prompts, and the answers to each, in parts that survive a kill
    with said_of("sample"):
        speaker = _speaker(config, inputs, runtime)
        items, seconds = _write(speaker, runtime)
    groups = [group_of(item) for item in items]
    tokens, flops = speaker.spent(items)

    # 2. what is kept
    keeping = Keeping(
        keep=config.keep,
        against=config.against,
        threshold=config.threshold,
        min_margin=config.min_margin,
        keeps_unfinished=config.unfinished == "keep",
        draw=lambda group, n: int(torch.randint(n, (1,), generator=runtime.generator("against", group))),
    )
    rows, why = keeping.rows(groups)
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in why.items() if count)
    if not rows:
        raise DataError(
            f"nothing is kept of the answers to {len(groups):,} prompts ({left_out})",
            where="sample.keep",
            mend="a longer response_length, more num_generations, a lower threshold, or unfinished: keep",
        )
    if left_out:
        runtime.say(f"left out: {left_out}")
    if runtime.is_main:
        with (out / "rows.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    # 3. figures
    answers = len(groups) * config.num_generations
    found = {"rows": float(len(rows)), "prompts": float(len(groups)), "answers": float(answers)} | figures(groups)
    found |= term_means(items) | revising_figures(groups)
    found |= {"left_out": float(why.total()), "answers_per_second": runtime.world_size * answers / max(1e-9, seconds)}
    if config.keep == "pairs":
        found["margin"] = sum(row["margin"] for row in rows) / len(rows)
    if config.keep == "best" and config.threshold is None:
        found["kl_bound"] = kl_bound(config.num_generations)
    runtime.metrics.log(answers, tokens, **found)
    return {**found, "flops": flops}


def preview(config: SampleConfig, inputs: dict[str, Any], count: int) -> list[ShownRow]:
    """The first prompts; the model writes the rest."""
    from pipeline.data.chat import encode_prompt
    from pipeline.data.formats import read_rows
    from pipeline.data.shown import ShownRow
    from pipeline.data.tokenizers import load_tokenizer

    assert config.data is not None
    tokenizer = load_tokenizer(inputs["init"].model)
    rows = read_rows(config.data, "prompt", split=config.split, held_out=config.held_out)[:count]
    prompts = [encode_prompt(tokenizer, row["prompt"]) for row in rows]
    return [ShownRow(f"prompt {place}", ids, [False] * len(ids)) for place, ids in enumerate(prompts, 1)]


def _speaker(config: SampleConfig, inputs: dict[str, Any], runtime: Runtime) -> Speaker:
    """The model that answers, what scores it or revises its answers, and the prompts of the run in their order."""
    from pipeline.data.chat import stop_token_id
    from pipeline.data.tokenizers import load_tokenizer
    from pipeline.model.attention import use_plain_products
    from pipeline.model.build import check_vocabulary, load_causal_lm
    from pipeline.rl.asking import Asking
    from pipeline.rl.place import Place
    from pipeline.rl.speaking import Speaker

    place = Place.of(runtime, config.bf16)
    tokenizer = load_tokenizer(inputs["init"].model)
    stop_id = stop_token_id(tokenizer)
    asking = Asking(
        place=place,
        longest=config.response_length,
        stop_id=stop_id,
        pad_id=stop_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        temperature=config.temperature,
        batch_size=config.batch_size,
        stop_strings=config.stop_strings,
        decode=tokenizer.decode if config.stop_strings else None,
        top_k=config.top_k,
        top_p=config.top_p,
    )
    prompts = _prompts(config, inputs, tokenizer, runtime)
    model = load_causal_lm(inputs["init"].model).to(place.device).eval()
    check_vocabulary(model, len(tokenizer), "sample.init")
    scorer = _scorer(config, inputs, tokenizer, asking, runtime)
    for each in (model, *(scorer.models if scorer else ())):
        use_plain_products(each, place.bf16, prompts.longest + config.response_length)
    reviser = _reviser(config, inputs.get("judge"), model, tokenizer, asking)
    keeps = config.unfinished == "keep"
    return Speaker(model, tokenizer, asking, prompts, config.num_generations, keeps, scorer, reviser)


def _prompts(
    config: SampleConfig, inputs: dict[str, Any], tokenizer: PreTrainedTokenizerFast, runtime: Runtime
) -> Prompts:
    """The prompts, each once, in an order that the seed draws; each has what the reward compares with."""
    from pipeline.data.chat import encode_prompt
    from pipeline.data.formats import read_rows
    from pipeline.data.sources import BUILT_IN
    from pipeline.rl.functions import check_references
    from pipeline.rl.prompts import PromptReader
    from pipeline.rl.scoring import context_of

    assert config.data is not None
    rows = read_rows(config.data, "prompt", split=config.split, held_out=config.held_out, say=runtime.say)
    held_out = [entry.source for entry in config.data if entry.source in BUILT_IN and config.split != "train"]
    if held_out:
        runtime.say(
            f"these rows hold prompts that eval measures with ({', '.join(held_out)}, held out): not to train on"
        )
    context = context_of(inputs, INPUTS)
    reading = PromptReader(
        encode=lambda row: encode_prompt(tokenizer, row["prompt"]),
        longest=config.max_prompt_length,
        room=None if context is None else context - config.response_length,
        generator=runtime.generator,
    )
    prompts = reading.take(rows, min(config.prompts or len(rows), len(rows)), "prompts").once()
    if prompts.left_out:
        runtime.say(f"{prompts.left_out:,} prompts of more than {config.max_prompt_length} tokens are left out")
    if config.reward is not None:
        check_references(config.reward, [prompts.rows[row] for row in prompts.order])
    return prompts


def _scorer(
    config: SampleConfig,
    inputs: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    asking: Asking,
    runtime: Runtime,
) -> Scorer | None:
    from pipeline.rl.scoring import load_scorer

    if config.reward is None:
        return None
    return load_scorer(
        config.reward,
        inputs,
        tokenizer,
        stop_id=asking.stop_id,
        pad_id=asking.pad_id,
        batch_size=config.batch_size,
        bf16=asking.place.bf16,
        runtime=runtime,
        stop_strings=config.stop_strings,
    )


def _reviser(
    config: SampleConfig,
    judge: Artifact | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    asking: Asking,
) -> Reviser | None:
    """What criticises and revises: a model behind an address, the judge, or the model that answers."""
    from pipeline.rl.judge_api import RemoteModel
    from pipeline.rl.revising import Reviser, principles_in, prompt_in
    from pipeline.rl.scoring import text_in
    from pipeline.rl.writing import RemoteWriter, Step, Writer, load_writer, writer_of

    if not config.revisions:
        return None
    longest: dict[Step, int] = {"critique": config.critique_length, "revision": config.response_length}
    writer: Writer | RemoteWriter
    if config.judge_url is not None:
        url, name, how = config.judge_url, config.judge_model or "", (config.temperature, config.top_p)
        writer = RemoteWriter({step: RemoteModel(url, name, length, *how) for step, length in longest.items()})
    elif judge is not None:
        writer = load_writer(judge, asking, longest)
    else:
        writer = writer_of(model, tokenizer, asking, longest)
    assert config.constitution is not None
    return Reviser(
        writer=writer,
        principles=principles_in(text_in(config.constitution), str(config.constitution)),
        rounds=config.revisions,
        place=asking.place,
        keeps_unfinished=config.unfinished == "keep",
        critique_prompt=prompt_in(config.critique_prompt, "critique"),
        revision_prompt=prompt_in(config.revision_prompt, "revision"),
    )


def _write(speaker: Speaker, runtime: Runtime) -> tuple[list[Item], float]:
    """(every prompt with its answers, the seconds that took over all ranks)."""
    from pipeline.rl.keeping import figures
    from pipeline.rl.parts import Work, cut, do
    from pipeline.rl.speaking import group_of

    def shown(items: Sequence[Item]) -> dict[str, float]:
        found = figures([group_of(item) for item in items])
        return {name: found[name] for name in ("score", "ended", "distinct") if name in found}

    prompts = speaker.prompts
    runtime.say(f"{len(prompts.order):,} prompts, {speaker.samples} answers to each")
    lengths = [len(prompts.ids[row]) for row in prompts.order]
    parts = cut(lengths, max(1, speaker.asking.batch_size // speaker.samples))
    return do(Work("sample", "answers", speaker.answer, lambda item: len(item["answers"]), shown), parts, runtime)
