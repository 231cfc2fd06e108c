"""Masks from lengths, and sums, means and whitening under a mask.

Letters: B rows, T response tokens. A mask is boolean, True is a token that counts, and it comes from lengths:
`ids != pad` would erase a real end token wherever pad equals eos.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""Sums a small tensor over all ranks; the identity where there is one."""


def alone(tensor: Tensor) -> Tensor:
    """The `Reduce` of a single process."""
    return tensor


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The `Reduce` of several processes: a collective of torch.distributed."""
    total = tensor.clone()
    torch.distributed.all_reduce(total)
    return total


def length_mask(lengths_B: Tensor, length: int) -> Tensor:
    """True where t < length of the row: [B] int -> [B, length] bool."""
    return torch.arange(length, device=lengths_B.device)[None, :] < lengths_B[:, None]


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum where the mask is True; what lies outside (a NaN included) never counts. Scalar."""
    return torch.where(mask, values, 0).sum()


def masked_mean(values: Tensor, mask: Tensor, reduce: Reduce = alone) -> Tensor:
    """Mean where the mask is True, over all ranks.

    Scalar float; the mask holds at least one True on some rank.
    """
    sums = reduce(torch.stack([masked_sum(values, mask), mask.sum().to(values.dtype)]))
    return sums[0] / sums[1]


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True, reduce: Reduce = alone) -> Tensor:
    """Unit variance under the mask, and zero mean unless `shift_mean` is False, which keeps the mean.

        (x - mean) / sqrt(var + 1e-8)  [+ mean]        var = mean((x - mean)^2), biased

    As `whiten` of lm-human-preferences (there tf.nn.moments, so no n - 1). Statistics are over all ranks.
    The mean is taken twice, the second time of what the first left over: equal values come out as zeros,
    where the rounding of one sum would be blown up by the 1e4 that 1 / sqrt(1e-8) is. Same shape as
    `values`, zero outside the mask.
    """
    mean = masked_mean(values, mask, reduce)
    centred = values - mean
    centred = centred - masked_mean(centred, mask, reduce)
    scaled = centred * torch.rsqrt(masked_mean(centred.square(), mask, reduce) + 1e-8)
    return torch.where(mask, scaled if shift_mean else scaled + mean, 0)


def means(
    of_rows: Mapping[str, Tensor], of_tokens: Mapping[str, Tensor], mask_BT: Tensor, reduce: Reduce = alone
) -> dict[str, float]:
    """Means over the rows of all ranks of `of_rows` ([B] each), and over the tokens under the mask of `of_tokens`
    ([B, T] each). One reduction for all; 0 where no rank has a row."""
    counts = [torch.tensor(float(len(mask_BT)), device=mask_BT.device), mask_BT.sum().float()]
    figures = [values.float().sum() for values in of_rows.values()]
    figures += [masked_sum(values.float(), mask_BT) for values in of_tokens.values()]
    rows, tokens, *totals = reduce(torch.stack([*counts, *figures])).tolist()
    found = dict(zip((*of_rows, *of_tokens), totals, strict=True))
    return {name: total / max(1.0, rows if name in of_rows else tokens) for name, total in found.items()}
