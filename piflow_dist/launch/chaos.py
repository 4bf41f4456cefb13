"""Kill a training at random moments, continue it, and compare it with the same training left in peace."""

import gc
import math
import os
import random
import shutil
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table

from piflow_dist.checkpoint.files import CheckpointError, step_name, steps_on_disk, verify
from piflow_dist.checkpoint.phases import PHASES
from piflow_dist.config import ConfigError, require, require_positive
from piflow_dist.launch.console import StepProgress, console
from piflow_dist.launch.lives import Aim, Life
from piflow_dist.tracking.journal import METRICS, read_metrics

COMPARED = ("loss", "grad_norm", "lr", "ema_decay", "skipped", "loss_smooth")
SCENARIOS = {
    "data-tied": ("objective=imitation", "mode=tied"),
    "data-full": ("objective=imitation", "mode=full"),
    "datafree-tied": ("objective=imitation_datafree", "mode=tied"),
    "datafree-full": ("objective=imitation_datafree", "mode=full"),
}
BATCH = 12
TINY = (
    "model=qwen_image_tiny",
    "schedule.shift=1.0",
    "optim.lr=0.005",
    "optim.warmup_steps=2",
    "ema.start_step=3",
    "optim.eps=1e-3",  # else elements whose gradient is rounding noise move by a learning rate, in any direction
    f"train.batch_size={BATCH}",
    "launch.device=cpu",
    "launch.threads=1",
    "parallel.persistence_threshold=500",
    "parallel.memory_efficient_linear=false",
    "tracking.enabled=false",
)
TEACHER = ("objective=flow_matching", "data.caption_dropout=0.1", "train.steps=2")
STUDENT = (
    "policy.num_components=3",
    "policy.logstd_inner_dim=16",
    "distill.guidance.scale=2.0",
    "lora.rank=4",
    "lora.alpha=8",
    "lora.dropout=0.1",
    "checkpoint.keep=2",
    "checkpoint.keep_every=8",
    "checkpoint.keep_best=1",
)


