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

    from pipeline.data.shown import ShownRow
    from pipeline.rl.keeping import Group
    from pipeline.rl.prompts import Prompts
    from pipeline.rl.revising import Reviser
    from pipeline.rl.scoring import Scorer
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

    # 1. prompts, and the answers to each, in parts that survive a kill
    with said_of("sample"):
        speaker = _Speaker(config, inputs, runtime)
        groups, seconds = speaker.groups()

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
    found |= speaker.terms | revising_figures(groups)
    found |= {"left_out": float(why.total()), "answers_per_second": runtime.world_size * answers / max(1e-9, seconds)}
    if config.keep == "pairs":
        found["margin"] = sum(row["margin"] for row in rows) / len(rows)
    if config.keep == "best" and config.threshold is None:
        found["kl_bound"] = kl_bound(config.num_generations)
    runtime.metrics.log(answers, speaker.tokens, **found)
    return {**found, "flops": speaker.flops}


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


class _Speaker:
    """The model that answers and what scores it; the prompts of the run in their order."""

    def __init__(self, config: SampleConfig, inputs: dict[str, Any], runtime: Runtime) -> None:
        from pipeline.data.chat import encode_prompt, stop_token_id
        from pipeline.data.tokenizers import load_tokenizer
        from pipeline.rl.place import Place
        from pipeline.rl.prompts import PromptReader
        from pipeline.rl.scoring import check_references, context_of

        self.config, self.runtime = config, runtime
        self.place = Place.of(runtime, config.bf16)
        self.tokenizer = tokenizer = load_tokenizer(inputs["init"].model)
        self.stop_id = stop_token_id(tokenizer)
        self.pad_id = self.stop_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        context = context_of(inputs, INPUTS)
        reading = PromptReader(
            encode=lambda row: encode_prompt(tokenizer, row["prompt"]),
            longest=config.max_prompt_length,
            room=None if context is None else context - config.response_length,
            generator=runtime.generator,
        )
        self.prompts = _prompts(config, reading, runtime)
        if config.reward is not None:
            check_references(config.reward, [self.prompts.rows[row] for row in self.prompts.order])
        self._load(inputs)
        self.tokens, self.flops = 0, 0.0
        self.terms: dict[str, float] = {}

    def _load(self, inputs: dict[str, Any]) -> None:
        """The models, and how they are asked."""
        from pipeline.model.attention import use_plain_products
        from pipeline.model.build import check_vocabulary, load_causal_lm
        from pipeline.rl.asking import Asking

        config, tokenizer = self.config, self.tokenizer
        self.model = load_causal_lm(inputs["init"].model).to(self.place.device).eval()
        check_vocabulary(self.model, len(tokenizer), "sample.init")
        self.scorer = self._scorer(inputs)
        for model in (self.model, *(self.scorer.models if self.scorer else ())):
            use_plain_products(model, self.place.bf16, self.prompts.longest + config.response_length)
        self.asking = Asking(
            place=self.place,
            longest=config.response_length,
            stop_id=self.stop_id,
            pad_id=self.pad_id,
            temperature=config.temperature,
            batch_size=config.batch_size,
            stop_strings=config.stop_strings,
            decode=tokenizer.decode if config.stop_strings else None,
            top_k=config.top_k,
            top_p=config.top_p,
        )
        self.reviser = self._reviser(inputs)

    def _reviser(self, inputs: dict[str, Any]) -> Reviser | None:
        """What criticises and revises: a model behind an address, the judge, or the model that answers."""
        from pipeline.rl.judge_api import RemoteModel
        from pipeline.rl.revising import Reviser, principles_in, prompt_in
        from pipeline.rl.scoring import text_in
        from pipeline.rl.writing import RemoteWriter, Step, Writer, load_writer, writer_of

        config, judge = self.config, inputs.get("judge")
        if not config.revisions:
            return None
        longest: dict[Step, int] = {"critique": config.critique_length, "revision": config.response_length}
        writer: Writer | RemoteWriter
        if config.judge_url is not None:
            url, name, how = config.judge_url, config.judge_model or "", (config.temperature, config.top_p)
            writer = RemoteWriter({step: RemoteModel(url, name, length, *how) for step, length in longest.items()})
        elif judge is not None:
            writer = load_writer(judge, self.asking, longest)
        else:
            writer = writer_of(self.model, self.tokenizer, self.asking, longest)
        assert config.constitution is not None
        return Reviser(
            writer=writer,
            principles=principles_in(text_in(config.constitution), str(config.constitution)),
            rounds=config.revisions,
            place=self.place,
            keeps_unfinished=config.unfinished == "keep",
            critique_prompt=prompt_in(config.critique_prompt, "critique"),
            revision_prompt=prompt_in(config.revision_prompt, "revision"),
        )

    def _scorer(self, inputs: dict[str, Any]) -> Scorer | None:
        from pipeline.rl.scoring import load_scorer

        if self.config.reward is None:
            return None
        return load_scorer(
            self.config.reward,
            inputs,
            self.tokenizer,
            stop_id=self.stop_id,
            pad_id=self.pad_id,
            batch_size=self.config.batch_size,
            bf16=self.place.bf16,
            runtime=self.runtime,
            stop_strings=self.config.stop_strings,
        )

    def groups(self) -> tuple[list[Group], float]:
        """Every prompt with its answers, and the seconds that took over all ranks."""
        from pipeline.model.build import count_parameters
        from pipeline.rl.keeping import Answer, Group, figures
        from pipeline.rl.parts import Item, Work, cut, do

        prompts, config = self.prompts, self.config
        rows = [prompts.rows[row] for row in prompts.order]

        def group(item: Item) -> Group:
            names = ("score", "revised", "rounds")
            answers = [
                Answer(each["text"], each["ended"], **{name: each[name] for name in names if name in each})
                for each in item["answers"]
            ]
            return Group(item["prompt"], item["reference"], answers)

        def shown(items: Sequence[Item]) -> dict[str, float]:
            found = figures([group(item) for item in items])
            return {name: found[name] for name in ("score", "ended", "distinct") if name in found}

        self.runtime.say(f"{len(rows):,} prompts, {config.num_generations} answers to each")
        lengths = [len(prompts.ids[row]) for row in prompts.order]
        parts = cut(lengths, max(1, config.batch_size // config.num_generations))
        work = Work("sample", "answers", self.answer, lambda item: len(item["answers"]), shown)
        items, seconds = do(work, parts, self.runtime)
        read = sum(lengths)
        answers = [each for item in items for each in item["answers"]]
        written = sum(each["length"] for each in answers)
        names = [name for name in answers[0] if name.startswith("reward_")]
        self.terms = {name: sum(each[name] for each in answers) / len(answers) for name in names}
        scoring = len(self.scorer.models) * (read * config.num_generations + written) if self.scorer else 0
        self.tokens = read + written
        self.flops = 2.0 * count_parameters(self.model)[1] * (self.tokens + scoring)
        if self.reviser:
            self.flops += 2.0 * self.reviser.writer.parameters * sum(each["tokens"] for each in answers)
        return [group(item) for item in items], seconds

    def answer(self, places: Sequence[int]) -> list[dict[str, Any]]:
        """The answers to the prompts at these places of the order, an item a prompt. A prompt's random numbers are its
        own, whatever part it is in."""
        import torch

        from pipeline.model.generation import draw_uniforms
        from pipeline.rl.scoring import Responses

        config, prompts, samples = self.config, self.prompts, self.config.num_generations
        asked = [prompts.order[place] for place in places for _ in range(samples)]
        uniforms_BT = None
        if config.temperature > 0:
            draws = [self.place.generator("sampling", place) for place in places]
            uniforms_BT = torch.cat([draw_uniforms(samples, config.response_length, draw) for draw in draws])
        rows = [prompts.rows[row] for row in asked]
        rollout, rows = self.asking.answers(self.model, [prompts.ids[row] for row in asked], uniforms_BT, rows, samples)
        texts = Responses(rollout, rows, self.tokenizer, config.stop_strings).texts
        columns: dict[str, list[Any]] = {
            "text": texts,
            "length": rollout.lengths_B.tolist(),
            "ended": rollout.is_ended_B.tolist(),
        }
        if self.scorer is not None:
            scores_B, terms = self.scorer.score(rollout, rows)
            columns |= {"score": scores_B.tolist()} | {name: term_B.tolist() for name, term_B in terms.items()}
        answers = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        if self.reviser is not None:
            self._revise(places, answers)
        return [
            {
                "prompt": prompts.rows[prompts.order[place]]["prompt"],
                "reference": prompts.rows[prompts.order[place]]["reference"],
                "answers": answers[number * samples : (number + 1) * samples],
            }
            for number, place in enumerate(places)
        ]

    def _revise(self, places: Sequence[int], answers: list[dict[str, Any]]) -> None:
        """What could be kept of the answers, criticised and revised in place; each by random numbers of its own."""
        assert self.reviser is not None
        samples, keeps = self.config.num_generations, self.config.unfinished == "keep"
        asked, revised = [], []
        for number, answer in enumerate(answers):
            place = places[number // samples]
            answer |= {"revised": answer["text"], "rounds": [], "tokens": 0}
            if answer["text"].strip() and (answer["ended"] or keeps):
                prompt = self.prompts.rows[self.prompts.order[place]]["prompt"]
                asked.append(((place, number % samples), prompt, answer["text"]))
                revised.append(answer)
        for answer, found in zip(revised, self.reviser.revise(asked), strict=True):
            answer |= {"revised": found.text, "rounds": found.rounds, "tokens": found.tokens}


def _prompts(config: SampleConfig, reading: Any, runtime: Runtime) -> Prompts:
    """The prompts, each once, in an order that the seed draws."""
    from pipeline.data.formats import read_rows
    from pipeline.data.sources import BUILT_IN

    assert config.data is not None
    rows = read_rows(config.data, "prompt", split=config.split, held_out=config.held_out, say=runtime.say)
    held_out = [entry.source for entry in config.data if entry.source in BUILT_IN and config.split != "train"]
    if held_out:
        runtime.say(
            f"these rows hold prompts that eval measures with ({', '.join(held_out)}, held out): not to train on"
        )
    prompts: Prompts = reading.take(rows, min(config.prompts or len(rows), len(rows)), "prompts").once()
    if prompts.left_out:
        runtime.say(f"{prompts.left_out:,} prompts of more than {config.max_prompt_length} tokens are left out")
    return prompts
