"""A judge that compares: which of two answers is the better one by a written constitution (RLAIF; Bai et al. 2022, Lee
et al. 2023).

It is asked in both orders, since judges favour a place (Zheng et al. 2023). In process its verdict is the log-odds of
the tokens A and B as the next one, and the two orders' are averaged: what a place adds to them falls out.

    l = [l(first as A) - l(second as A)] / 2,   P(first is better) = 1 / (1 + exp(-l))

Behind an address it writes A, B or TIE; what both orders agree on counts: 1 or 0, and 0.5 for all else. Letters: B
comparisons, V vocabulary, K ids that write one letter.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pipeline.artifacts import Artifact
from pipeline.data.tokenizers import load_tokenizer
from pipeline.errors import DataError
from pipeline.model.build import check_vocabulary, load_causal_lm, reach_of
from pipeline.rl.judge import judge_ids, last_logits, question_of, word_ids
from pipeline.rl.judge_api import AT_ONCE, RemoteJudge
from pipeline.rl.rollouts import microbatches, pad_right
from pipeline.runtime import Runtime

Message = dict[str, str]
COMPARED = (
    "{constitution}\n\n"
    "Question:\n{question}\n\n"
    "Answer A:\n{first}\n\n"
    "Answer B:\n{second}\n\n"
    "Which answer is better by the rules above? Write {choice} and nothing else.\n"
)
VERDICT = re.compile(r"\W*(?:(?:the |better )*answer(?: is)?\W+)?(A|B|TIE)\b\W*", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True)
class Compared:
    """What a judge said of two answers."""

    chance: float
    """That the first one is better."""
    is_swayed: bool
    """Whether the two orders gave two verdicts: the place decided."""
    unread: int = 0
    """Replies, of the two, in which no verdict could be read; the pair counts as a tie then."""


def compare_text(constitution: str, prompt: Sequence[Message], first: str, second: str, choice: str = "A or B") -> str:
    """What a judge is asked of two answers to one conversation."""
    return COMPARED.format(
        constitution=constitution.strip(), question=question_of(prompt), first=first, second=second, choice=choice
    )


@dataclass(frozen=True)
class Comparer:
    """A judge in this process."""

    reference: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    constitution: str
    ids_2K: Tensor
    batch_size: int
    bf16: bool

    def compare(self, prompts: Sequence[Sequence[Message]], pairs: Sequence[tuple[str, str]]) -> list[Compared]:
        """The verdict on each pair of answers. DataError where one does not fit the judge's context."""
        orders = [pair for each in pairs for pair in (each, each[::-1])]
        asked = [prompt for prompt in prompts for _ in range(2)]
        texts = [compare_text(self.constitution, prompt, *pair) for prompt, pair in zip(asked, orders, strict=True)]
        log_odds = self.log_odds(texts).tolist()
        found = []
        for forth, back in zip(log_odds[::2], log_odds[1::2], strict=True):
            chance = torch.sigmoid(torch.tensor((forth - back) / 2, dtype=torch.float64)).item()
            found.append(Compared(chance, is_swayed=(forth > 0) == (back > 0)))
        return found

    def log_odds(self, texts: Sequence[str]) -> Tensor:
        """log P(A) - log P(B) behind each text, float32 [B]."""
        rows = [judge_ids(self.tokenizer, text) for text in texts]
        lengths_B, reach = torch.tensor([len(row) for row in rows]), reach_of(self.model.config)
        if reach is not None and int(lengths_B.max()) > reach:
            raise DataError(
                f"the judge {self.reference} reads {reach} tokens, and constitution, question and answers are "
                f"{int(lengths_B.max())}",
                where="label.data",
                mend="a shorter constitution or shorter answers, or a judge of a longer context",
            )
        found_B = torch.zeros(len(rows))
        for part in microbatches(lengths_B, self.batch_size):
            ids_BL = pad_right([rows[row] for row in part.tolist()], 0)
            logits_BV = last_logits(self.model, ids_BL.to(self.model.device), lengths_B[part], self.bf16)
            found_B[part] = log_odds(logits_BV, self.ids_2K).cpu()
        return found_B


def log_odds(logits_BV: Tensor, ids_2K: Tensor) -> Tensor:
    """log p(A) - log p(B), p of a letter being all that its ids get. [B]"""
    letters_B2 = logits_BV.float()[:, ids_2K].logsumexp(dim=-1)
    return letters_B2[:, 0] - letters_B2[:, 1]


def load_comparer(artifact: Artifact, constitution: str, *, batch_size: int, bf16: bool, runtime: Runtime) -> Comparer:
    """The language model of `artifact` as a judge; any tokenizer that writes A and B as a token each."""
    tokenizer = load_tokenizer(artifact.model)
    model = load_causal_lm(artifact.model).to(runtime.device).eval().requires_grad_(False)
    check_vocabulary(model, len(tokenizer), "label.judge")
    ids_2K = word_ids(tokenizer, ("A", "B"), "A and B each").to(runtime.device)
    return Comparer(artifact.reference, model, tokenizer, constitution, ids_2K, batch_size, bf16)


@dataclass(frozen=True)
class RemoteComparer:
    """A judge behind an OpenAI-compatible address."""

    judge: RemoteJudge

    def compare(self, prompts: Sequence[Sequence[Message]], pairs: Sequence[tuple[str, str]]) -> list[Compared]:
        """The verdict on each pair of answers. TrainingError where the address does not answer."""
        orders = [pair for each in pairs for pair in (each, each[::-1])]
        asked = [prompt for prompt in prompts for _ in range(2)]
        texts = [
            compare_text(self.judge.constitution, prompt, *pair, choice="A, B or TIE")
            for prompt, pair in zip(asked, orders, strict=True)
        ]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            verdicts = [read_verdict(reply) for reply in pool.map(self.judge.ask, texts)]
        found = []
        for forth, back in zip(verdicts[::2], verdicts[1::2], strict=True):
            unread = (forth is None) + (back is None)
            agree = forth is not None and back is not None and forth == 1 - back  # both name the same answer, or a tie
            chance = forth if agree and forth is not None else 0.5
            found.append(Compared(chance, not unread and not agree, unread))
        return found


def read_verdict(reply: str) -> float | None:
    """1 for A, 0 for B, 0.5 for a tie ("A", "Answer B.", "**TIE**"); None for any other reply."""
    found = VERDICT.fullmatch(reply)
    return None if found is None else {"A": 1.0, "B": 0.0, "TIE": 0.5}[found[1].upper()]
