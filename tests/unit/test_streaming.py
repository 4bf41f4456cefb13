"""Files written tensor by tensor are those of safetensors, to the byte."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from piflow_dist.checkpoint.files import CheckpointError
from piflow_dist.checkpoint.streaming import TensorFile, new_folder

TENSORS = {
    "b": torch.randn(3, 5),
    "a": torch.randn(7).bfloat16(),
    "count": torch.tensor(3),
    "scale": torch.tensor(2.0),
    "é": torch.randn(0),
    "half": torch.randn(2).half(),
    "bytes": torch.arange(3, dtype=torch.uint8),
    "double": torch.randn(2).double(),
    "int": torch.arange(3, dtype=torch.int32),
}
SPECS = {name: (value.dtype, tuple(value.shape)) for name, value in TENSORS.items()}


def test_bytes_are_those_of_safetensors_in_any_order_of_writing(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "theirs", {"policy": '{"type": "π"}'})
    with TensorFile(tmp_path / "ours", SPECS, {"policy": '{"type": "π"}'}) as file:
        for name in reversed(TENSORS):
            file.write(name, TENSORS[name])
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_views_and_other_types_are_converted(tmp_path: Path) -> None:
    whole = torch.randn(4, 6)
    with TensorFile(tmp_path / "ours", {"x": (torch.bfloat16, (6, 2))}) as file:
        file.write("x", whole.T[:, 1:3])
    save_file({"x": whole.T[:, 1:3].contiguous().bfloat16()}, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_another_shape_than_laid_out_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="laid out for"), TensorFile(tmp_path / "x", SPECS) as file:
        file.write("b", torch.zeros(5, 3))


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No space left"), new_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("x")
        assert not (tmp_path / "out").exists()
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "out") as folder:
        (folder / "whole").write_text("x")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "whole"]