@dataclass(kw_only=True)
class ChaosConfig:
    """Settings of tools/chaos.py."""

    out: str = "outputs/chaos"
    """Emptied at the start; logs and run folders stay there."""
    kills: int = 30
    """Over all scenarios."""
    seed: int = 0
    scenarios: list[str] = field(default_factory=lambda: ["data-tied", "datafree-full"])
    """Of data-tied, data-full, datafree-tied, datafree-full."""
    processes: int = 2
    worlds: list[int] = field(default_factory=list)
    """Numbers of processes to continue on, in turn; empty: always the same. On other numbers than `processes` losses are
    compared within `tolerance`, not bit for bit."""
    tolerance: float = 1e-5
    dtype: str = "fp32"
    steps: int = 16
    """Of one training. One that reaches its end is compared, and the next one begins."""
    every: int = 2
    """Steps between checkpoints."""
    save_delay: float = 0.03
    """Seconds by which each phase of a save is stretched."""
    launcher_share: float = 0.15
    """Share of kills that hit the launcher instead of a rank."""
    start: str = "fork"
    """fork: launches are copies of one process that has the imports done; fresh: `python tools/launch.py`, seconds more each."""
    patience: float = 300.0
    """Seconds for anything that has to happen; longer counts as a hang."""
    options: list[str] = field(default_factory=list)
    """More options for the trainings, as for tools/launch.py."""

    def __post_init__(self):
        require_positive("chaos", self, "kills", "processes", "steps", "every", "patience")
        unknown = [name for name in self.scenarios if name not in SCENARIOS]
        require(
            bool(self.scenarios) and not unknown,
            f"scenarios={list(self.scenarios)}: choose from {', '.join(SCENARIOS)}.",
        )
        require(self.steps > 2 * self.every, f"steps={self.steps} hold too few saves of every={self.every}.")
        require(0 <= self.launcher_share <= 1, f"launcher_share={self.launcher_share} must lie in [0, 1].")
        for world in (self.processes, *self.worlds):
            require(world > 0 and BATCH % world == 0, f"{world} processes do not share {BATCH} images equally.")
        require(
            self.dtype == "fp32" or self.exact,
            f"dtype={self.dtype} is not bit-continuous on other numbers of processes (worlds={list(self.worlds)}): sums are "
            "ordered otherwise. Use dtype=fp32.",
        )

    @property
    def exact(self) -> bool:
        return set(self.worlds) <= {self.processes}

    @property
    def micro_batch(self) -> int:
        """The same in every world: noise is seeded by micro-batch."""
        return math.gcd(*(BATCH // world for world in (self.processes, *self.worlds)))


@dataclass
class Tally:
    kills: Counter = field(default_factory=Counter)
    """By (moment, who)."""
    launches: int = 0
    finished: int = 0
    rows: int = 0
    """Steps compared."""
    differing: list[str] = field(default_factory=list)
    """Losses, gradient norms and other values of steps, and tensors, that differ from the uninterrupted training's."""
    damaged: list[str] = field(default_factory=list)
    """Checkpoints under a good name that were not whole after a kill."""
    failed: list[str] = field(default_factory=list)
    """Launches that ended badly although nobody was killed."""

    @property
    def clean(self) -> bool:
        return not (self.differing or self.damaged or self.failed)


class Chaos:
    def __init__(self, config: ChaosConfig):
        self.config, self.out, self.rng = config, Path(config.out), random.Random(config.seed)
        self.tally, self.start_seconds = Tally(), 1.0

    def run(self) -> Tally:
        """All kills of all scenarios. Raises ConfigError where the uninterrupted trainings do not work."""
        from data_pipeline.synthetic import write_random_set

        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir(parents=True)
        if self.config.start == "fork":
            import_everything()
        write_random_set(self.out / "data")
        self.undisturbed("teacher", [*TEACHER, f"train.dtype={self.config.dtype}"], self.config.processes)
        with StepProgress("kills", self.config.kills, every=10) as progress:
            for index, name in enumerate(self.config.scenarios):
                share = self.config.kills * (index + 1) // len(self.config.scenarios)
                self.torment(name, share, progress)
        return self.tally

    def arguments(self, options: list[str], processes: int) -> list[str]:
        data, start = f"data.root={self.out / 'data'}", f"launch.start={self.config.start}"
        return [*TINY, data, start, f"launch.processes={processes}", *options, *self.config.options]

    def undisturbed(self, name: str, options: list[str], processes: int) -> Path:
        run_dir = self.out / name / "run"
        run_dir.parent.mkdir()
        began = time.monotonic()
        life = Life(self.arguments(options, processes), run_dir, run_dir.parent / "log", self.forks, 0)
        try:
            life.wait_for(lambda: life.step() > 0, self.config.patience)
            self.start_seconds = time.monotonic() - began
            code = life.wait(self.config.patience)
        finally:
            life.stop()
        if code:
            raise ConfigError(f"The training that nobody disturbs failed:\n{life.log.read_text()}")
        return run_dir

    @property
    def forks(self) -> bool:
        return self.config.start == "fork"

    def torment(self, scenario: str, until: int, progress: StepProgress) -> None:
        """Trainings of one scenario, one after the other, until `until` kills are done; the last one may finish."""
        config = self.config
        options = [
            *STUDENT,
            *SCENARIOS[scenario],
            f"distill.teacher={self.out / 'teacher' / 'run'}",
            f"train.dtype={config.dtype}",
            f"train.steps={config.steps}",
            f"train.micro_batch_size={config.micro_batch}",
            f"checkpoint.every={config.every}",
        ]
        reference = self.undisturbed(scenario, options, config.processes)
        worlds = config.worlds or [config.processes]
        exact = config.exact
        number = 0
        while True:
            number += 1
            folder = self.out / f"{scenario}_{number}"
            folder.mkdir()
            lives = 0
            while True:
                arguments = self.arguments(options, worlds[lives % len(worlds)])
                life = Life(arguments, folder / "run", folder / f"log_{lives}", self.forks, config.save_delay)
                lives += 1
                self.tally.launches += 1
                try:
                    aim = self.draw() if self.tally.kills.total() < until else None
                    hit = life.kill(aim, config.patience) if aim else None
                    code = life.wait(config.patience)
                except TimeoutError as hang:
                    self.tally.failed.append(str(hang))
                    return
                finally:
                    life.stop()
                if hit:
                    self.tally.kills[aim.moment, hit] += 1
                    progress.update(self.tally.kills.total(), f"{scenario}: {hit} in {aim.moment}")
                elif code:
                    self.tally.failed.append(f"{life.log} ended with exit code {code}")
                    return
                self.examine(folder / "run", reference, exact)
                if not hit:
                    break
            self.compare_ends(folder / "run", reference, exact)
            if self.tally.kills.total() >= until:
                return

    def draw(self) -> Aim:
        """Half of the kills inside saves, each phase alike; the others between steps or while starting."""
        rng, config = self.rng, self.config
        kind = rng.choices(("save", "step", "start"), (5, 4, 1))[0]
        moment = rng.choice(PHASES) if kind == "save" else kind
        count = rng.randrange(2) if kind == "save" else rng.randrange(config.every + 1)
        delay = {"save": config.save_delay, "step": 0.1, "start": self.start_seconds}[kind] * rng.random()
        victim = -1 if rng.random() < config.launcher_share else rng.randrange(config.processes)
        return Aim(moment, count, delay, victim)

    def examine(self, run_dir: Path, reference: Path, exact: bool) -> None:
        """After each end: whatever has a good name is whole, and every row on disk is one of the undisturbed training's."""
        folder = run_dir / "checkpoints"
        for step in steps_on_disk(folder):
            try:
                verify(folder / step_name(step))
            except CheckpointError as error:
                self.tally.damaged.append(str(error))
        if not (run_dir / METRICS).exists():
            return
        wanted = {row["step"]: row for row in read_metrics(reference / METRICS)}
        for row in read_metrics(run_dir / METRICS):
            self.tally.rows += 1
            for key in COMPARED:
                value, want = row[key], wanted[row["step"]][key]
                allowed = 0 if exact else self.config.tolerance * abs(want)
                if not abs(value - want) <= allowed:
                    self.tally.differing.append(f"{run_dir} step {row['step']}: {key} {value!r}, undisturbed {want!r}")

    def compare_ends(self, run_dir: Path, reference: Path, exact: bool) -> None:
        """Every step once, and weights, average and optimizer of the last checkpoint."""
        import torch

        self.tally.finished += 1
        steps = [row["step"] for row in read_metrics(run_dir / METRICS)]
        if steps != list(range(1, self.config.steps + 1)):
            self.tally.differing.append(f"{run_dir} has the steps {steps}")
        found, want = (
            read_everything(folder / "checkpoints" / step_name(self.config.steps)) for folder in (run_dir, reference)
        )
        if found.keys() != want.keys():
            self.tally.differing.append(f"{run_dir}: other tensors than in {reference}")
            return
        for name in want:
            same = torch.equal(found[name], want[name])
            if not exact and not same:
                same = bool((found[name] - want[name]).abs().max() <= self.config.tolerance)
            if not same:
                self.tally.differing.append(f"{run_dir}: {name} differs")


def import_everything() -> None:
    """What launches and workers import and find out, once for all of them. No thread may run in a process that is forked."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1"}
    import deepspeed
    import torch
    import torch.distributed.launcher.api  # noqa: F401

    import piflow_dist.train  # noqa: F401

    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__.get("async_io")  # which operators could be built: asks a compiler
    # DeepSpeed collects garbage at its start: without this, all that was imported is looked through each time.
    gc.collect()
    gc.freeze()


def read_everything(checkpoint: Path) -> dict:
    """Every tensor of a checkpoint, whole, by its name in the files."""
    from piflow_dist.checkpoint.files import STATE, read_json
    from piflow_dist.checkpoint.reader import Layout, ShardReader

    state = read_json(checkpoint / STATE)
    reader = ShardReader(checkpoint, state["dp_size"], state["tp"])
    tensors = {}
    for key in reader.names():
        if reader.slices[0][0].get_slice(key).get_shape():
            parameter = key.split("/", 2 if key.startswith("optimizer/") else 1)[-1]
            tensors[key] = reader.read_whole(key, Layout(**state["parameters"][parameter]))
        else:
            tensors[key] = reader.slices[0][0].get_tensor(key)
    return tensors


def print_summary(tally: Tally) -> None:
    who = sorted({victim for _, victim in tally.kills}, key=lambda name: (name == "launcher", name))
    table = Table("killed", *who, "all", title="SIGKILL by moment")
    for moment in ("start", "step", *PHASES):
        counts = [tally.kills[moment, victim] for victim in who]
        table.add_row(moment if moment in ("start", "step") else f"save: {moment}", *map(str, counts), str(sum(counts)))
    totals = [sum(count for (_, hit), count in tally.kills.items() if hit == victim) for victim in who]
    table.add_row("all", *map(str, totals), str(tally.kills.total()), style="bold")
    console.print(table)
    console.print(
        f"{tally.launches} launches, {tally.finished} trainings to their end, {tally.rows} logged steps compared: "
        f"{len(tally.differing)} differences, {len(tally.damaged)} damaged checkpoints, {len(tally.failed)} failed launches."
    )
    for line in (*tally.differing[:20], *tally.damaged[:20], *tally.failed):
        console.print(line, highlight=False)
