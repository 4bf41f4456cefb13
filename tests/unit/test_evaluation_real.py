"""evaluation/real.py: statistics of real images on a disk that several evaluations write to."""

import os
from pathlib import Path

import pytest
import torch

from piflow_dist.evaluation import real
from piflow_dist.evaluation.real import CPU, Moments, RealStatistics
from piflow_dist.evaluation.samples import EvaluationError


def test_evaluations_that_share_a_cache_do_not_write_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features_ND = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    statistics = RealStatistics("network", "title", "content", Moments.of(features_ND, CPU), features_ND, None)
    save_file, partials, pid = real.save_file, [], os.getpid()

    def save(tensors: dict, path: Path, metadata: dict) -> None:
        partials.append(path)
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(real, "save_file", save)
    for node, number in (("a", pid), ("a", pid + 1), ("b", pid)):
        monkeypatch.setattr("platform.node", lambda node=node: node)
        monkeypatch.setattr("os.getpid", lambda number=number: number)
        statistics.save(tmp_path / "real.safetensors")
    assert len(set(partials)) == 3 and [path.name for path in tmp_path.iterdir()] == ["real.safetensors"]
    assert torch.equal(RealStatistics.load(tmp_path / "real.safetensors").features_ND, features_ND)
    (tmp_path / "taken").mkdir()
    with pytest.raises(EvaluationError, match="taken cannot be written"):
        statistics.save(tmp_path / "taken")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["real.safetensors", "taken"]
