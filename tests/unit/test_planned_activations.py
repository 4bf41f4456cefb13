"""Planned activations against what torch's allocator hands out while the real step of a reduced model runs on the CPU."""

from typing import Any

import pytest
import torch
from torch import Tensor

from piflow_dist.config import Config, load_config
from piflow_dist.distill.objectives import (
    Batch,
    build_schedule,
    flow_matching_step,
    imitation_data_step,
    imitation_datafree_step,
)
from piflow_dist.models.architecture import plan_model, shape_tied
from piflow_dist.models.qwen_image import QwenImage
from piflow_dist.parallel.dryrun import drop_gradient, fake_world, trace_step

LATENT, TEXT_LENGTH, IMAGES = (32, 32), 24, 2
REDUCED = (
    "model=qwen_image_300m",
    "model.num_layers=4",
    "model.num_attention_heads=4",
    "model.attention_head_dim=32",
    "model.axes_dims_rope=[8,12,12]",
    "model.joint_attention_dim=64",
    "policy.logstd_inner_dim=32",
    "lora.rank=16",
    f"train.batch_size={IMAGES}",
    "data.root=x",
    "run_dir=x",
)
STUDENT = ("distill.teacher=x",)
CASES = {
    "gm, tied": (*STUDENT, "mode=tied"),
    "gm, tied, recomputed": (*STUDENT, "mode=tied", "parallel.recompute_every=1"),
    "gm, tied, bf16, data-free": (
        *STUDENT,
        "mode=tied",
        "train.dtype=bf16",
        "objective=imitation_datafree",
        "distill.nfe=2",
    ),
    "gm, full, every second recomputed": (*STUDENT, "mode=full", "parallel.recompute_every=2"),
    "gm, full, mixed, 4 states": (
        *STUDENT,
        "mode=full",
        "distill.num_decay_iters=9",
        "distill.num_intermediate_states=4",
    ),
    "dx, full, unguided": (*STUDENT, "mode=full", "policy=dx", "distill.guidance.scale=1"),
    "dx, tied, recomputed, one state at a time": (
        *STUDENT,
        "mode=tied",
        "policy=dx_poly",
        "parallel.recompute_every=1",
        "distill.stack_teacher_states=false",
    ),
    "teacher": ("objective=flow_matching",),
}


class Allocations:
    """Bytes that torch's CPU allocator has handed out and not got back, from its own events."""

    def __enter__(self) -> "Allocations":
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self.profiler.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.profiler.__exit__(*error)
        events = sorted(
            (event.start_ns(), event.nbytes())
            for event in self.profiler.profiler.kineto_results.events()
            if event.name() == "[memory]"
        )
        self.peak = live = 0
        for _, size in events:
            live += size
            self.peak = max(self.peak, live)


class Network:
    """A plain module as the objectives' student. kept: bytes of what its pass saves, less the weights."""

    def __init__(self, module: QwenImage):
        self.module, self.kept = module, 0
        self.weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}

    def __call__(self, *inputs: Tensor | None) -> Any:
        saved: dict[int, int] = {}

        def save(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.weights:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            outputs = self.module(*inputs)
        self.kept = max(self.kept, sum(saved.values()))
        return outputs

    def backward(self, loss: Tensor) -> None:
        loss.backward()


def filled(module: QwenImage, dtype: torch.dtype) -> QwenImage:
    module = module.to_empty(device="cpu").to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.02)
    return module


def measured(config: Config) -> tuple[int, int]:
    """(most bytes at once, bytes saved by the student's pass) of one micro-batch in plain torch."""
    torch.manual_seed(0)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.train.dtype]
    if config.mode == "tied":
        module = filled(shape_tied(config.model, config.policy, config.lora), dtype)
    else:
        module = filled(plan_model(config.model, config.policy if config.distils else None), dtype)
    module.recompute_every = config.parallel.recompute_every
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(drop_gradient)
    frozen = filled(plan_model(config.model), dtype).requires_grad_(False) if config.mode == "full" else None
    student = Network(module)

    def teacher(*inputs: Tensor | None) -> Tensor:
        return module(*inputs, adapted=False) if frozen is None else frozen(*inputs)

    schedule, generator = build_schedule(config.schedule, (16, *LATENT)), torch.Generator().manual_seed(0)
    with Allocations() as allocations:
        batch = Batch(
            torch.randn(IMAGES, 16, *LATENT),
            torch.randn(IMAGES, TEXT_LENGTH, 64),
            torch.ones(IMAGES, TEXT_LENGTH, dtype=torch.bool),
            torch.randn(1, 64),
        )
        match config.objective:
            case "flow_matching":
                flow_matching_step(student, batch, config, schedule, 1.0, generator)
            case "imitation":
                imitation_data_step(student, teacher, batch, config, schedule, 0, 1.0, generator)
            case "imitation_datafree":
                imitation_datafree_step(student, teacher, batch, config, schedule, 0, 1.0, generator)
    return allocations.peak, student.kept


@pytest.mark.parametrize("name", CASES)
def test_planned_activations_are_the_measured_ones(name: str) -> None:
    config = load_config([*REDUCED, *CASES[name]])
    with fake_world(1, 0, 1) as topology:
        record = trace_step(config, topology, LATENT, TEXT_LENGTH, 0)
    peak, kept = measured(config)
    planned = max(phase.total for phase in record.peaks.values())
    assert planned == pytest.approx(peak, rel=0.1), record.peaks
    assert record.kept == pytest.approx(kept, rel=0.1)
