"""TRL's DPOTrainer for rows that are tokens already, with TRL's losses or with one of `model.preference_losses`.

TRL's own KTOTrainer, ORPOTrainer and CPOTrainer are not driven. The last two are experimental and tokenise for
themselves, prompt and answer apart; KTO takes its KL from each micro-batch, so that its loss changes with how a step is
cut into micro-batches and processes. Here a step has one KL and one count of tokens: the rows alone make the numbers.
(The tests compare the losses with TRL's.)

B rows of a micro-batch; a batch is 2 B sequences, the first answers and then the second ones, as TRL's collator lays
them out. KTO's second answer is another row's, which stands there for the KL alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from peft import PeftModel
from safetensors.numpy import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from trl import DPOTrainer

from pipeline import trainer as adapter
from pipeline.errors import DataError
from pipeline.evals.subject import chat_request
from pipeline.model.preference_losses import (
    A_TOKEN,
    cpo_losses,
    dpo_losses,
    kto_losses,
    orpo_losses,
    simpo_losses,
    smoothed,
)
from pipeline.runtime import Runtime
from pipeline.schedule import Row, Schedule

Name = Literal["dpo", "kto", "orpo", "simpo", "cpo"]
SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Objective:
    """A loss of ours with its numbers, each as in the docstrings of `preference_losses`."""

    name: Name
    beta: float
    label_smoothing: float = 0.0
    loss_types: tuple[str, ...] = ("sigmoid",)
    loss_weights: tuple[float, ...] = (1.0,)
    margin_weight: float = 0.0
    """What a row's margin is multiplied by."""
    simpo_gamma: float = 0.0
    nll_weight: float = 0.0
    """Of the mean loss of a chosen answer's token."""
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    @property
    def row_fields(self) -> tuple[str, ...]:
        """What it reads of a row beside its tokens."""
        return ("label", "is_mismatched") if self.name == "kto" else ("preference", "margin")


@dataclass(frozen=True)
class _Step:
    """What all micro-batches and processes of an optimiser step share."""

    kl: Tensor
    chosen_tokens: Tensor
    micro_batches: int
    """Of all processes together."""


