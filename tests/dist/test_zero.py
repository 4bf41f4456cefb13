"""ZeRO-3 over gloo processes against one process, and against a plain torch loop without any engine.

One start of 2 processes and one of 1 train every scenario below; the tests compare what they return.
"""

import copy
import functools
import itertools
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, rewrite_state
from ranks import run_ranks
from torch.testing import assert_close

from piflow_dist.config import Config, ConfigError, load_config
from piflow_dist.sampling.settings import SampleConfig

STEPS, SAVED_AT = 5, 3
TOLERANCE = 1e-6
COMMON = (
    *TINY,
    "train.batch_size=4",
    "train.micro_batch_size=2",  # two micro-batches of 1 process, one of each of 2 processes
    f"train.steps={STEPS}",
    "train.max_skipped=2",
    "checkpoint.every=100",
    "tracking.enabled=false",
    "policy.num_components=3",
    "policy.logstd_inner_dim=16",
)
TEACHING = ("objective=flow_matching", "data.caption_dropout=0.3")
MIXED = ("objective=imitation", "distill.num_decay_iters=4", "distill.guidance.scale=2.0")
DATAFREE = ("objective=imitation_datafree", "distill.guidance.scale=2.0")
BASELINE = ("policy=mean", "distill.guidance.scale=2.0")
MEANFLOW = (*BASELINE, "objective=meanflow", "distill.meanflow.instant_share=0.3", "distill.meanflow.weight_power=0.5")
SHORTCUT = (*BASELINE, "objective=shortcut_regression", "distill.teacher_substeps=3", "distill.loss_scale=300")
SGD = ("optim.type=sgd", "optim.lr=0.2", "optim.clip=0")
# An eps far above the gradients' rounding: g / |g| of a gradient that is rounding noise would compare noise.
ADAMW = ("optim=adamw", "optim.lr=0.005", "optim.eps=1e-3", "optim.weight_decay=0.1", "optim.clip=0")
MUON = ("optim=muon", "optim.muon_lr=0.02", "optim.lr=0.005", "optim.eps=1e-3")
CLIPPED = ("optim.clip=0.05", "optim.clip_from_step=2")
TIED = ("mode=tied", "lora.rank=4", "lora.alpha=8", "lora.dropout=0.1")
SCENARIOS = {
    "teacher-sgd": (*TEACHING, *SGD),
    "teacher-adamw": (*TEACHING, *ADAMW),
    "teacher-clipped": (*TEACHING, *SGD, *CLIPPED),
    "teacher-muon": (*TEACHING, *MUON),
    "mixed-adamw": (*MIXED, *ADAMW, *CLIPPED),
    "mixed-muon": (*MIXED, *MUON),
    "datafree-adamw": (*DATAFREE, *ADAMW, *CLIPPED),
    "tied-adamw": (*MIXED, *TIED, *ADAMW, *CLIPPED),
    "tied-recomputed": (*MIXED, *TIED, *ADAMW, *CLIPPED, "parallel.recompute_every=1"),
    "tied-offloaded": (*MIXED, *TIED, *ADAMW, *CLIPPED, "parallel.offload_optimizer=true"),
    "tied-datafree-sgd": (*DATAFREE, *TIED, *SGD, "optim.lr=0.02", *CLIPPED),
    "datafree-dx-sgd": (*DATAFREE, *SGD, "optim.lr=0.02", *CLIPPED, "policy.type=dx", "policy.num_nodes=3"),
    "shortcut-adamw": (*SHORTCUT, *ADAMW, *CLIPPED),
    "meanflow-adamw": (*MEANFLOW, *ADAMW, *CLIPPED),
    # Last, as the linear layer that has no forward-mode derivative of its own stays in place in a process.
    "tied-meanflow": (*MEANFLOW, *TIED, *ADAMW, *CLIPPED, "parallel.memory_efficient_linear=true"),
}
ROUNDED = "tied-bf16"
"""Trained too, but compared loosely: the order of bf16 sums depends on the number of processes."""
ROUNDED_OPTIONS = (*SCENARIOS["tied-recomputed"], "train.dtype=bf16")
SAVED = ("teacher-adamw", "mixed-muon", "datafree-dx-sgd", "tied-adamw", "tied-offloaded", "tied-meanflow")
POISONED = ("teacher-adamw", "teacher-muon")
WITHOUT_ENGINE = [name for name in SCENARIOS if not name.endswith(("muon", "offloaded"))]


