"""Rows with tools through `llmpipe`: trained on, previewed, surveyed; a template without tools, by file and line."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tool_rows import HERMES, ROW

SFT = "  sft: {{data: rows.jsonl, held_out: 0, max_steps: 2, max_length: 4096, bf16: false{}}}\n"


@pytest.fixture
def recipe(trained: Path) -> Path:
    plain = {"messages": [{"role": "user", "content": "ka"}, {"role": "assistant", "content": "lo"}]}
    (trained.parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (plain, plain, ROW, plain)))
    return trained


@pytest.mark.slow
def test_a_template_with_tools(recipe: Path, warm: Any) -> None:
    recipe.write_text(recipe.read_text() + SFT.format(f", chat_template: {json.dumps(HERMES)}"))
    shown = warm("preview", recipe, "sft", "--json")
    assert shown.code == 0, shown.stderr
    row = json.loads(shown.stdout)[2]
    said = "".join(text for text, is_trained in zip(row["tokens"], row["is_trained"], strict=True) if is_trained)
    assert said.startswith('<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>\n<tool_call>')
    assert said.endswith("Yes.<|im_end|>At your service.<|im_end|>")
    assert "<tool_response>" not in said
    survey = warm("preview", recipe, "sft", "--stats")
    assert survey.code == 0, survey.stderr
    assert "tool" in survey.stdout
    ran = warm("sft", recipe)
    assert ran.code == 0, ran.stderr
    made = recipe.parent / "artifacts/tiny/sft"
    assert (made / "model/chat_template.jinja").read_text() == HERMES
    assert json.loads((made / "manifest.json").read_text())["tokens"] > 0


@pytest.mark.slow
def test_a_template_without_tools_is_an_error_at_the_rows_line(recipe: Path, warm: Any) -> None:
    recipe.write_text(recipe.read_text() + SFT.format(""))
    for command in (("sft",), ("preview", "sft")):
        failed = warm(command[0], recipe, *command[1:])
        assert failed.code == 1
        assert f"{recipe.parent}/rows.jsonl:3 (" in failed.stderr
        assert "the chat template does not write the tool `weather`" in failed.stderr
        assert "a tokenizer whose chat template writes tools" in failed.stderr
