"""`llmpipe init`: what is looked at, what is written, and that it runs as it is."""

import json
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline.cli.init import init
from pipeline.cli.init_recipe import Asked, Found, Stages, shown_path
from pipeline.cli.init_sizing import _steps
from pipeline.data.looking import Rows, look_at_rows, look_at_text
from pipeline.errors import ConfigError, DataError
from pipeline.hardware import Device
from pipeline.runtime import check_batch, share_batch
from tests.conftest import invented_text
from tests.stages.conftest import make_model

ROWS = 60


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def said(number: int) -> str:
    return f"{number} {invented_text(1000 + number, 4)}"


def corpus(folder: Path) -> None:
    """120 texts, and as many chats and preferences as `ROWS` below the same folder."""
    (folder / "texts").mkdir()
    for number in range(120):
        (folder / "texts" / f"{number}.txt").write_text(invented_text(number, 150))
    chats = [{"prompt": said(n), "completion": invented_text(2000 + n, 6)} for n in range(ROWS)]
    pairs = [
        {"prompt": said(n), "chosen": invented_text(2000 + n, 6), "rejected": invented_text(3000 + n, 3)}
        for n in range(ROWS)
    ]
    written(folder / "texts" / "chats.jsonl", chats)
    written(folder / "preferences.jsonl", pairs)


def test_text_is_counted_by_its_bytes_and_letters(tmp_path: Path):
    (tmp_path / "a.txt").write_text("abc привет")  # 4 + 12 bytes; 3 latin letters, 6 cyrillic
    (tmp_path / "b.md").write_text("xyz")
    written(tmp_path / "c.jsonl", [{"content": "abcdef"}, {"content": ""}])
    found = look_at_text([str(tmp_path)])
    assert (found.bytes, found.documents, found.is_guessed) == (16 + 3 + 6, 4 - 1, False)
    assert found.kinds == {".txt": 1, ".md": 1, ".jsonl": 1}
    assert found.scripts == {"Latin": 12 / 18, "Cyrillic": 6 / 18}
    assert found.text_field == "content"


def test_rows_are_counted_by_their_sides(tmp_path: Path):
    path = written(tmp_path / "p.jsonl", [{"prompt": "four", "chosen": "éé", "rejected": "a"}])
    found = look_at_rows(str(path), "preference")
    assert (found.format, found.prompts, found.answers) == ("preference", [4], [4])


def test_what_cannot_be_read_is_named_by_file_and_line(tmp_path: Path):
    path = tmp_path / "chats.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    with pytest.raises(DataError) as caught:
        look_at_rows(str(path), "messages")
    assert caught.value.where == f"{path}:2"
    with pytest.raises(ConfigError, match="prompt_completion rows, no documents") as wrong:
        look_at_text([str(path)])
    assert wrong.value.where == f"{path}:1"
    assert wrong.value.mend.startswith("--chats")
    (tmp_path / "bad.txt").write_bytes(b"good\n\xff")
    with pytest.raises(DataError, match="line 2"):
        look_at_text([str(tmp_path / "bad.txt")])


@pytest.mark.slow
def test_the_recipe_runs_as_it_is_written(warm: Any):
    """All seven stages, from text, chats that lie in the same folder, and preferences."""
    corpus(warm.folder)
    options = ("--data", "texts", "--chats", "texts/chats.jsonl", "--preferences", "preferences.jsonl")
    done = warm("init", *options, "--hours", "0.003")
    assert done.code == 0, done.stderr
    assert "next: llmpipe run" in done.stdout
    text = (warm.folder / "recipe.yaml").read_text()
    values = YAML(typ="safe").load(text)
    assert [*values["stages"]] == ["tokenize", "pretrain", "sft", "reward", "dpo", "ppo", "eval"]
    assert "./texts/chats.jsonl" not in values["stages"]["tokenize"]["data"]
    assert values["stages"]["sft"]["data"] == ["./texts/chats.jsonl"]
    assert f"{ROWS} prompt_completion rows" in text
    ran = warm("run", "recipe.yaml", "--json")
    assert ran.code == 0, ran.stderr
    assert [stage["stage"] for stage in json.loads(ran.stdout)["stages"]] == [*values["stages"]]

    again = warm("init", *options)
    assert again.code == 2
    assert "there is a recipe already" in again.stderr
    assert (warm.folder / "recipe.yaml").read_text() == text


