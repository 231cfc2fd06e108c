"""The next-token loss of any causal language model: in chunks where its head is a plain product, else by its logits.

Whether it is plain is found out by running the model on a few tokens, not by its name: some families scale or cap their
logits, or have a bias on the head. Families of experts (MoE) add their balance loss (Fedus et al. 2021, equation 4) and
tell how evenly their experts are used.

Letters of shapes: B rows, T tokens, D width, V vocabulary, E experts, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.errors import ConfigError
from pipeline.model.build import count_experts, evaluating
from pipeline.model.distillation import Teacher
from pipeline.model.liger import fused_cross_entropy_sum
from pipeline.model.losses import IGNORED, Terms, cross_entropy_sum, distillation_sum, token_nats


@dataclass(frozen=True)
class Routing:
    """How a batch was shared over the experts."""

    balance_loss: Tensor
    """E · Σ over experts of (share of the tokens' choices) × (mean probability), mean over layers; 1 when even. A token
    makes top-k choices, whose shares sum to k as in transformers' loss, so that even routing gives k."""
    busiest: Tensor
    """The busiest expert's share of the choices × E, mean over layers: 1 when even, E / k when all go to k of them."""


LARGER = 1000.0
"""Times the head's own output by which a cap or a factor behind it is looked for: a cap of 30 hardly shows in the small
logits of a new model."""


class NextToken(nn.Module):
    """A model's next-token losses. `is_chunked` says whether whole logits are avoided, `is_fused` that Liger's kernel
    does so; `splits_rows`, that every rank has a part of the same rows, over which together experts are balanced.

    A module, so that the weights of a sharded model are gathered around its forward, the head's with them. Given, the
    word `is_chunked` is taken for it; else it is found out by `has_plain_head`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: Teacher | None = None,
        *,
        is_fused: bool = False,
        is_chunked: bool | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.teacher = teacher
        self.is_fused = is_fused
        self.config = model.config.get_text_config()
        self.balance_weight = float(getattr(self.config, "router_aux_loss_coef", 0.0) or 0.0)
        self.has_experts = self.balance_weight > 0 and count_experts(self.config) > 1
        self.is_chunked = has_plain_head(model) if is_chunked is None else is_chunked
        self.splits_rows = False
        self.terms: Terms | None = None
        """`terms_of`, compiled, where the loss is to be so: in chunks, by torch alone."""
        if teacher is not None and not (self.is_chunked and has_plain_head(teacher.model)):
            raise ConfigError(
                "distillation takes logits that are the head's plain product; one of the models scales or caps them",
                where="pretrain.teacher",
                mend="another architecture, or no teacher",
            )
        if is_fused and (teacher is not None or not self.is_chunked):
            problem = "Liger's kernel takes logits that are the head's plain product, neither scaled nor capped, and no"
            raise ConfigError(f"{problem} teacher", where="pretrain.use_liger_kernel", mend="leave it out")

    def forward(
        self, inputs_BT: Tensor, targets_BT: Tensor, positions_BT: Tensor | None = None
    ) -> tuple[Tensor, Routing | None]:
        """`loss_sum`, behind the hooks of a module."""
        return self.loss_sum(inputs_BT, targets_BT, positions_BT)

    def loss_sum(
        self, inputs_BT: Tensor, targets_BT: Tensor, positions_BT: Tensor | None = None
    ) -> tuple[Tensor, Routing | None]:
        """(Σ −ln p(target) in nats over the targets that are not IGNORED, or with a teacher the sum that is minimised;
        how the experts were used).

        positions_BT: 0, 1, 2, … from the start of every document of a row, which then do not see each other.
        """
        asked: dict[str, Any] = {"output_router_logits": True} if self.has_experts else {}
        if positions_BT is not None:
            asked["position_ids"] = positions_BT
        if self.is_chunked:
            found = self.model.base_model(inputs_BT, use_cache=False, **asked)
            nats = self._from_trunk(
                found.last_hidden_state.flatten(0, 1), inputs_BT, targets_BT.flatten(), positions_BT
            )
        else:
            found = self.model(inputs_BT, use_cache=False, **asked)
            logits_NV = found.logits.float().flatten(0, 1)
            nats = F.cross_entropy(logits_NV, targets_BT.flatten(), ignore_index=IGNORED, reduction="sum")
        if not self.has_experts or not found.router_logits:  # its config speaks of experts, and no layer has them
            return nats, None
        is_counted_N = targets_BT.flatten() != IGNORED
        top_k = self.config.num_experts_per_tok
        return nats, routing_of(found.router_logits, top_k, is_counted_N, over_ranks=self.splits_rows)

    def _from_trunk(
        self, hidden_ND: Tensor, inputs_BT: Tensor, target_N: Tensor, positions_BT: Tensor | None
    ) -> Tensor:
        if self.teacher is None:
            if self.is_fused:
                return fused_cross_entropy_sum(hidden_ND, self._head(), target_N)
            return cross_entropy_sum(hidden_ND, self._head(), target_N, terms=self.terms)
        teacher, head_VD = self.teacher, self._head()
        teacher_NE, teacher_VE = teacher.hidden(inputs_BT, positions_BT), teacher.head()
        shared = min(len(head_VD), len(teacher_VE))  # a padded vocabulary has more rows than there are tokens
        head_VD, teacher_VE = head_VD[:shared], teacher_VE[:shared].to(teacher_NE.dtype)
        loss, hard, soft = distillation_sum(
            hidden_ND, head_VD, target_N, teacher_NE, teacher_VE, teacher.alpha, teacher.temperature
        )
        teacher.add(hard, soft, (target_N != IGNORED).sum())
        return loss

    @torch.no_grad()
    def nats(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """−ln p(target) of every position, float32 [B · T], 0 where the target is IGNORED; no gradients."""
        if self.is_chunked:
            hidden_BTD = self.model.base_model(inputs_BT, use_cache=False).last_hidden_state
            return token_nats(hidden_BTD.flatten(0, 1), self._head(), targets_BT.flatten())
        logits_NV = self.model(inputs_BT, use_cache=False).logits.float().flatten(0, 1)
        return F.cross_entropy(logits_NV, targets_BT.flatten(), ignore_index=IGNORED, reduction="none")

    def _head(self) -> Tensor:
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight


@torch.no_grad()
def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether the logits are the trunk's output times the head's weight: without a bias, which is zero in a new model,
    and so on four tokens with the head's output made LARGER on its way."""
    head = model.get_output_embeddings()
    if head is None or model.base_model is model or any(name == "bias" for name, _ in head.named_parameters()):
        return False
    ids_14 = torch.arange(4, device=model.device)[None] % head.weight.shape[0]
    with evaluating(model), torch.autocast(model.device.type, enabled=False):
        hidden_14D = model.base_model(ids_14, use_cache=False).last_hidden_state
        larger = head.register_forward_hook(lambda module, given, made: LARGER * made)
        try:
            logits_14V = model(ids_14, use_cache=False).logits / LARGER
        finally:
            larger.remove()
        ours_14V = F.linear(hidden_14D, head.weight)
    return ours_14V.shape == logits_14V.shape and torch.allclose(ours_14V, logits_14V, rtol=1e-4, atol=1e-5)


def routing_of(
    router_logits: tuple[Tensor, ...], top_k: int, is_counted_N: Tensor, *, over_ranks: bool = False
) -> Routing:
    """From every layer's router logits [B · T, E] at the positions that count (padding does not); `over_ranks`: with
    the choices counted over all of them, whose mean balance loss is then that of their rows together (it is linear in
    the probabilities). A collective."""
    probabilities_LNE = torch.stack([logits.float().softmax(dim=-1) for logits in router_logits])
    experts = probabilities_LNE.shape[-1]
    counted_N1 = is_counted_N[:, None].float()
    count = counted_N1.sum()
    chosen_LNk = probabilities_LNE.topk(top_k, dim=-1).indices
    choices_LE = (F.one_hot(chosen_LNk, experts).float().sum(dim=2) * counted_N1).sum(dim=1)
    if over_ranks:
        torch.distributed.all_reduce(choices_LE)
        torch.distributed.all_reduce(count)
        world_size = torch.distributed.get_world_size()
        choices_LE, count = choices_LE / world_size, count / world_size
    share_LE = choices_LE / count
    mean_LE = (probabilities_LNE * counted_N1).sum(dim=1) / count
    balance = experts * (share_LE * mean_LE).sum(dim=-1).mean()
    return Routing(balance, share_LE.max(dim=-1).values.mean() * experts / top_k)
