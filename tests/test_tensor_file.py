"""A safetensors file written in pieces has the bytes of one that safetensors writes of the whole."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.tensor_file import DTYPES, Piece, layout, write_pieces


def tensors() -> dict[str, torch.Tensor]:
    """Every dtype, sizes that do not divide by eight, names that JSON writes otherwise, no rows, no axes."""
    draw = torch.Generator().manual_seed(0)
    found = {f"x{place}": torch.arange(3).to(dtype) for place, dtype in enumerate(DTYPES)}
    found |= {"m.weight": torch.randn(5, 2, generator=draw), "b": torch.randn(7, 3, generator=draw).bfloat16()}
    return found | {'a."q"': torch.tensor(3.0), "é": torch.randn(2, 2, generator=draw), "none": torch.zeros(0, 4)}


@pytest.mark.parametrize("writers", [1, 2, 3])
def test_it_has_the_bytes_that_safetensors_writes(tmp_path: Path, writers: int) -> None:
    """Whatever the writers are, and whoever comes first: the last rows here, the header last of all."""
    given = tensors()
    save_file(given, tmp_path / "theirs")
    plan = layout({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in given.items()})
    for writer in reversed(range(writers)):
        pieces = []
        for name, tensor in given.items():
            parts = tensor.reshape(-1).tensor_split(writers)
            pieces.append(Piece(name, parts[writer], sum(len(part) for part in parts[:writer])))
        write_pieces(tmp_path / "ours", plan, pieces, with_header=writer == 0)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert (tmp_path / "ours").stat().st_size == plan.size


def test_what_is_not_contiguous_is_written_in_row_major_order(tmp_path: Path) -> None:
    turned = torch.arange(12.0).reshape(3, 4).T
    save_file({"turned": turned.contiguous()}, tmp_path / "theirs")
    plan = layout({"turned": (turned.dtype, tuple(turned.shape))})
    write_pieces(tmp_path / "ours", plan, [Piece("turned", turned)], with_header=True)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_write_that_takes_a_part_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.tensor_file.AT_ONCE", 5)
    given = {"a": torch.arange(11)}
    save_file(given, tmp_path / "theirs")
    write_pieces(tmp_path / "ours", layout({"a": (torch.int64, (11,))}), [Piece("a", given["a"])], with_header=True)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
