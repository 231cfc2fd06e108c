"""The graph as it is drawn: a layer for each distance, implied lines left out, many like stages in one box."""

from pathlib import Path

from pipeline.artifacts import Store
from pipeline.report.layout import BOX, boxes_of, lay_out
from pipeline.report.records import read_run
from tests.report.written_run import write_stage


def test_layers_and_lines(root: Path):
    stages = read_run(Store(root), "demo").stages
    wide, tall = (lay_out(stages, is_upright=upright) for upright in (False, True))
    columns = {box.stages[0]: round(x) for box, x, _ in wide.boxes}
    step = columns["pretrain"]
    assert columns == {
        "tokenize": 0,
        "pretrain": step,
        "sft": 2 * step,
        "ppo": 3 * step,
        "dpo": 3 * step,
        "eval": 4 * step,
    }
    assert [len(drawn.edges) for drawn in (wide, tall)] == [6, 6]  # eval comes of sft too, by way of ppo and dpo
    rows = {box.stages[0]: round(y) for box, _, y in tall.boxes}
    assert rows["ppo"] == rows["dpo"] > rows["sft"] > rows["pretrain"] > rows["tokenize"] == 0
    for drawn in (wide, tall):
        places = [(x, y) for _, x, y in drawn.boxes]
        assert all(0 <= x <= drawn.width - BOX[0] and 0 <= y <= drawn.height - BOX[1] for x, y in places)
        apart = [abs(a - c) >= BOX[0] or abs(b - d) >= BOX[1] for i, (a, b) in enumerate(places) for c, d in places[:i]]
        assert all(apart)


def test_many_like_stages_are_one_box(tmp_path: Path):
    root = tmp_path / "artifacts"
    write_stage(root, "sft")
    for seed in range(4):
        write_stage(root, f"dpo@seed={seed}", type_="dpo", inputs={"init": ["demo/sft"]})
    write_stage(root, "eval", kind="evaluation", inputs={"models": [f"demo/dpo@seed={seed}" for seed in range(4)]})
    boxes = {box.stages for box in boxes_of(read_run(Store(root), "demo").stages)}
    assert boxes == {("sft",), tuple(f"dpo@seed={seed}" for seed in range(4)), ("eval",)}


def test_few_like_stages_are_one_box_where_it_is_crowded(tmp_path: Path):
    """Four losses of three seeds are four boxes; two losses of three are six, and fit."""
    for names in (("dpo", "ipo", "kto", "simpo"), ("dpo", "ipo")):
        root = tmp_path / str(len(names))
        write_stage(root, "sft")
        models = [f"{name}@seed={seed}" for name in names for seed in range(3)]
        for model in models:
            write_stage(root, model, type_="dpo", inputs={"init": ["demo/sft"]})
        write_stage(root, "eval", kind="evaluation", inputs={"models": [f"demo/{model}" for model in models]})
        drawn = lay_out(read_run(Store(root), "demo").stages, is_upright=True)
        inner = [box.stages for box, _, _ in drawn.boxes][1:-1]
        alike = [tuple(f"{name}@seed={seed}" for seed in range(3)) for name in names]
        assert inner == (alike if len(names) == 4 else [(model,) for model in models])


def test_a_line_over_a_layer_passes_beside_its_boxes(tmp_path: Path):
    root = tmp_path / "artifacts"
    write_stage(root, "a")
    write_stage(root, "b", inputs={"init": ["demo/a"]})
    write_stage(root, "c", inputs={"init": ["demo/a"]})
    write_stage(root, "d", inputs={"init": ["demo/b"]})
    write_stage(root, "e", inputs={"models": ["demo/d", "demo/c"]})
    drawn = lay_out(read_run(Store(root), "demo").stages, is_upright=False)
    assert len(drawn.edges) == 5 + 2  # of c to e two pieces and the way past d between them
    assert drawn.height == 2 * BOX[1] + 16
