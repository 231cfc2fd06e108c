"""Multiple choice on rows of one's own against EleutherAI's lm-eval: the same questions, the same model, fp32.

    python benchmarks/eval_vs_lm_eval.py [FOLDER of a model | tiny] [questions] [examples] [repeats]

Two layouts: ARC's (four sentences as answers) and MMLU's (four letters), with five examples that every question shares.
Both sides begin with the tokenizer's bos. Compared are the answers, question by question, by likelihood and by
likelihood a character, and the time from rows to figures with the model loaded (lm-eval: `evaluate` alone, without the
look for its tasks; the best of several batch sizes). Sides take turns; times are medians. CLOCK=processor takes the
processor's time (one thread, on a machine that others use).

lm-eval is not among what llmpipe needs: where it is missing it goes into an environment of its own, under the
temporary folder, that sees the packages of this one, and the program is begun again there.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VERBS = ["Return", "Read", "Sort", "Open", "Close", "Write", "Count", "Find", "Split", "Join", "Check", "Copy"]
NOUNS = ["list", "file", "string", "number", "object", "module", "path", "socket", "thread", "table", "queue", "graph"]
BATCHES = (1, 4, 16, 64)
CLOCK = time.process_time if os.environ.get("CLOCK") == "processor" else time.perf_counter


def begin_again() -> None:
    """Go on in an environment that has lm-eval."""
    home = Path(tempfile.gettempdir()) / "llmpipe-lm-eval"
    python = home / "bin" / "python"
    if not python.exists():
        venv.create(home, with_pip=True)
    inside = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True,
        check=True,
    ).stdout.strip()  # fmt: skip
    (Path(inside) / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    constraints = ROOT / "constraints.txt"
    subprocess.run([python, "-m", "pip", "install", "-q", "-c", constraints, "lm-eval>=0.4.9"], check=True)
    paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    os.execv(python, [str(python), __file__, *sys.argv[1:]])


if importlib.util.find_spec("lm_eval") is None:
    begin_again()

import lm_eval  # noqa: E402
import torch  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from pipeline.data.tokenizers import train_bpe  # noqa: E402
from pipeline.evals import choices  # noqa: E402
from pipeline.evals.fewshot import Asker  # noqa: E402
from pipeline.evals.likelihood import Beginning  # noqa: E402
from pipeline.evals.lm_eval_tasks import with_start  # noqa: E402
from pipeline.evals.own_tasks import read_own  # noqa: E402
from pipeline.evals.subject import Subject, load_subject  # noqa: E402
from pipeline.evaluation_config import Task  # noqa: E402
from pipeline.model.build import save_model  # noqa: E402
from pipeline.model.presets import Shape, build_config  # noqa: E402

TEXT = {
    "arc": "Question: {{question}}\\nAnswer:",
    "mmlu": "{{question.strip()}}\\n"
    + "".join(f"{letter}. {{{{choices[{place}]}}}}\\n" for place, letter in enumerate("ABCD"))
    + "Answer:",
}
CHOICE = {"arc": "{{choices.text}}", "mmlu": '["A", "B", "C", "D"]'}
TARGET = {"arc": "{{choices.label.index(answerKey)}}", "mmlu": "{{answer}}"}


def rows_of(layout: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Questions about invented functions, about 60 tokens each."""
    draw = random.Random(seed)

    def sentence() -> str:
        return (
            f"{draw.choice(VERBS)} the {draw.choice(NOUNS)} of the {draw.choice(NOUNS)}, or the {draw.choice(NOUNS)}."
        )

    rows = []
    for number in range(count):
        name = f"{draw.choice(NOUNS)}.{draw.choice(VERBS).lower()}_{number}"
        asked = f"Which describes `{name}`, given a {draw.choice(NOUNS)}?"
        own = list(dict.fromkeys(sentence() for _ in range(9)))[:4]
        place = draw.randrange(4)
        if layout == "arc":
            rows.append(
                {"question": asked, "choices": {"text": own, "label": list("ABCD")}, "answerKey": "ABCD"[place]}
            )
        else:
            rows.append({"question": asked, "choices": own, "answer": place})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tiny(folder: Path) -> Path:
    """A Llama of random weights, 256 wide, 6 layers; far from uniform, so that no two answers are as likely."""
    from transformers import LlamaForCausalLM

    texts = [json.dumps(row) for row in rows_of("arc", 400, 7)]
    tokenizer = train_bpe(iter(texts), 1024)
    tokenizer.save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    shape = Shape(depth=6, width=256, heads=4, kv_heads=4, mlp_width=704, context=2048, vocab=len(tokenizer), tied=True)
    config = build_config("llama", shape, {})
    config.initializer_range = 0.1
    assert tokenizer.pad_token_id is not None
    assert tokenizer.bos_token_id is not None
    save_model(
        LlamaForCausalLM(config),
        folder / "model",
        folder / "tokenizer",
        [tokenizer.bos_token_id],
        tokenizer.pad_token_id,
    )
    return folder / "model"


