"""tracking.probe_every: distances of the policy's end points, and a training that does not know of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import STUDENT, read_weights, run_tool
from torch import Tensor
from torch.testing import assert_close

from piflow_dist.build import probe_batch
from piflow_dist.checkpoint.files import newest_complete
from piflow_dist.config import (
    Config,
    DataConfig,
    DistillConfig,
    GuidanceConfig,
    PolicyConfig,
    ScheduleConfig,
    TrackingConfig,
    read_config,
)
from piflow_dist.distill import probe
from piflow_dist.distill.objectives import Batch, build_schedule
from piflow_dist.tracking.tracker import METRICS, read_metrics


def test_a_probed_training_is_the_same_to_the_bit(student_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    run_dir, teacher = tmp_path / "run", read_config(student_run / "config.yaml").distill.teacher
    options = [f"data.root={tiny_data}", f"distill.teacher={teacher}", f"run_dir={run_dir}"]
    done = run_tool("launch", *STUDENT, *options, "tracking.probe_every=2", "tracking.enabled=false")
    assert done.returncode == 0, done.stdout
    found, wanted = read_metrics(run_dir / METRICS), read_metrics(student_run / METRICS)
    for key in ("step", "loss", "grad_norm"):
        assert [row[key] for row in found] == [row[key] for row in wanted]
    probed = [row["step"] for row in found if "probe/end_point" in row]
    assert probed == [2, 4]
    assert all(0 < row[f"probe/segment_{i}"] < 10 for row in found if row["step"] in probed for i in (1, 2, 3, 4))
    weights, others = (read_weights(newest_complete(run / "checkpoints")[0]) for run in (run_dir, student_run))
    assert all(torch.equal(weights[name], others[name]) for name in others)


def test_the_probes_images_are_the_same_on_any_number_of_ranks(tiny_data: Path) -> None:
    config = Config(
        run_dir="unused",
        distill=DistillConfig(teacher="unused"),
        data=DataConfig(root=str(tiny_data)),
        tracking=TrackingConfig(probe_images=5),
    )

    def images(dp_size: int) -> tuple[Tensor, Tensor]:
        """Noises and prompts of all ranks that count, one after another."""
        shares = []
        for dp_rank in range(dp_size):
            place = SimpleNamespace(dp_rank=dp_rank, dp_size=dp_size, device=torch.device("cpu"))
            shares.append(probe_batch(config, place, torch.zeros(1, 64), (16, 4, 4)))
        assert len({len(counts_B) for _, counts_B in shares}) == 1
        chosen = [(batch.x0_BCHW[counts_B > 0], batch.text_BLD[counts_B > 0]) for batch, counts_B in shares]
        return tuple(torch.cat(parts) for parts in zip(*chosen, strict=True))

    noise_BCHW, text_BLD = images(1)
    assert len(noise_BCHW) == len(text_BLD) == 5 and len(noise_BCHW.unique(dim=0)) == 5
    for dp_size in (2, 3, 8):
        assert all(torch.equal(a, b) for a, b in zip(images(dp_size), (noise_BCHW, text_BLD), strict=True))


class Straight:
    """A network that answers with one velocity everywhere, and a trained model that does."""

    def __init__(self, answer):  # noqa: ANN001
        self.answer = answer

    def __call__(self, x_BCHW: Tensor, *_: Tensor | None):  # noqa: ANN204
        return self.answer(x_BCHW)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        torch.rand(3)  # as dropout would
        yield


@pytest.mark.parametrize(("factor", "distance"), [(1.0, 0.0), (0.0, 1.0), (1.5, 0.5)])
def test_distances_are_relative_to_the_teachers_way(
    factor: float, distance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher of velocity v: a student of the same is there, one that stays is as far as the teacher went."""
    monkeypatch.setattr(probe, "dist", SimpleNamespace(all_reduce=lambda tensor: None))
    config = Config(
        run_dir="unused",
        schedule=ScheduleConfig(shift=2.0),
        policy=PolicyConfig(type="dx", num_nodes=3),
        distill=DistillConfig(teacher="unused", guidance=GuidanceConfig(scale=1.0)),
        data=DataConfig(root="unused"),
    )
    v_CHW = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(1))
    noise_BCHW = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(2))
    batch = Batch(noise_BCHW, torch.zeros(2, 4, 2), torch.ones(2, 4, dtype=torch.bool), torch.zeros(1, 2))
    student = Straight(lambda x: {"out": factor * v_CHW.expand(len(x), 3, 3, 2, 2)})
    teacher = Straight(lambda x: v_CHW.expand_as(x))
    state = torch.random.get_rng_state()
    values = probe.PolicyProbe(config, build_schedule(config.schedule, (3, 2, 2)), student, teacher, batch).measure()
    assert torch.equal(torch.random.get_rng_state(), state)
    for name in ("segment_1", "segment_2", "segment_3", "segment_4", "end_point"):
        assert_close(values[f"probe/{name}"], distance, rtol=1e-3, atol=1e-4)
