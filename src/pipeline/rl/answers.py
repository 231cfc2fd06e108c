"""The batch of a step, gathered: which prompts, what the policy says to them, and what that is worth.

Letters: B rows of this rank, G answers to a prompt (a group; they stand together), P groups of a step on all ranks.

With dynamic sampling (DAPO, Yu et al. 2025, section 3.2) groups whose answers are all worth the same are left out:
their advantages are 0. The next prompts are asked, a whole batch at a time, until P groups differ. Ranks count
together: the groups kept are the first P of all, in the order in which one process would have asked them, so a rank may
end with more rows than another, or with none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.rl.advantages import varies
from pipeline.rl.masking import Reduce, means
from pipeline.rl.rollouts import Rollout, concatenate


@dataclass(frozen=True)
class Asked:
    """What one round of asking gave on this rank; [B] each."""

    rollout: Rollout
    scores_B: Tensor
    """What the reward says."""
    rewards_B: Tensor
    """What is learnt from: the scores after their rules."""
    baselines_B: Tensor
    """The reward of the greedy answer to the same prompt (ReMax); zeros elsewhere."""
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    """What the score is the sum of, by the names of their figures; none where the reward is one thing."""


@dataclass(frozen=True)
class Answers:
    """The rows of a step on this rank."""

    rollout: Rollout
    rewards_B: Tensor
    baselines_B: Tensor
    places_B: Tensor
    """Where each row stands in the batch of all ranks."""


def gather(
    ask: Callable[[int], Asked],
    *,
    group_size: int,
    groups: int,
    rank: int,
    world_size: int,
    rounds: int | None,
    pad_id: int,
    reduce: Reduce,
) -> tuple[Answers, dict[str, float]]:
    """The step's rows, and figures over all that were asked for. `ask` takes the number of the round.

    `groups` is P. With `rounds` (dynamic sampling, at most so many) groups that don't differ are replaced; where the
    rounds don't give P that do, the batch is filled up with the last round's that don't. A collective where there are
    ranks.
    """
    asked: list[Asked] = []
    differing: list[Tensor] = []
    for number in range(rounds or 1):
        asked.append(ask(number))
        differing.append(_everywhere(varies(asked[-1].rewards_B, group_size)[::group_size], rank, groups, reduce))
        if sum(int(each.sum()) for each in differing) >= groups:
            break
    figures = _figures(asked, reduce)
    if group_size > 1:
        figures["varying_groups"] = torch.cat(differing).float().mean().item()
    if rounds is None:
        here = asked[0]
        rows = len(here.rewards_B)
        places_B = rank * rows + torch.arange(rows, device=here.rewards_B.device)
        return Answers(here.rollout, here.rewards_B, here.baselines_B, places_B), figures
    figures["sampling_rounds"] = float(len(asked))
    chosen = _chosen(torch.stack(differing), groups)
    return _select(asked, chosen, group_size, groups // world_size, rank, pad_id), figures


def _everywhere(own_P: Tensor, rank: int, groups: int, reduce: Reduce) -> Tensor:
    """Every rank's flags, in the order of the ranks: bool [P]."""
    table_P = torch.zeros(groups, device=own_P.device)
    table_P[rank * len(own_P) : (rank + 1) * len(own_P)] = own_P.float()
    return reduce(table_P) > 0


def _chosen(differing_RP: Tensor, groups: int) -> list[tuple[int, int]]:
    """(round, group) of the groups of the batch, in its order: those that differ, then the last round's others."""
    found = [(int(r), int(p)) for r, p in differing_RP.nonzero().tolist()][:groups]
    last = len(differing_RP) - 1
    others = [(last, int(p)) for p in (~differing_RP[last]).nonzero().flatten().tolist()]
    return found + others[: groups - len(found)]


def _select(
    asked: list[Asked], chosen: list[tuple[int, int]], group_size: int, own: int, rank: int, pad_id: int
) -> Answers:
    """This rank's rows of the chosen groups. `own`: groups of a rank in a round."""
    device = asked[0].rewards_B.device
    parts: list[tuple[Asked, Tensor]] = []
    places: list[Tensor] = []
    within_G = torch.arange(group_size, device=device)
    for number, each in enumerate(asked):
        mine = [(place, p - rank * own) for place, (r, p) in enumerate(chosen) if r == number and p // own == rank]
        rows = [group * group_size + within_G for _, group in mine]
        parts.append((each, torch.cat(rows) if rows else within_G[:0]))
        places += [place * group_size + within_G for place, _ in mine]
    return Answers(
        rollout=concatenate([each.rollout.select(rows) for each, rows in parts], pad_id),
        rewards_B=torch.cat([each.rewards_B[rows] for each, rows in parts]),
        baselines_B=torch.cat([each.baselines_B[rows] for each, rows in parts]),
        places_B=torch.cat(places) if places else within_G[:0],
    )


def _figures(asked: list[Asked], reduce: Reduce) -> dict[str, float]:
    """Means over the answers of all rounds and ranks, and how many they are."""
    rows = {
        "reward": torch.cat([each.rewards_B for each in asked]),
        "score": torch.cat([each.scores_B for each in asked]),
        "length": torch.cat([each.rollout.lengths_B for each in asked]),
        "row_length": torch.cat([each.rollout.prompt_lengths_B + each.rollout.lengths_B for each in asked]),
        "ended": torch.cat([each.rollout.is_ended_B for each in asked]),
    }
    rows |= {name: torch.cat([each.terms[name] for each in asked]) for name in asked[0].terms}
    count = reduce(torch.tensor(float(len(rows["reward"])), device=rows["reward"].device)).item()
    return means(rows, {}, torch.zeros(len(rows["reward"]), 0, device=rows["reward"].device), reduce) | {
        "episodes": count
    }


def own_rows(orders: list[Tensor], minibatches: int, places_B: Tensor) -> list[Tensor]:
    """The minibatches of each epoch's order over the batch of all ranks, each as this rank's rows of it."""
    found = []
    for order in orders:
        row_of_place = torch.full((len(order),), -1, device=places_B.device)
        row_of_place[places_B] = torch.arange(len(places_B), device=places_B.device)
        rows = [row_of_place[part.to(places_B.device)] for part in order.chunk(minibatches)]
        found += [part[part >= 0] for part in rows]
    return found
