"""Building and loading a model of 0.3 billion parameters: no rank ever holds much more than its own share of it."""

import dataclasses
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import save_file

from piflow_dist.config import Config, load_config

WORLD, TP = 4, 2
OPTIONS = (
    "model=qwen_image_300m",
    "data.root=x",
    "run_dir=x",
    "lora.rank=64",
    "train.dtype=bf16",
    f"launch.processes={WORLD}",
    f"parallel.tp={TP}",
)


class AnonymousMemory:
    """Peak of this process's anonymous memory, above what it is now; sampled by a thread."""

    def __enter__(self) -> "AnonymousMemory":
        self.start = self.peak = anonymous_bytes()
        self.running = True
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def watch(self) -> None:
        while self.running:
            self.peak = max(self.peak, anonymous_bytes())
            time.sleep(0.002)

    def __exit__(self, *error: object) -> None:
        self.running = False
        self.thread.join()
        self.kept = anonymous_bytes() - self.start

    @property
    def growth(self) -> int:
        return self.peak - self.start


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def load_teacher(config: Config, topology) -> torch.nn.Module:
    from piflow_dist.models.architecture import plan_model
    from piflow_dist.models.pretrained import open_teacher
    from piflow_dist.parallel.zero import FrozenModel

    return FrozenModel(plan_model(config.model), open_teacher(config), topology, config.parallel, config.train.dtype)


def load_tied(config: Config, topology) -> torch.nn.Module:
    return load_student(config, topology)


def load_full(config: Config, topology) -> torch.nn.Module:
    return load_student(dataclasses.replace(config, mode="full"), topology)


def load_student(config: Config, topology) -> torch.nn.Module:
    from piflow_dist.models.pretrained import plan_training
    from piflow_dist.parallel.zero import TrainedModel

    return TrainedModel(*plan_training(config), topology, config.optim, config.parallel, config.train.dtype)


def measure(rank: int, load, folder: Path) -> dict[str, int]:
    from piflow_dist.parallel.groups import start_groups
    from piflow_dist.parallel.tensor import split_layers  # noqa: F401  (imports are not counted)
    from piflow_dist.parallel.topology import Topology
    from piflow_dist.parallel.zero import TrainedModel, import_deepspeed

    start_groups(TP, timedelta(seconds=600))
    topology = Topology(rank, WORLD, rank, torch.device("cpu"), TP)
    import_deepspeed(topology.device)
    torch.ones(8, requires_grad=True).sum().backward()
    config = load_config([*OPTIONS, "mode=tied", f"distill.teacher={folder}"])
    with AnonymousMemory() as memory:
        model = load(config, topology)
    parameters = list(model.engine.module.parameters())
    share = sum(p.ds_tensor.numel() * p.ds_tensor.element_size() for p in parameters)
    trained = 0
    if isinstance(model, TrainedModel):  # fp32 masters, and the buffer in which gradients add up
        kept = [*model.masters, model.optimizer.grad_partitions_flat_buffer]
        trained = sum(tensor.numel() * tensor.element_size() for tensor in kept)
    whole = sum(p.ds_numel for p in parameters)
    return {"share": share, "trained": trained, "peak": memory.growth, "kept": memory.kept, "slice": whole}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in diffusers' layout, bf16, written block by block."""
    import json

    from piflow_dist.models.architecture import plan_model
    from piflow_dist.models.pretrained import INDEX

    folder = tmp_path_factory.mktemp("base") / "transformer"
    folder.mkdir()
    weight_map: dict[str, str] = {}
    files: dict[str, dict[str, torch.Tensor]] = {}
    model = plan_model(load_config([*OPTIONS, "objective=flow_matching"]).model)
    for name, parameter in model.named_parameters():
        file = f"part-{name.split('.')[1] if name.startswith('transformer_blocks') else 'rest'}.safetensors"
        theirs = name.removeprefix("head.")
        weight_map[theirs] = file
        files.setdefault(file, {})[theirs] = torch.full(parameter.shape, 0.01, dtype=torch.bfloat16)
    for file, tensors in files.items():
        save_file(tensors, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("load", [load_teacher, load_tied, load_full])
def test_peak_of_loading(teacher: Path, load) -> None:
    for measured in run_ranks(measure, WORLD, load, teacher, time_limit=300, warm=False):
        print({key: round(value / 2**20) for key, value in measured.items()})
        assert measured["peak"] <= 1.6 * (measured["share"] + measured["trained"]), measured