@pytest.mark.slow
def test_a_base_is_tuned_and_taught_text_only_where_there_is_some(warm: Any):
    corpus(warm.folder)
    make_model(warm.folder)
    tuned = warm("init", "--base", "./model", "--chats", "texts/chats.jsonl", "--hours", "0.002", "--json")
    assert tuned.code == 0, tuned.stderr
    stages = json.loads(tuned.stdout)["stages"]
    assert [*stages] == ["sft", "eval"]
    assert stages["sft"]["init"] == str(warm.folder / "model")
    ran = warm("run", "recipe.yaml", "--json")
    assert ran.code == 0, ran.stderr

    rows = ("--preferences", "preferences.jsonl", "--chats", "texts/chats.jsonl")
    more = ("--base", "./model", "--data", "texts", *rows)
    done = warm("init", *more, "--hours", "0.002", "--out", "more.yaml")
    assert done.code == 0, done.stderr
    stages = YAML(typ="safe").load((warm.folder / "more.yaml").read_text())["stages"]
    assert stages["tokenize"]["tokenizer"] == stages["pretrain"]["init"] == "./model"
    ran = warm("run", "more.yaml", "--until", "sft", "--json")
    assert ran.code == 0, ran.stderr


@pytest.mark.slow
def test_lone_answers_are_learnt_from_and_their_prompts_evaluated_on(warm: Any):
    make_model(warm.folder)
    rows = [{"prompt": said(n), "completion": invented_text(2000 + n, 6), "label": n % 2 == 0} for n in range(ROWS)]
    written(warm.folder / "kto.jsonl", rows)
    done = warm("init", "--base", "./model", "--preferences", "kto.jsonl", "--hours", "0.002", "--json")
    assert done.code == 0, done.stderr
    shown = json.loads(done.stdout)
    assert [*shown["stages"]] == ["dpo", "eval"]
    assert shown["stages"]["dpo"]["objective"] == "kto"
    assert shown["stages"]["eval"]["data"] == [str(warm.folder / "kto.jsonl")]
    ran = warm("run", shown["recipe"], "--json")
    assert ran.code == 0, ran.stderr
    (results,) = (warm.folder / "artifacts").glob("*/eval/results.jsonl")
    measured = {(row["model"], row["task"]) for row in map(json.loads, results.read_text().splitlines())}
    assert ("dpo", "greedy") in measured


@pytest.mark.slow
def test_what_is_refused(warm: Any):
    for options, words in (
        ((), "neither --data nor --base"),
        (("--base", "./model"), "nothing to teach the base"),
        (("--data", "nowhere"), "nothing there"),
        (("--data", ".", "--hours", "0"), "a number above 0"),
        (("--data", ".", "--hours", "nan"), "a number above 0"),
        (("--data", ".", "--hours", "inf"), "a number above 0"),
        (("--data", ".", "--out", ".", "--force"), "a folder is there"),
        (("--data", ".", "--out", "t.txt/recipe.yaml"), "t.txt is a file, no folder"),
    ):
        warm.write("t.txt", "a")
        done = warm("init", *options)
        assert done.code == 2, done.stderr
        assert words in done.stderr
        assert "mend: " in done.stderr


def asked(**named: Any) -> Asked:
    rest: dict[str, Any] = {"data": None, "chats": None, "preferences": None, "base": None}
    return Asked(**rest | {"hours": 1.0, "out": Path("/w/recipe.yaml"), "artifacts": Path("/w/artifacts")} | named)


def test_the_run_is_named_after_what_it_learns_from():
    assert asked(data=Path("/w/my texts"), base="./model").run == "my-texts"
    assert asked(base="demo/sft", chats=Path("/w/chats.jsonl")).run == "demo-sft"
    assert asked(base="hub:org/name@main").run == "org-name"
    assert asked(base="/w/model").run == "model"
    assert asked(data=Path("/w/データ"), base="/w/model").run == "model"
    assert asked(data=Path("/w/texts"), out=Path("/w/tuned.yaml")).run == "tuned"