class PreferenceTrainer(DPOTrainer):  # type: ignore[misc]
    """TRL's trainer on tokens, with the reference's log-probabilities in the rows where its loss needs them.

    `objective` None is TRL's own loss.
    """

    objective: Objective | None = None
    step: _Step
    labelled: list[Tensor]
    """kto: the sums of each micro-batch of the step so far, by side: rewards, log-probabilities, answers."""
    entropies: list[Tensor]
    """Of each micro-batch of the step so far: the sum over the answers' tokens, and their number."""

    def use(self, objective: Objective) -> None:
        """Take this loss instead of TRL's."""
        self.objective = objective
        self.data_collator: Callable[[list[Row]], Any] = _with_fields(self.data_collator, objective.row_fields)

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The micro-batches of a step, of which the step's own figures are taken before it begins."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.objective is not None and batches:
            self.step, self.labelled, self.entropies = self._measured(batches), [], []
        return batches, items

    def _measured(self, batches: Sequence[dict[str, Tensor]]) -> _Step:
        """KTO's z = max(0, mean over the step's mismatched pairs of log p(y' | x) - log r(y' | x)); counts.

        Without dropout: z is an estimate without noise, and a resumed run has its random numbers back only later.
        """
        assert self.objective is not None
        self.model.eval()
        sums_3 = torch.zeros(3, device=batches[0]["input_ids"].device)  # log-ratios, pairs, tokens
        for batch in batches:
            chosen, other = _halves(batch)
            sums_3[2] += chosen["completion_mask"][:, 1:].sum()
            if self.objective.name == "kto":
                with torch.no_grad(), self.accelerator.autocast():
                    log_p_B, _, _ = self._log_probs(self.model, other)
                sums_3[0] += (log_p_B - batch["ref_rejected_logps"])[batch["is_mismatched"]].sum()
                sums_3[1] += batch["is_mismatched"].sum()
        self.model.train()
        ratios, pairs, tokens = self.accelerator.reduce(sums_3, reduction="sum")
        kl = (ratios / pairs.clamp(min=1)).clamp(min=0)
        return _Step(kl, tokens, len(batches) * self.accelerator.num_processes)

    def _log_probs(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Any]:
        """(log-probability of every answer, its tokens, the model's output)."""
        labels_BT = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        routed = {"output_router_logits": True} if self.aux_loss_enabled else {}
        outputs = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=labels_BT,
            use_cache=False,
            fused_lm_head=True,
            **routed,
        )
        log_p: Tensor = outputs.log_probs.sum(dim=1)
        return log_p, batch["completion_mask"][:, 1:].sum(dim=1), outputs

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool) -> Any:
        if self.objective is None:
            return super()._compute_loss(model, inputs, return_outputs)
        if self.objective.name == "kto":
            loss, outputs = self._unpaired_loss(self.objective, model, inputs)
        else:
            loss, outputs = self._paired_loss(self.objective, model, inputs)
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
            self._note({"aux_loss": outputs.aux_loss})
        return (loss, outputs) if return_outputs else loss

    def _paired_loss(self, objective: Objective, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Any]:
        log_p, tokens, outputs = self._log_probs(model, inputs)
        chosen_B, rejected_B = log_p.chunk(2)
        chosen_mean_B, rejected_mean_B = (log_p / tokens.clamp(min=1)).chunk(2)
        preference_B = smoothed(inputs["preference"], objective.label_smoothing)
        if objective.name == "dpo":
            ratios = log_p - torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
            losses_B = _weighted_dpo(objective, ratios, tokens, preference_B, inputs["margin"])
            rewards = ratios
        elif objective.name == "orpo":
            losses_B = objective.beta * orpo_losses(chosen_mean_B, rejected_mean_B, preference_B)
            rewards = log_p / tokens.clamp(min=1)
        elif objective.name == "simpo":
            delta_B = chosen_mean_B - rejected_mean_B
            losses_B = simpo_losses(delta_B, objective.beta, objective.simpo_gamma, preference_B)
            rewards = log_p / tokens.clamp(min=1)
        else:
            losses_B = cpo_losses(chosen_B - rejected_B, objective.beta, preference_B)
            rewards = log_p
        loss = losses_B.mean()
        if objective.nll_weight:
            nll = -chosen_B.sum() * self.step.micro_batches / self.step.chosen_tokens
            loss = loss + objective.nll_weight * nll
            self._note({"nll_loss": nll})
        good_B, bad_B = (objective.beta * rewards.detach()).chunk(2)
        figures = {"rewards/chosen": good_B, "rewards/rejected": bad_B, "rewards/margins": good_B - bad_B}
        figures |= {
            "rewards/accuracies": (good_B > bad_B).float(),
            "logps/chosen": chosen_B,
            "logps/rejected": rejected_B,
        }
        self._note(figures)
        self._note_entropy(inputs, outputs)
        return loss, outputs

    def _unpaired_loss(self, objective: Objective, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Any]:
        rows, _ = _halves(inputs)
        log_p_B, _, outputs = self._log_probs(model, rows)
        ratio_B = log_p_B - inputs["ref_chosen_logps"]
        is_good_B, kl = inputs["label"], self.step.kl
        losses_B = kto_losses(
            ratio_B, is_good_B, kl, objective.beta, objective.desirable_weight, objective.undesirable_weight
        )
        rewards_B = objective.beta * ratio_B.detach()
        is_right_B = ((ratio_B > kl) == is_good_B).float()
        self._note({"kl": kl, "rewards/accuracies": is_right_B})
        self._note_entropy(rows, outputs)
        figures_3B = torch.stack([rewards_B, log_p_B.detach(), torch.ones_like(rewards_B)])
        self.labelled.append(torch.stack([(figures_3B * is_side_B).sum(1) for is_side_B in (is_good_B, ~is_good_B)]))
        if len(self.labelled) * self.accelerator.num_processes == self.step.micro_batches:
            self._note_sides()
        return losses_B.mean(), outputs

    def _note_sides(self) -> None:
        """kto's means over the desirable and over the undesirable answers of the whole step, those there are."""
        sums_23 = self.accelerator.reduce(torch.stack(self.labelled).sum(dim=0), reduction="sum").tolist()
        means: dict[str, float] = {}
        for side, (reward, log_p, count) in zip(SIDES, sums_23, strict=True):
            if count:
                means |= {f"rewards/{side}": reward / count, f"logps/{side}": log_p / count}
        if all(count for *_, count in sums_23):
            means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
        for name, value in means.items():
            self._metrics["train"][name].append(value)

    def _note_entropy(self, batch: dict[str, Tensor], outputs: Any) -> None:
        """Of the next token's distribution, in nats: mean over all tokens of the step's answers, however many of them a
        micro-batch holds."""
        mask = batch["completion_mask"][:, 1:]
        self.entropies.append(torch.stack([(outputs.entropy.detach() * mask).sum(), mask.sum()]))
        if len(self.entropies) * self.accelerator.num_processes == self.step.micro_batches:
            total, count = self.accelerator.reduce(torch.stack(self.entropies).sum(dim=0), reduction="sum").tolist()
            self._metrics["train"]["entropy"].append(total / max(1.0, count))

    def _note(self, figures: dict[str, Tensor]) -> None:
        """Means over all processes, for the next line of metrics."""
        for name, value in figures.items():
            self._metrics["train"][name].append(self.accelerator.gather(value.detach().mean()).mean().item())