def ours(subject: Subject, task: Task) -> tuple[dict[str, list[float]], float]:
    """(which questions are right, by acc and acc_norm; seconds)."""
    own = read_own(task, lambda text: None)
    start = CLOCK()
    fresh = Beginning()
    subject.beginning.ids, subject.beginning.cache = fresh.ids, fresh.cache
    items = choices.score(Asker(subject, False), own.questions, own.shown, own.letters)
    choices.figures(items, None, 0)
    seconds = CLOCK() - start
    found = choices.per_item(items)
    assert len(items) == len(own.questions), "a question is too long"
    return {name: [hit for hit, _ in found[name].values()] for name in ("acc", "acc_norm")}, seconds


def theirs(subject: Subject, folder: Path, layout: str, shots: int, batch: int) -> tuple[dict[str, list[float]], float]:
    """The same by the harness."""
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    tasks = manager.load_task_or_group([f"bench_{layout}"])
    for task in tasks.values():
        task.set_config("num_fewshot", shots)
    model = HFLM(
        pretrained=subject.model,
        tokenizer=with_start(subject.tokenizer, subject.start_token),
        backend="causal",
        batch_size=batch,
        max_length=subject.max_length,
        add_bos_token=True,
    )
    start = CLOCK()
    found = lm_eval.evaluate(lm=model, task_dict=tasks, bootstrap_iters=0, log_samples=True)
    seconds = CLOCK() - start
    assert found is not None
    rows = sorted(found["samples"][f"bench_{layout}"], key=lambda row: row["doc_id"])
    return {name: [float(row[name]) for row in rows] for name in ("acc", "acc_norm")}, seconds


def write_yaml(folder: Path, layout: str, questions: Path, examples: Path) -> None:
    (folder / f"bench_{layout}.yaml").write_text(
        f"task: bench_{layout}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {questions}\n"
        f"    dev: {examples}\ntest_split: test\nfewshot_split: dev\nfewshot_config:\n  sampler: first_n\n"
        f'output_type: multiple_choice\ndoc_to_text: "{TEXT[layout]}"\n'
        f"doc_to_choice: '{CHOICE[layout]}'\ndoc_to_target: \"{TARGET[layout]}\"\nmetric_list:\n"
        "  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
        "  - metric: acc_norm\n    aggregation: mean\n    higher_is_better: true\n"
    )


def main() -> None:
    name, count, shots, repeats = (*sys.argv[1:], *("tiny", "200", "5", "3")[len(sys.argv) - 1 :])
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = tiny(folder) if name == "tiny" else Path(name)
        subject = load_subject(
            "model", model, device, max_length=2048, token_budget=4096, bf16=False, tick=lambda: None
        )
        for layout in ("arc", "mmlu"):
            (folder / layout).mkdir()
            data = write_rows(folder / layout / "rows.jsonl", rows_of(layout, int(count), 0))
            few = write_rows(folder / layout / "dev.jsonl", rows_of(layout, int(shots), 1))
            write_yaml(folder / layout, layout, data, few)
            task = Task(task=layout, data=data, num_fewshot=int(shots), fewshot_data=few)
            mine: list[float] = []
            other: dict[int, list[float]] = {batch: [] for batch in BATCHES}
            for _ in range(int(repeats)):
                answers, seconds = ours(subject, task)
                mine.append(seconds)
                for batch in BATCHES:
                    reference, seconds = theirs(subject, folder / layout, layout, int(shots), batch)
                    other[batch].append(seconds)
                    for metric in ("acc", "acc_norm"):
                        differ = sum(a != b for a, b in zip(answers[metric], reference[metric], strict=True))
                        assert not differ, f"{layout} {metric}, batch {batch}: {differ} questions differ"
            medians = {batch: statistics.median(times) for batch, times in other.items()}
            best = min(medians, key=lambda batch: medians[batch])
            seconds = statistics.median(mine)
            share = sum(answers["acc"]) / len(answers["acc"])
            print(
                f"{layout}: {count} questions, {shots} examples, the same answers (acc {share:.3f}); "
                f"ours {seconds:.2f} s, lm-eval {medians[best]:.2f} s (batch {best}): "
                f"{medians[best] / seconds:.1f} times as fast"
            )


if __name__ == "__main__":
    main()
