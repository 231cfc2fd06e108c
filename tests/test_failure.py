"""What is noted of a stage's end, and told as what the machine lacks."""

from pathlib import Path

import pytest
from safetensors import SafetensorError

from pipeline.errors import MachineError, Stopped, TrainingError
from pipeline.failure import noted, read

DISK = "No space left on device"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(28, DISK), f"the disk is full: [Errno 28] {DISK}"),
        (OSError(27, "File too large"), "the disk is full: [Errno 27] File too large"),
        (SafetensorError(f"I/O error: {DISK} (os error 28)"), f"the disk is full: I/O error: {DISK} (os error 28)"),
        (RuntimeError("CUDA out of memory. Tried\nand more"), "out of memory: CUDA out of memory. Tried"),
        (RuntimeError("[x] DefaultCPUAllocator: can't allocate memory: 8"), "out of memory: [x] Default"),
        (MemoryError(), "out of memory: MemoryError"),
    ],
)
def test_a_full_disk_or_memory_is_told_as_that(tmp_path: Path, error: Exception, told: str) -> None:
    with pytest.raises(MachineError) as caught, noted(tmp_path):
        raise error
    assert caught.value.what.startswith(told)
    assert "\n" not in caught.value.what
    found = read(tmp_path)
    assert found is not None
    assert found.line.startswith(told)


@pytest.mark.parametrize("error", [OSError(2, "No such file"), ValueError("no"), TrainingError("the loss is nan")])
def test_other_ends_are_left_as_they_are(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, noted(tmp_path):
        raise error
    assert caught.value is error
    assert str(error) in str(read(tmp_path))


def test_to_be_stopped_is_no_failure(tmp_path: Path) -> None:
    with pytest.raises(Stopped), noted(tmp_path):
        raise Stopped("stopped")
    assert read(tmp_path) is None