def _weighted_dpo(
    objective: Objective, ratios: Tensor, tokens: Tensor, preference_B: Tensor, margin_B: Tensor
) -> Tensor:
    """The weighted sum of DPO's losses; ratios and tokens [2 B]."""
    chosen_B, rejected_B = ratios.chunk(2)
    chosen_mean_B, rejected_mean_B = (ratios / tokens.clamp(min=1)).chunk(2)
    losses_B = torch.zeros_like(chosen_B)
    for kind, weight in zip(objective.loss_types, objective.loss_weights, strict=True):
        delta_B = chosen_mean_B - rejected_mean_B if kind in A_TOKEN else chosen_B - rejected_B
        margins_B = objective.margin_weight * margin_B
        losses_B = losses_B + weight * dpo_losses(kind, delta_B, objective.beta, preference_B, margins_B)
    return losses_B


def _halves(batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The first answers of a batch and the second ones, as batches of sequences."""
    first, second = zip(*(batch[name].chunk(2) for name in SEQUENCES), strict=True)
    return dict(zip(SEQUENCES, first, strict=True)), dict(zip(SEQUENCES, second, strict=True))


def _with_fields(collate: Callable[[list[Row]], dict[str, Any]], names: Sequence[str]) -> Callable[[list[Row]], Any]:
    """The collator, the rows' fields of these names along."""
    return lambda rows: collate(rows) | {name: torch.tensor([row[name] for row in rows]) for name in names}


def encode(read: Sequence[Row], tokenizer: PreTrainedTokenizerFast, length: int, runtime: Runtime) -> list[Row]:
    """Canonical rows as the prompt's ids and the answers', stop tokens included, with what else a loss reads of them.

    A lone answer is `chosen_ids`. Rows with an answer past `length` tokens are left out. Raises DataError for answers
    that are the same tokens, and where no row is left.
    """
    rows: list[Row] = []
    with runtime.progress("encode", len(read), "rows") as bar:
        for row in read:
            answers = [row[side] for side in SIDES] if "chosen" in row else [row["completion"]]
            requests = [chat_request(tokenizer, row["prompt"], answer) for answer in answers]
            if len(requests) == 2 and requests[0] == requests[1]:
                raise DataError(
                    f"chosen and rejected are the same tokens: {answers[0][0]['content'][:60]!r}",
                    where="dpo.data",
                    mend="take the row out",
                )
            ids = {f"{side}_ids": list(each.completion) for side, each in zip(SIDES, requests, strict=False)}
            if max(len(each.prompt) + len(each.completion) for each in requests) <= length:
                kept: Row = {name: row[name] for name in ("preference", "margin", "label") if name in row}
                rows.append({"prompt_ids": list(requests[0].prompt), **ids, **kept})
            bar.advance()
            runtime.check_stop()
    if len(rows) < len(read):
        runtime.say(f"{len(read) - len(rows):,} rows with an answer past {length:,} tokens are left out")
    if not rows:
        raise DataError(f"every row is longer than {length:,} tokens", where="dpo.data", mend="a larger max_length")
    return rows


def tokens_of(row: Row) -> int:
    """What a row costs: every answer with its prompt."""
    answers = [row[f"{side}_ids"] for side in SIDES if f"{side}_ids" in row]
    return sum(len(row["prompt_ids"]) + len(answer) for answer in answers)


def tokens_only_read(rows: Sequence[Row], plan: Schedule, name: Name) -> int:
    """Tokens of a run that are read and not trained on: both answers of every row that is met, once, by the reference
    (dpo, kto); and by the policy, in every step, those of kto's mismatched pairs."""
    if name not in ("dpo", "kto"):
        return 0
    by_reference = sum(tokens_of(rows[row]) for row in np.unique(plan.order).tolist())
    if name == "dpo":
        return by_reference
    return by_reference + sum(len(rows[row]["prompt_ids"]) + len(rows[row]["rejected_ids"]) for row in plan.order)


def mismatched(rows: Sequence[Row], plan: Schedule, length: int) -> tuple[list[Row], Schedule]:
    """KTO's rows in the order of the run, each with the answer of the nearest row before it in its step (of the step's
    first the last one's) that has another prompt: pairs of prompt and answer that do not belong together, the answers
    being the step's own, cut where the row would be longer than `length` tokens. With them the plan that reads them
    one after the other.

    The answer of KTO's row is `chosen_ids`, and what is not its own is `rejected_ids`. Where the whole step has one
    prompt there is no such answer: `is_mismatched` is False, and the row's own first token stands there, not counted.
    """
    placed = []
    for step in plan.order.reshape(plan.steps, plan.batch).tolist():
        for place, own in enumerate(step):
            prompt = rows[own]["prompt_ids"]
            before = (rows[step[place - back]] for back in range(1, len(step)))
            partner = next((row for row in before if row["prompt_ids"] != prompt), None)
            room = length - len(prompt)
            assert room > 0, "rows whose own answer does not fit are left out"
            answer = partner["chosen_ids"][:room] if partner else rows[own]["chosen_ids"][:1]
            placed.append(rows[own] | {"rejected_ids": answer, "is_mismatched": partner is not None})
    return placed, replace(plan, order=np.arange(len(placed)))


def add_reference(trainer: Any, rows: list[Row], plan: Schedule, path: Path, runtime: Runtime) -> None:
    """Put the reference's log-probabilities of both answers into the rows that the run will read.

    They are computed by TRL's own forward on the very batches that will be trained on (a row's first, where there are
    several epochs), so that the first step's margins are zero in bf16 too. Kept at `path` for a resumed run.
    """
    if path.exists():
        kept = load_file(path)
    else:
        used, first = np.unique(plan.order, return_index=True)
        micro = trainer.args.per_device_train_batch_size
        batches = plan.order.reshape(-1, micro)
        needed = np.unique(first // micro)

        def compute(indices: list[int]) -> Any:
            found = []
            with runtime.progress("reference", len(indices), "batches") as bar:
                for index in indices:
                    batch = trainer.data_collator([rows[row] for row in batches[needed[index]]])
                    batch = {name: batch[name].to(runtime.device) for name in SEQUENCES}
                    sides = trainer.compute_ref_log_probs(trainer.model, batch)
                    found.append(np.stack([side.float().cpu().numpy() for side in sides], axis=1))
                    bar.advance()
                    runtime.check_stop()
            return np.stack(found) if found else np.zeros((0, micro, 2))

        values = adapter.over_ranks(runtime, (len(needed), micro, 2), compute)
        places = np.searchsorted(needed, first // micro)
        kept = {"rows": used, "log_probs": values[places, first % micro].astype(np.float32)}
        if runtime.is_main:
            save_file(kept, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
    runtime.barrier()
    for row, (chosen, rejected) in zip(kept["rows"].tolist(), kept["log_probs"].tolist(), strict=True):
        rows[row] |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}


def while_training(trainer: Any, measure: Callable[[PreTrainedModel], dict[str, float]]) -> dict[str, float]:
    """`measure` of the model in the middle of its training: in evaluation mode, adapters at work in their places."""
    model = trainer.model
    model.eval()
    try:
        return measure(model.get_base_model() if isinstance(model, PeftModel) else model)
    finally:
        model.train()


SEQUENCES = ("input_ids", "attention_mask", "completion_mask")
"""What a batch tells a model."""