@dataclass
class Course:
    """What one rank saw of a training."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    applied: list[bool] = field(default_factory=list)
    shards: dict[str, np.ndarray] = field(default_factory=dict)
    ema: dict[str, np.ndarray] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    split_dims: dict[str, int | None] = field(default_factory=dict)
    dtypes: dict[str, set[str]] = field(default_factory=dict)


@dataclass
class Outcome:
    """What one rank returns. `error`: the message that stopped the poisoned training."""

    trained: dict[str, Course] = field(default_factory=dict)
    resumed: dict[str, Course] = field(default_factory=dict)
    plain: dict[str, Course] = field(default_factory=dict)
    poisoned: dict[str, Course] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)


def train_rank(rank: int, world_size: int, data: Path, teacher: Path, out: Path) -> Outcome:
    """All scenarios on this rank. 2 processes save what 1 process resumes: they must have run before."""
    from piflow_dist.parallel.topology import Topology

    topology = Topology(rank, world_size, rank, torch.device("cpu"))
    outcome = Outcome()
    for name, options in ({ROUNDED: ROUNDED_OPTIONS} | SCENARIOS).items():
        config = make_config(options, data, teacher, out / name)
        if world_size == 2:
            outcome.trained[name] = train_steps(config, topology, save=name in SAVED)
        else:
            outcome.trained[name] = train_steps(config, topology)
        if world_size == 1 and name in WITHOUT_ENGINE:
            outcome.plain[name] = train_without_engine(config)
        if name in SAVED:
            outcome.resumed[name] = train_steps(config, topology, from_checkpoint=True)
        if world_size == 2 and name in POISONED:
            poisoned = make_config(options, data, teacher, out / f"{name}-poisoned")
            outcome.poisoned[name], outcome.errors[name] = train_poisoned(poisoned, topology)
    return outcome


def make_config(options: tuple[str, ...], data: Path, teacher: Path, run_dir: Path) -> Config:
    return load_config([*COMMON, *options, f"data.root={data}", f"distill.teacher={teacher}", f"run_dir={run_dir}"])


def train_steps(config: Config, topology: Any, save: bool = False, from_checkpoint: bool = False) -> Course:
    from piflow_dist import train

    run = train.build_run(config, topology)
    if from_checkpoint:
        train.resume(run)
        assert run.state.step == SAVED_AT
    course = Course()
    while run.state.step < STEPS:
        loss, result = train.train_step(run)
        run.state.step += 1
        run.ema.update(run.model.masters, run.state.step)
        note(course, loss.item(), result)
        if save and run.state.step == SAVED_AT:
            train.save(run)
    keep_weights(course, run)
    return course


def note(course: Course, loss: float, result: Any) -> None:
    course.losses.append(loss)
    course.norms.append(result.grad_norm)
    course.applied.append(result.applied)


def keep_weights(course: Course, run: Any) -> None:
    course.shards = {name: value.detach().numpy().copy() for name, value in run.model.named(run.model.masters).items()}
    course.ema = {name: value.detach().numpy().copy() for name, value in run.model.named(run.ema.averages).items()}
    course.shapes = {shard.name: shard.shape for shard in run.model.shards}
    course.dtypes = {
        "masters": {str(value.dtype) for value in run.model.masters},
        "ema": {str(value.dtype) for value in run.ema.averages},
        "working": {str(p.ds_tensor.dtype) for p in run.model.engine.module.parameters()},
    }
    course.split_dims = {shard.name: shard.split_dim for shard in run.model.shards}


def train_poisoned(config: Config, topology: Any) -> tuple[Course, str]:
    """The real loop on a stream that gives rank 1 alone a NaN in step 2, and in every step from 5 on."""
    from piflow_dist import train

    run = train.build_run(config, topology)
    run.config.train.steps = 12
    run.config.checkpoint.every = 1
    healthy, course, taken, apply = run.stream.next, Course(), 0, run.model.step

    def next_batch() -> dict:
        nonlocal taken
        batch, taken = healthy(), taken + 1
        if topology.rank == 1 and (taken == 2 or taken >= 5):
            batch["latents"][0, 0, 0, 0] = float("nan")
        return batch

    def step(*args: Any) -> Any:
        before = [master.clone() for master in run.model.masters]
        result = apply(*args)
        note(course, 0.0, result)
        changed = any(not torch.equal(old, new) for old, new in zip(before, run.model.masters, strict=True))
        assert changed == result.applied, f"step {taken}: applied={result.applied}, but weights changed: {changed}"
        return result

    run.stream.next, run.model.step = next_batch, step
    try:
        train.train(run, None)
    except FloatingPointError as error:
        keep_weights(course, run)
        return course, f"{error} [step {run.state.step}, skipped {run.state.skipped_total}]"
    raise AssertionError("the training did not stop")


def train_without_engine(config: Config) -> Course:
    """The same batches, objectives and noise in a plain torch loop: no DeepSpeed, no shards."""
    from data_pipeline.description import load_description
    from data_pipeline.prompts import load_prompt_encoder
    from data_pipeline.stream import LatentStream
    from piflow_dist import train
    from piflow_dist.distill.objectives import build_schedule
    from piflow_dist.models.architecture import build_teacher, plan_model
    from piflow_dist.models.pretrained import open_teacher, plan_training
    from piflow_dist.models.weights import fill

    if config.distils:
        module, start = plan_training(config)
        fill(module, start)
        teacher = functools.partial(module, adapted=False)
        if config.mode == "full":
            teacher = plan_model(config.model)
            fill(teacher, open_teacher(config))
            teacher.requires_grad_(False)
    else:
        module, teacher = build_teacher(config.model, config.train.seed), None
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if config.optim.type == "sgd":
        optimizer = torch.optim.SGD(parameters.values(), lr=config.optim.lr, momentum=config.optim.momentum)
    else:
        betas, eps, decay = tuple(config.optim.betas), config.optim.eps, config.optim.weight_decay
        optimizer = torch.optim.AdamW(parameters.values(), config.optim.lr, betas, eps, decay)
    description = load_description(config.data.root)
    run = SimpleNamespace(
        config=config,
        schedule=build_schedule(config.schedule, description.latent_shape),
        model=PlainModel(module),
        teacher=teacher,
        stream=LatentStream(config.data.root, "train", batch_size=2, global_batch=4, seed=config.train.seed),
        topology=SimpleNamespace(device=torch.device("cpu")),
        empty_LD=load_prompt_encoder(description.prompt_encoder).encode([""])[0],
        state=SimpleNamespace(step=0),
        gauges=SimpleNamespace(meter=None),
    )
    course = Course()
    for step in range(STEPS):
        run.state.step, losses = step, []
        for micro in range(2):
            seed = train.seed_from(config.train.seed, step, micro)
            generator = torch.Generator().manual_seed(seed)
            torch.manual_seed(seed)  # of the adapters' dropout
            losses.append(train.micro_step(run, train.next_batch(run), 0.5, generator).item())
        limit = config.optim.clip if config.optim.clip and step >= config.optim.clip_from_step else float("inf")
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), limit).item()
        for group in optimizer.param_groups:
            group["lr"] = config.optim.lr * min(1.0, (step + 1) / 2)  # optim.warmup_steps=2
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        note(course, sum(losses) / 2, SimpleNamespace(grad_norm=norm, applied=True))
    course.shards = {name: p.detach().flatten().numpy().copy() for name, p in parameters.items()}
    course.shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    return course


class PlainModel:
    """What the objectives use of TrainedModel."""

    def __init__(self, module: torch.nn.Module):
        self.module = module

    def __call__(self, *args: Any) -> Any:
        return self.module(*args)

    def derivative(self, inputs: tuple, tangents: tuple) -> torch.Tensor:
        """By a difference in float64, which shares nothing with forward-mode differentiation."""
        exact, h = copy.deepcopy(self.module).double().eval(), 1e-6
        moved = [
            [
                value if tangent is None else value.double() + step * tangent.double()
                for value, tangent in zip(inputs, tangents, strict=True)
            ]
            for step in (h, -h)
        ]
        with torch.no_grad():
            ahead, behind = (exact(*values)["mean"] for values in moved)
        return ((ahead - behind) / (2 * h)).float()

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()


def whole(ranks: list[Course], kind: str = "shards") -> dict[str, torch.Tensor]:
    """Parameters joined from the ranks' shards."""
    weights = {}
    for name, shape in ranks[0].shapes.items():
        flat = torch.cat([torch.from_numpy(getattr(course, kind)[name]) for course in ranks])
        weights[name] = flat[: torch.Size(shape).numel()].reshape(shape)
    return weights


