"""Evaluation while training goes on: training does not notice it, and it says the same after a stop and on other processes.

One start of 2 data-parallel processes and one of 2 tensor-parallel ones train every scenario below.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import PROMPTS, TINY, write_diffusers_teacher
from ranks import run_ranks

from data_pipeline.prompts import TokenTableEncoder, pad_prompts, vocabulary
from piflow_dist.checkpoint.files import newest_complete
from piflow_dist.checkpoint.runs import read_run_config
from piflow_dist.config import Config, ConfigError, load_config
from piflow_dist.distill.objectives import Batch, TeacherVelocity, build_schedule
from piflow_dist.evaluation import during
from piflow_dist.evaluation.during import read_prompts
from piflow_dist.flow.solvers import euler_sample, policy_sample
from piflow_dist.models.adapters import teacher_config
from piflow_dist.models.heads import make_policy
from piflow_dist.models.pretrained import diffusers_folder, load_model
from piflow_dist.tracking.tracker import read_metrics

STEPS, EVERY = 4, 2
COMMON = (
    *TINY,
    "policy.num_components=3",
    "policy.logstd_inner_dim=16",
    "objective=imitation_datafree",
    "distill.guidance.scale=2.0",
    "distill.total_substeps=32",
    "distill.window_substeps=1",
    "train.batch_size=2",
    f"train.steps={STEPS}",
    "optim.lr=0.01",
    "ema.start_step=1",
    "ema.gamma=1",
    "tracking.enabled=false",
)
TIED = ("mode=tied", "lora.rank=4", "lora.alpha=8", "lora.dropout=0.2")
# Three images to a process, in batches of two.
EVALUATED = (
    f"evaluation.every={EVERY}",
    "evaluation.teacher_steps=3",
    "evaluation.images_per_prompt=2",
    "evaluation.max_prompts=3",
    "evaluation.batch_size=2",
    "evaluation.seed=11",
)
SCENARIOS = {"full": ("mode=full",), "tied-bf16": (*TIED, "train.dtype=bf16")}
SPLIT = {"tied-tp": (*TIED, "parallel.tp=2", "launch.processes=2")}
OF_TRAINING = ("loss", "grad_norm", "lr", "ema_decay", "skipped")
OF_EVALUATION = ("eval_psnr_db", "eval_latent_error", "eval_diversity")


def train_rank(rank: int, tp: int, data: Path, teacher: Path, out: Path) -> dict[str, bool]:
    """Every scenario with and without evaluation; of the first one also one that is stopped. Returns findings of this rank."""
    from datetime import timedelta

    from piflow_dist.parallel.topology import Topology

    if tp > 1:
        from piflow_dist.parallel.groups import start_groups

        start_groups(tp, timedelta(seconds=600))
    topology = Topology(rank, 2, rank, torch.device("cpu"), tp)
    if not topology.is_main:  # one rank's encoder does for all
        during.load_prompt_encoder = None
    found = {}
    for name, options in (SPLIT if tp > 1 else SCENARIOS).items():
        with_evaluation = (*options, *EVALUATED)
        train_to(make_config(options, data, teacher, out / name), topology)
        run = train_to(make_config(with_evaluation, data, teacher, out / f"{name}-evaluated"), topology)
        found[name] = survives_a_failure(run)
    if tp == 1:
        stopped = make_config((*SCENARIOS["full"], *EVALUATED), data, teacher, out / "full-stopped")
        train_to(stopped, topology, stop_at=EVERY)
        if topology.is_main:
            shutil.copytree(stopped.run_dir, out / "full-each")
        dist.barrier()
        train_to(stopped, topology)
        each = ("evaluation.every=1", f"train.steps={EVERY + 1}")
        train_to(make_config((*SCENARIOS["full"], *EVALUATED, *each), data, teacher, out / "full-each"), topology)
    return found


def make_config(options: tuple[str, ...], data: Path, teacher: Path, run_dir: Path) -> Config:
    return load_config([*COMMON, *options, f"data.root={data}", f"distill.teacher={teacher}", f"run_dir={run_dir}"])


def train_to(config: Config, topology, stop_at: int | None = None) -> Any:
    """Train to the end, or until a request to stop in step `stop_at`."""
    from piflow_dist.build import build_run
    from piflow_dist.launch.watchdog import Unwatched
    from piflow_dist.tracking.tracker import Tracker
    from piflow_dist.train import resume, train

    class Stopping(Unwatched):
        def begin_step(self, step: int) -> None:
            self.stop_requested = step == stop_at

    run = build_run(config, topology, Stopping())
    resume(run)
    Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    tracker = Tracker(config, run.state.step + 1, topology.world_size) if topology.is_main else None
    train(run, tracker)
    run.saver.close(60)
    if tracker is not None:
        tracker.close("FINISHED")
    return run


def survives_a_failure(run: Any) -> bool:
    """Whether working weights, modes and random states are the same bits after an evaluation that raises half-way."""
    run.ema.averages = [average.add(1.0) for average in run.ema.averages]
    module, seen = run.model.engine.module, []

    def working() -> list:
        weights = [p.ds_tensor.clone() for p in module.parameters()]
        whole = [p.detach().clone() for p in run.model.kept_whole]
        return [*weights, *whole]

    def others() -> list:
        return [torch.get_rng_state(), torch.tensor([each.training for each in module.modules()])]

    def fail(*inputs: object) -> None:
        seen.append(working())
        torch.rand(3)
        raise RuntimeError("half-way")

    before = working(), others()
    run.evaluation._sample = fail
    with pytest.raises(RuntimeError, match="half-way"):
        run.evaluation.run(1, run.model, run.teacher, run.ema.averages)
    after = working(), others()
    averaged = any(not torch.equal(a, b) for a, b in zip(before[0], seen[0], strict=True))
    return averaged and all(
        torch.equal(a, b) for pair in zip(before, after, strict=True) for a, b in zip(*pair, strict=True)
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> tuple[Path, list[dict[str, bool]]]:
    out = tmp_path_factory.mktemp("evaluated")
    teacher = write_diffusers_teacher(out / "teacher")
    found = []
    for tp in (1, 2):
        found += run_ranks(train_rank, 2, tp, tiny_data, teacher, out, time_limit=300)
    return out, found


def rows_of(run_dir: Path) -> list[dict]:
    return read_metrics(run_dir / "metrics.jsonl")


@pytest.mark.parametrize("name", [*SCENARIOS, *SPLIT])
def test_training_does_not_notice(runs: tuple[Path, list], name: str) -> None:
    plain, evaluated = (rows_of(runs[0] / folder) for folder in (name, f"{name}-evaluated"))
    for key in OF_TRAINING:
        assert [row[key] for row in plain] == [row[key] for row in evaluated], key
    assert [row["step"] for row in evaluated if "eval_psnr_db" in row] == [2, 4]
    assert all(set(OF_EVALUATION) <= row.keys() for row in evaluated if row["step"] in (2, 4))
    assert not any(key.startswith("eval") for row in plain for key in row)


def test_weights_are_restored_to_the_bit_after_a_failure(runs: tuple[Path, list]) -> None:
    assert len(runs[1]) == 4 and all(fine for found in runs[1] for fine in found.values()), runs[1]


def test_a_training_that_was_stopped_evaluates_the_same(runs: tuple[Path, list]) -> None:
    """The stop came in step 2, whose evaluation was put off; it is in the next row, and its files are those of step 2."""
    whole, stopped = runs[0] / "full-evaluated", runs[0] / "full-stopped"
    want, found = rows_of(whole), rows_of(stopped)
    assert [row["loss"] for row in want] == [row["loss"] for row in found]
    assert "eval_psnr_db" not in found[1]
    for key in OF_EVALUATION:
        assert (found[2][key], found[3][key]) == (want[1][key], want[3][key]), key
    for step in (2, 4):
        for ending in ("json", "png"):
            file = f"evaluation/step_{step:08d}.{ending}"
            if ending == "png":
                assert (whole / file).read_bytes() == (stopped / file).read_bytes()
            else:
                found, want = (json.loads((folder / file).read_text()) for folder in (stopped, whole))
                assert found["values"].keys() == want["values"].keys() and found["prompts"] == want["prompts"]


def test_an_evaluation_made_up_for_leaves_the_step_s_own(runs: tuple[Path, list]) -> None:
    """That of step 2 is made by the run that goes on, whose next row has one of its own; both have files."""
    found = rows_of(runs[0] / "full-each")
    files = [
        json.loads((runs[0] / "full-each" / "evaluation" / f"step_{step:08d}.json").read_text()) for step in (2, 3)
    ]
    assert [row["step"] for row in found] == [1, 2, 3] and "eval_psnr_db" not in found[1]
    for key in OF_EVALUATION:
        assert found[2][key] == files[1]["values"][key] != files[0]["values"][key], key


@pytest.mark.parametrize("name", ["full", "tied-tp"])
def test_values_are_those_of_the_checkpoint_on_one_process(runs: tuple[Path, list], name: str) -> None:
    """The latent error of the last evaluation, from plain loops without engine over the averaged weights that were saved."""
    checkpoint, _ = newest_complete(runs[0] / f"{name}-evaluated" / "checkpoints")
    run = read_run_config(checkpoint)
    schedule = build_schedule(run.schedule, (16, 4, 4))
    batch = inputs_of(run)
    folder = diffusers_folder(run.distill.teacher)
    velocity = TeacherVelocity(load_model(folder, teacher_config(folder, "unused")).eval(), batch, run.distill.guidance)
    theirs = euler_sample(velocity, batch.x0_BCHW, schedule, 3)
    errors = {}
    for ema in (True, False):
        network = load_model(checkpoint, run, ema).eval()

        def predict(x_BCHW, sigma_B, tau_B, network=network):
            outputs = network(x_BCHW, sigma_B, batch.text_BLD, batch.mask_BL)
            return make_policy(outputs, x_BCHW, sigma_B, run.policy, run.distill.base_segment, schedule.shift)

        with torch.no_grad():
            mine = policy_sample(predict, batch.x0_BCHW, schedule, 4, total_substeps=32, temperature="auto")
        errors[ema] = ((mine - theirs).norm() / theirs.norm()).item()
    (row,) = (row for row in rows_of(runs[0] / f"{name}-evaluated") if row["step"] == STEPS)
    assert row["eval_latent_error"] == pytest.approx(errors[True], rel=1e-5)
    assert row["eval_latent_error"] != pytest.approx(errors[False], rel=1e-4), "the raw weights were sampled"


def inputs_of(run: Config) -> Batch:
    """The noises of evaluation.seed, and the prompts."""
    prompts = [prompt for prompt in sorted(PROMPTS) for _ in range(run.evaluation.images_per_prompt)]
    noises = []
    for index in range(len(prompts)):
        digest = hashlib.blake2b(f"{run.evaluation.seed},{index}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        noises.append(torch.randn(16, 4, 4, generator=generator))
    encoder = TokenTableEncoder(vocabulary(PROMPTS), dim=64)
    text_BLD, mask_BL = pad_prompts(encoder.encode(prompts))
    return Batch(torch.stack(noises), text_BLD, mask_BL, encoder.encode([""])[0])


def test_what_cannot_be_evaluated_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="evaluation.nfe=2: a student of distill.nfe=4"):
        make_config(("evaluation.nfe=2",), tmp_path, tmp_path, tmp_path)
    with pytest.raises(ConfigError, match="evaluation.temperature=2 must be auto or a number in"):
        make_config(("evaluation.temperature=2",), tmp_path, tmp_path, tmp_path)
    config = make_config((f"evaluation.prompts={tmp_path / 'none'}",), tmp_path, tmp_path, tmp_path)
    with pytest.raises(ConfigError, match="evaluation.prompts=.*none does not exist"):
        read_prompts(config, None)
