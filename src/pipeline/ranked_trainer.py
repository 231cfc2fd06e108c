"""TRL's RewardTrainer for lists of answers: its batches hold whole lists, and its loss is ours.

Plain pairs, with margins or without, go to TRL's own; this one takes lists of more than two and ties. A row:

    {"ids": [[…], …], "ranks": [0, 1, …], "preference": 1.0, "margin": 0.0}      one list; best first
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from trl import RewardTrainer

from pipeline.data.preferences import TIE
from pipeline.model.ranked_loss import ranked_loss
from pipeline.schedule import Row


class RankedRewardTrainer(RewardTrainer):  # type: ignore[misc]
    """TRL's trainer on batches made by `collate`: every pair of a list is in one batch, every answer there once."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean of `ranked_loss` over the micro-batch's lists; keeps TRL's figures."""
        ranks_BK, preference_B, margin_B = (inputs.pop(name) for name in ("ranks", "preference", "margin"))
        outputs = model(**inputs, use_cache=False)
        scores_A = outputs.logits[:, 0].float()
        scores_BK = scores_A.new_zeros(ranks_BK.shape).masked_scatter(ranks_BK >= 0, scores_A)
        centring = self.args.center_rewards_coefficient or 0.0
        loss = ranked_loss(scores_BK, ranks_BK, preference_B, margin_B, centring).mean()
        is_told_BKK = is_told(ranks_BK, preference_B)
        self._note(scores_A.detach(), scores_BK.detach(), is_told_BKK, inputs["attention_mask"].sum())
        return (loss, outputs) if return_outputs else loss

    def _note(self, scores_A: Tensor, scores_BK: Tensor, is_told_BKK: Tensor, tokens: Tensor) -> None:
        """TRL's figures; accuracy and margin are over the pairs of `is_told`, and left out of a batch without any.
        Lists differ in length, so ranks share sums, not scores."""
        delta_BKK = (scores_BK[:, :, None] - scores_BK[:, None, :]) * is_told_BKK
        sums = [(delta_BKK > 0).sum(), delta_BKK.sum(), is_told_BKK.sum(), scores_A.sum(), len(scores_A), tokens]
        own = [torch.as_tensor(each, device=scores_A.device).float() for each in sums]
        ends = torch.stack([scores_A.min(), scores_A.max()])
        shared = self.accelerator.gather(torch.cat([torch.stack(own), ends])[None])
        right, margin, pairs, score, answers, read = shared[:, :6].sum(dim=0).tolist()
        self._total_train_tokens += int(read)
        figures = {
            "min_reward": shared[:, 6].min().item(),
            "mean_reward": score / answers,
            "max_reward": shared[:, 7].max().item(),
        }
        if pairs:
            figures |= {"accuracy": right / pairs, "margin": margin / pairs}
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        for name, value in figures.items():
            self._metrics["train"][name].append(value)


def is_told(ranks_BK: Tensor, preference_B: Tensor) -> Tensor:
    """Bool [B, K, K]: True where the label says that the first answer is better than the second: neither a tie of
    ranks, nor a row whose `preference` is one, nor behind a list's end (rank −1)."""
    is_above_BKK = (ranks_BK[:, :, None] < ranks_BK[:, None, :]) & (ranks_BK >= 0)[:, :, None]
    return is_above_BKK & (preference_B > TIE)[:, None, None]


def collate(rows: Sequence[Row], pad_id: int) -> dict[str, Tensor]:
    """A micro-batch: the answers of all lists one after another, input_ids and attention_mask [A, T] (padding on the
    right), and of each list ranks [B, K] (−1 behind its end), preference [B] and margin [B]."""
    answers = [torch.tensor(ids) for row in rows for ids in row["ids"]]
    return {
        "input_ids": pad_sequence(answers, batch_first=True, padding_value=pad_id),
        "attention_mask": pad_sequence([torch.ones_like(ids) for ids in answers], batch_first=True),
        "ranks": pad_sequence([torch.tensor(row["ranks"]) for row in rows], batch_first=True, padding_value=-1),
        "preference": torch.tensor([row["preference"] for row in rows], dtype=torch.float32),
        "margin": torch.tensor([row["margin"] for row in rows], dtype=torch.float32),
    }
