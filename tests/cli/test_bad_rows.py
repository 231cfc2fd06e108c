"""A row that the chat template can't write ends a stage, and a preview of it, with the row's file and line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


@pytest.mark.parametrize("command", [("sft",), ("preview", "sft"), ("preview", "sft", "--stats")])
def test_file_and_line(command: tuple[str, ...], made: Path, tmp_path: Path, warm: Any) -> None:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    said = [("user", "ka"), ("assistant", "lo")]
    rows = [said, said, [*said, ("tool", "ru"), ("assistant", "mi")], said]
    lines = [json.dumps({"messages": [{"role": role, "content": text} for role, text in row]}) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    sft = f"  sft: {{data: rows.jsonl, held_out: 0, chat_template: {json.dumps(TEMPLATE)}}}\n"
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(recipe.read_text() + sft)
    failed = warm(command[0], recipe, *command[1:])
    assert failed.code == 1, failed.stderr
    assert f"{tmp_path}/rows.jsonl:3 (" in failed.stderr
    assert "cannot render the roles user assistant tool" in failed.stderr
    assert ": no tools here" in failed.stderr
    assert "Traceback" not in failed.stderr