def assert_same_weights(
    found: dict[str, torch.Tensor], want: dict[str, torch.Tensor], tolerance: float = TOLERANCE
) -> None:
    assert found.keys() == want.keys()
    for name in want:
        assert_close(found[name], want[name], rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run folder for each scenario."""
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def outcomes(tiny_data: Path, teacher_run: Path, out: Path) -> dict[int, list[Outcome]]:
    """{number of processes: outcome of each}."""
    return {size: run_ranks(train_rank, size, size, tiny_data, teacher_run, out, time_limit=900) for size in (2, 1)}


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_train_like_one(outcomes: dict[int, list[Outcome]], name: str) -> None:
    """Losses, norms, weights and their average. All but the data-free ones are equal to the bit where this was written."""
    (one,), two = [outcome.trained[name] for outcome in outcomes[1]], [outcome.trained[name] for outcome in outcomes[2]]
    assert all(one.applied)
    for course in two:
        assert_close(course.losses, one.losses, rtol=TOLERANCE, atol=0)
        assert_close(course.norms, one.norms, rtol=TOLERANCE, atol=0)
    assert_same_weights(whole(two), whole([one]))
    assert_same_weights(whole(two, "ema"), whole([one], "ema"))


@pytest.mark.parametrize("name", WITHOUT_ENGINE)
def test_the_engine_trains_like_plain_torch(outcomes: dict[int, list[Outcome]], name: str) -> None:
    found, want = outcomes[1][0].trained[name], outcomes[1][0].plain[name]
    # The plain derivative is a difference in float64: here the engine's is seen to be right, up to float32's rounding of it.
    tolerance = 3e-5 if "meanflow" in name else TOLERANCE
    assert_close(found.losses, want.losses, rtol=tolerance, atol=0)
    assert_close(found.norms, want.norms, rtol=tolerance, atol=0)
    assert_same_weights(whole([found]), whole([want]), tolerance)


def test_weights_have_moved_and_shards_are_shards(outcomes: dict[int, list[Outcome]]) -> None:
    """The comparisons above would also hold for a training that does nothing, or that shards nothing."""
    from piflow_dist.models.architecture import build_teacher

    config = load_config([*COMMON, *TEACHING, "data.root=x", "run_dir=x"])
    fresh = dict(build_teacher(config.model, config.train.seed).named_parameters())
    # A fresh teacher is the zero field: at first little but its head and modulations has a gradient worth the name.
    for name, least in {"teacher-sgd": 0.1, "teacher-adamw": 3 / 4, "teacher-muon": 0.4}.items():
        trained = whole([outcomes[1][0].trained[name]])
        still = [key for key, value in trained.items() if (value - fresh[key]).abs().max() < 1e-4]
        assert len(still) <= (1 - least) * len(trained), (name, still)
        two = [outcome.trained[name] for outcome in outcomes[2]]
        assert all(course.shards["img_in.weight"].size == fresh["img_in.weight"].numel() // 2 for course in two)
    losses = [outcomes[1][0].trained[name].losses for name in SCENARIOS]
    assert all(np.isfinite(values).all() and max(values) > 1e-3 for values in losses), losses


def test_clipping_binds(outcomes: dict[int, list[Outcome]]) -> None:
    """The reported norm is the one before clipping, and from step 2 on the weights differ from the unclipped run's."""
    limit, from_step = (float(option.partition("=")[2]) for option in CLIPPED)
    for name, options in SCENARIOS.items():
        if set(CLIPPED) <= set(options):
            norms = outcomes[1][0].trained[name].norms[int(from_step) :]
            assert len(norms) == 3 and min(norms) > 1.5 * limit, (name, norms)
    free, clipped = (outcomes[1][0].trained[name] for name in ("teacher-sgd", "teacher-clipped"))
    assert clipped.losses[:3] == free.losses[:3]
    assert clipped.losses[3:] != free.losses[3:]


def test_bf16_rounds_the_working_weights_alone(outcomes: dict[int, list[Outcome]]) -> None:
    """Masters and their average are fp32; losses are near those of fp32, and nearer to one another on one process and two."""
    want, (one,) = outcomes[1][0].trained["tied-recomputed"], [outcome.trained[ROUNDED] for outcome in outcomes[1]]
    for course in (outcome.trained[ROUNDED] for ranks in outcomes.values() for outcome in ranks):
        assert course.dtypes == {"masters": {"torch.float32"}, "ema": {"torch.float32"}, "working": {"torch.bfloat16"}}
        assert_close(course.losses, want.losses, rtol=0.1, atol=0)
        assert_close(course.losses, one.losses, rtol=0.02, atol=0)
        assert_close(course.norms, one.norms, rtol=0.05, atol=0)
        assert all(course.applied)
    assert one.losses != want.losses


def test_an_offloaded_optimizer_takes_the_same_steps(outcomes: dict[int, list[Outcome]]) -> None:
    for ranks in outcomes.values():
        found, want = ([rank.trained[name] for rank in ranks] for name in ("tied-offloaded", "tied-adamw"))
        assert_close(found[0].losses, want[0].losses, rtol=TOLERANCE, atol=0)
        assert_close(found[0].norms, want[0].norms, rtol=TOLERANCE, atol=0)
        for kind in ("shards", "ema"):
            assert_same_weights(whole(found, kind), whole(want, kind))


@pytest.mark.parametrize("name", SAVED)
def test_resume_is_exact_on_the_same_processes_and_close_on_others(
    outcomes: dict[int, list[Outcome]], name: str
) -> None:
    """Saved on 2 processes at step 3; each resumes it for two more steps."""
    trained = [outcome.trained[name] for outcome in outcomes[2]]
    for outcome, uninterrupted in zip(outcomes[2], trained, strict=True):
        assert outcome.resumed[name].losses == uninterrupted.losses[SAVED_AT:]
        assert outcome.resumed[name].norms == uninterrupted.norms[SAVED_AT:]
    resumed = [outcome.resumed[name] for outcome in outcomes[2]]
    for kind in ("shards", "ema"):
        assert_same_weights(whole(resumed, kind), whole(trained, kind), 0)
    alone = outcomes[1][0].resumed[name]
    assert_close(alone.losses, trained[0].losses[SAVED_AT:], rtol=TOLERANCE, atol=0)
    for kind in ("shards", "ema"):
        assert_same_weights(whole([alone], kind), whole(trained, kind))


@pytest.mark.parametrize("name", POISONED)
def test_a_gradient_that_is_not_finite_is_skipped_everywhere_and_then_stops_the_run(
    outcomes: dict[int, list[Outcome]], name: str
) -> None:
    """NaN on rank 1 alone, in step 2 and from step 5 on; train.max_skipped=2. (The ranks check the weights per step.)"""
    for outcome in outcomes[2]:
        course, error = outcome.poisoned[name], outcome.errors[name]
        assert course.applied == [True, False, True, True, False, False]
        assert all(np.isfinite(value).all() for value in (*course.shards.values(), *course.ema.values()))
        assert error.startswith("The gradient was not finite in 2 steps in a row")
        assert "optim.lr" in error and "train.max_skipped" in error
        assert error.endswith("[step 6, skipped 3]")


def test_muon_recovers_from_a_skipped_step(outcomes: dict[int, list[Outcome]]) -> None:
    """Its momentum must not have taken the NaN in: the steps after it are applied with a finite norm."""
    for outcome in outcomes[2]:
        assert np.isfinite([outcome.poisoned["teacher-muon"].norms[i] for i in (0, 2, 3)]).all()


@torch.no_grad()
def test_a_tied_checkpoint_is_read_on_the_base_that_it_was_trained_on(
    outcomes: dict[int, list[Outcome]], out: Path, teacher_run: Path, tmp_path: Path
) -> None:
    from piflow_dist.checkpoint.files import newest_complete
    from piflow_dist.checkpoint.runs import read_run_config, resolve_checkpoint
    from piflow_dist.models.pretrained import load_model
    from piflow_dist.sampling.settings import build_request

    run = Path(shutil.copytree(out / "tied-adamw", tmp_path / "run"))
    checkpoint = newest_complete(run / "checkpoints")[0]
    config = read_run_config(checkpoint)
    student = load_model(checkpoint, config).eval()
    base = resolve_checkpoint(str(teacher_run), "teacher")
    teacher = load_model(base, read_run_config(base)).eval()
    inputs = torch.randn(2, 16, 4, 4), torch.tensor([0.9, 0.4]), torch.randn(2, 3, 64), torch.ones(2, 3).bool()
    want_BCHW = teacher(*inputs)
    assert_close(student(*inputs, adapted=False), want_BCHW, rtol=0, atol=1e-6)
    off_BKCHW = student(*inputs)["means"] - want_BCHW[:, None]
    assert off_BKCHW.abs().max() > 0.1  # bias noise alone is 0.05

    rewrite_state(checkpoint, lambda state: state.update(teacher="0" * 64))
    request = load_config([f"source={run}", f"out={tmp_path / 'samples'}"], SampleConfig, "sample")
    for read in (lambda: load_model(checkpoint, config), lambda: build_request(request)):
        with pytest.raises(ConfigError, match="is not the base that the adapters of .* were trained on"):
            read()


@torch.no_grad()
def test_a_meanflow_student_is_sampled_at_any_number_of_steps(
    outcomes: dict[int, list[Outcome]], out: Path, tmp_path: Path
) -> None:
    """tools/sample.py's sampler against the mean velocities by hand; an export is refused."""
    from images import sample_here

    from data_pipeline.prompts import load_prompt_encoder
    from piflow_dist.checkpoint.export import ExportConfig, export
    from piflow_dist.sampling.settings import build_request

    run = out / "tied-meanflow"
    for nfe, sigmas in ((1, [1.0, 0.0]), (3, [1.0, 0.6, 0.2, 0.0])):  # the last step is half as long
        options = [f"source={run}", f"out={tmp_path / str(nfe)}", f"nfe={nfe}", "launch.device=cpu"]
        request = build_request(load_config(options, SampleConfig, "sample"))
        texts_of = dict(
            zip(
                request.dataset.prompts,
                load_prompt_encoder(request.dataset.prompt_encoder).encode(list(request.dataset.prompts)),
                strict=True,
            )
        )
        sampler, latents = sample_here(request)
        images, found = sampler.request.images[:2], latents[:2]
        x = torch.stack(
            [torch.randn(found[0].shape, generator=torch.Generator().manual_seed(image.noise_seed)) for image in images]
        )
        texts = [texts_of[image.prompt] for image in images]
        for sigma, after in itertools.pairwise(sigmas):
            spans = torch.tensor([sigma]), None, torch.tensor([sigma - after])
            mean = [
                sampler.network(
                    x[i : i + 1], spans[0], texts[i][None], torch.ones(1, len(texts[i])).bool(), *spans[1:]
                )["mean"]
                for i in range(2)
            ]
            x = x - (sigma - after) * torch.cat(mean)
        assert_close(found, x, rtol=0, atol=1e-4)
    with pytest.raises(ConfigError, match="objective=meanflow: no pipeline reads a network of mean velocities"):
        export(ExportConfig(source=str(run), out=str(tmp_path / "export")))