def sized(rows: int, accumulated: int, paid: float) -> dict[str, Any]:
    stages = Stages({"dpo": {"per_device_train_batch_size": rows, "max_steps": 100}})
    if accumulated > 1:
        stages.set("dpo", "gradient_accumulation_steps", accumulated)
    held = Rows("preference", [1] * 1000, [1] * 1000, [0.5] * 1000)
    _steps(stages, "dpo", Found([], None, None, held, None, 3.5, 1000), paid)
    return stages.values["dpo"]


def test_few_steps_are_of_few_rows_however_they_are_cut():
    """32 rows paid for: eight steps of four, whether sixteen fit at once or two."""
    assert sized(16, 1, 0.02) == {"per_device_train_batch_size": 4, "max_steps": 8}
    small = {"per_device_train_batch_size": 2, "max_steps": 8, "gradient_accumulation_steps": 2}
    assert sized(2, 8, 0.02) == small
    assert sized(2, 8, 0.4)["max_steps"] == 40  # 640 rows of 16: steps enough


@pytest.mark.slow
@pytest.mark.parametrize("gpus", [3, 5, 6, 7, 8])
def test_every_batch_is_one_that_the_gpus_share(gpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of 60 rows and a small text a step has few rows: eight GPUs need eight of them."""
    corpus(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    device = Device("a GPU", "cuda", gpus, 2.0**36, 1e12, bf16=False)
    monkeypatch.setattr("pipeline.hardware.measure_device", lambda *given, **named: device)
    named = {"data": "texts", "chats": "texts/chats.jsonl", "preferences": "preferences.jsonl", "out": "recipe.yaml"}
    given = asked(**{name: tmp_path / path for name, path in named.items()}, hours=0.01, artifacts=tmp_path / "made")
    init(given, force=False, as_json=True)
    stages = YAML(typ="safe").load((tmp_path / "recipe.yaml").read_text())["stages"]
    for name in ("pretrain", "sft", "reward", "dpo"):
        share_batch(stages[name]["per_device_train_batch_size"], 1, gpus, name)
    check_batch(stages["ppo"]["batch_size"], 1, 1, gpus, "ppo")


@pytest.mark.slow
def test_a_word_is_refused_and_a_page_runs(warm: Any):
    """Of a page fewer tokens can be made than of the whole sample, as its last tenth is held out."""
    (warm.folder / "texts").mkdir()
    (warm.folder / "texts" / "a.txt").write_text("Hello world.\n")
    refused = warm("init", "--data", "texts", "--hours", "0.01")
    assert refused.code == 1
    assert "text: 13 bytes in 1 .txt" in refused.stderr
    assert "tokens of text, and a sample has 128" in refused.stderr
    assert not (warm.folder / "recipe.yaml").exists()
    (warm.folder / "texts" / "a.txt").write_text(invented_text(0, 300))
    done = warm("init", "--data", "texts", "--hours", "0.003")
    assert done.code == 0, done.stderr
    ran = warm("run", "recipe.yaml", "--json")
    assert ran.code == 0, ran.stderr


def test_paths_are_written_from_the_recipe():
    assert shown_path("/w/a/texts", Path("/w/a")) == "./texts"
    assert shown_path("/w/texts", Path("/w/a")) == "../texts"
    assert shown_path("/far/texts", Path("/w/a")) == "/far/texts"
    assert shown_path("hub:org/name", Path("/w/a")) == "hub:org/name"


@pytest.mark.slow
def test_a_folder_beside_and_a_name_with_blanks(warm: Any):
    """`../texts` is written as it was named, the command that is next can be pasted, and one text is one."""
    here = warm.folder / "my work"
    for folder in (here, warm.folder / "texts"):
        folder.mkdir()
    (warm.folder / "texts" / "a.txt").write_text("".join(invented_text(n, 150) for n in range(60)))
    warm.folder = here
    done = warm("init", "--data", "../texts", "--hours", "0.002")
    assert done.code == 0, done.stderr
    assert f"next: llmpipe run '{here}/recipe.yaml'" in done.stdout
    text = (here / "recipe.yaml").read_text()
    values = YAML(typ="safe").load(text)
    assert values["stages"]["tokenize"]["data"] == ["../texts"]
    assert values["run"] == "texts"
    assert "(1 document)" in text
