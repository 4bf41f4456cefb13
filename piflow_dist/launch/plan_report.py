"""Plans for people and for scripts: what tools/plan.py and a launcher's dry run print."""

from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from piflow_dist.config import CheckpointConfig, Config, ConfigError, load_config, require, require_positive
from piflow_dist.models.lora import base_name
from piflow_dist.parallel.dryrun import build_models, fake_world
from piflow_dist.parallel.memory import GIB, Plan, Planner, Shape, data_shape
from piflow_dist.parallel.zero import DTYPES

TABLE_CLUSTERS, TABLE_TP = ("a100x64", "h100x32", "h100x1", "h200x1"), (1, 2, 4, 8)


@dataclass(kw_only=True)
class PlanConfig:
    """Options of tools/plan.py."""

    latent: list[int] | None = None
    """Height and width of the latent; default: the data set's, or 128 x 128 (1024 x 1024 pixels) where there is none."""
    text_length: int | None = None
    """Tokens of the longest prompt of a batch; default: the data set's where it lists its prompts, else 512."""
    rank: int | None = None
    """Show what this rank of the job holds."""
    table: bool = False
    """Compare clusters, tensor-parallel sizes and modes, as a Markdown table."""
    json: bool = False
    """Print the plan as JSON."""

    def __post_init__(self):
        if self.latent is not None:
            fine = len(self.latent) == 2 and all(side > 0 and side % 2 == 0 for side in self.latent)
            require(fine, f"plan.latent={list(self.latent)} must be two even numbers, height and width of the latent.")
        if self.text_length is not None:
            require_positive("plan", self, "text_length")


@dataclass(kw_only=True)
class PlannedRun(Config):
    plan: PlanConfig = field(default_factory=PlanConfig)

    def __post_init__(self):
        super().__post_init__()
        world, rank = self.launch.processes, self.plan.rank
        require(
            rank is None or 0 <= rank < world, f"plan.rank={rank} is not a rank of this job: it has 0 to {world - 1}."
        )


def planned_shape(config: Config, options: PlanConfig) -> Shape:
    return data_shape(config, tuple(options.latent) if options.latent else None, options.text_length)


def as_json(planner: Planner, plan: Plan) -> dict[str, Any]:
    """Bytes, seconds and operations as plain numbers; overrides that would fit where it does not."""
    return {
        "fits": plan.fits,
        "suggestions": [] if plan.fits else [overrides for overrides, _ in planner.suggestions(plan.config)],
        "gpu_bytes": plan.memory,
        "gpu_limit": plan.limit,
        "components": plan.components,
        "phases": plan.phases,
        "traffic": [vars(traffic) for traffic in plan.traffic],
        "flops": plan.flops,
        "seconds": {"step": plan.seconds, "arithmetic": plan.compute_seconds, "messages": plan.sent_seconds},
        "checkpoint_bytes": plan.checkpoint,
        "host_bytes": plan.host,
        "host_limit": plan.host_limit,
    }


def print_plan(planner: Planner, plan: Plan, console: Console) -> None:
    """Everything about one run, and settings that would fit where it does not."""
    config, cluster = plan.config, plan.config.cluster
    tp, world = config.parallel.tp, cluster.world_size
    micro_batches, images = config.train.accumulation(world // tp)
    console.print(
        f"{config.run_dir}: {config.objective}, mode={config.mode}, on {cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu} "
        f"({world // tp} data-parallel x {tp} tensor-parallel), {micro_batches} x {images} images per "
        f"{'GPU' if tp == 1 else 'group'} and step.\nImages of {planner.shape.latent[0]} x {planner.shape.latent[1]} latents, "
        f"prompts of up to {planner.shape.text_length} tokens.",
        markup=False,
        highlight=False,
    )
    memory_table(plan, console)
    traffic_table(plan, console)
    total = sum(plan.flops.values())
    console.print(
        f"Time per step: {seconds(plan.compute_seconds)} of arithmetic ({total / 1e12:,.0f} Tflop per GPU at "
        f"{cluster.achieved_share:.0%} of {cluster.peak_tflops:g} Tflop/s) and {seconds(plan.sent_seconds)} of messages: "
        f"{seconds(plan.seconds)} one after the other. {config.train.steps} steps: {days(plan.seconds * config.train.steps)}.",
        highlight=False,
    )
    console.print(
        f"Disk: {gib(plan.checkpoint)} per checkpoint, {gib(plan.checkpoint * checkpoints_on_disk(config.checkpoint, config.train.steps))} for the "
        f"{checkpoints_on_disk(config.checkpoint, config.train.steps)} that there may be (checkpoint.keep, keep_every, keep_best, and the one being written).",
        highlight=False,
    )
    parts = ", ".join(f"{name} {gib(size)}" for name, size in plan.host.items())
    console.print(
        f"Host memory: {gib(sum(plan.host.values()))} of {gib(plan.host_limit)} per node ({parts}).", highlight=False
    )
    if plan.fits:
        console.print(f"Fits: {gib(plan.memory)} of {gib(plan.limit)} per GPU.", highlight=False)
    else:
        print_way_out(planner, plan, console)


def print_way_out(planner: Planner, plan: Plan, console: Console) -> None:
    limits = {"GPU": (plan.memory, plan.limit), "host": (sum(plan.host.values()), plan.host_limit)}
    exceeded = [
        f"{gib(needed)} of {gib(limit)} {what} memory" for what, (needed, limit) in limits.items() if needed > limit
    ]
    console.print(f"Does not fit: {' and '.join(exceeded)}.", highlight=False)
    found = planner.suggestions(plan.config)
    if not found:
        console.print("No change of settings alone makes it fit. Use more GPUs, or GPUs with more memory.")
        return
    console.print("These settings would:")
    for overrides, fitting in found:
        console.print(
            f"  {' '.join(overrides)}    {gib(fitting.memory)} per GPU, {seconds(fitting.seconds)} a step",
            markup=False,
            highlight=False,
        )


def checkpoints_on_disk(rules: CheckpointConfig, steps: int) -> int:
    """At most, while one is being written."""
    return rules.keep + rules.keep_best + (steps // rules.keep_every if rules.keep_every else 0) + 1


def memory_table(plan: Plan, console: Console) -> None:
    table = Table(title="Memory per GPU at the worst moment of a step", title_justify="left", box=box.SIMPLE)
    table.add_column("what")
    table.add_column("GiB", justify="right")
    for name, size in plan.components.items():
        table.add_row(name, f"{size / GIB:.2f}")
    table.add_section()
    table.add_row("in all", f"{plan.memory / GIB:.2f}")
    table.add_row("of", f"{plan.limit / GIB:.2f}")
    console.print(table)
    peaks = ", ".join(f"{phase} {size / GIB:.1f}" for phase, size in plan.phases.items())
    console.print(f"Most by phase, without the reserve (GiB): {peaks}.\n", highlight=False)


def traffic_table(plan: Plan, console: Console) -> None:
    if not plan.traffic:
        console.print("One GPU: no messages.\n")
        return
    table = Table(title="Messages of a step, as one GPU sees them", title_justify="left", box=box.SIMPLE)
    for name, side in (("what", "left"), ("link", "left"), ("times", "right"), ("GiB", "right"), ("seconds", "right")):
        table.add_column(name, justify=side)
    for row in plan.traffic:
        table.add_row(row.name, row.link, f"{row.count:.0f}", f"{row.bytes / GIB:.3f}", f"{row.seconds:.3f}")
    console.print(table)


def print_rank(config: PlannedRun, console: Console) -> None:
    """What one rank of the job holds, part by part."""
    rank, size = config.plan.rank, DTYPES[config.train.dtype].itemsize
    with fake_world(config.launch.processes, rank, config.parallel.tp) as topology:
        models = build_models(config, topology)
    node = rank // config.cluster.gpus_per_node if config.cluster else 0
    _, images = config.train.accumulation(topology.dp_size)
    first = topology.dp_rank * images
    console.print(
        f"Rank {rank}: node {node}, tensor-parallel rank {topology.tp_rank} of {topology.tp}, data-parallel rank "
        f"{topology.dp_rank} of {topology.dp_size}; images {first} to {first + images - 1} of a step's first micro-batch.",
        highlight=False,
    )
    table = Table(title="Elements and bytes of its ZeRO-3 shards", title_justify="left", box=box.SIMPLE)
    for name in ("part", "its slice", "its shard", "weights MiB", "trained MiB (fp32)"):
        table.add_column(name, justify="left" if name == "part" else "right")
    parts: dict[str, list[int]] = {}
    for module, owner in ((models.trained, ""), (models.frozen, "frozen teacher: ")):
        for name, parameter in module.named_parameters() if module is not None else ():
            row = parts.setdefault(owner + part_of(name), [0, 0, 0])
            shard = -(-parameter.numel() // topology.dp_size)
            for column, count in enumerate((parameter.numel(), shard, shard * parameter.requires_grad)):
                row[column] += count
    parts["in all"] = [sum(column) for column in zip(*parts.values(), strict=True)]
    for name, (whole, shard, trained) in parts.items():
        table.add_row(name, f"{whole:,}", f"{shard:,}", f"{shard * size / 2**20:,.1f}", f"{trained * 4 / 2**20:,.1f}")
    console.print(table)


def part_of(name: str) -> str:
    if ".lora_" in base_name(name):
        return "adapters"
    top = name.partition(".")[0]
    return {
        "transformer_blocks": "transformer blocks",
        "single_transformer_blocks": "single transformer blocks",
        "head": "head and final norm",
        "norm_out": "head and final norm",
    }.get(top, "teacher's head" if top.startswith("teacher_") else "embeddings")


def print_table(overrides: list[str], options: PlanConfig) -> None:
    """One line per cluster, mode and tensor-parallel size, in Markdown."""
    require(
        not any(item.lstrip("+").startswith("cluster") for item in overrides),
        f"plan.table=true compares {', '.join(TABLE_CLUSTERS)}. Leave cluster away.",
    )
    print(
        "| cluster | mode | tp | images a backward | state GiB | working GiB | in all GiB | fits | s/step | of these messages |"
    )
    print("|---|---|--:|--:|--:|--:|--:|---|--:|--:|")
    for cluster in TABLE_CLUSTERS:
        for mode in ("tied", "full"):
            for tp in TABLE_TP:
                request = [*overrides, f"+cluster={cluster}", f"mode={mode}", f"parallel.tp={tp}"]
                try:
                    config = load_config(request, PlannedRun)
                except ConfigError:
                    continue  # one GPU has no groups
                planner = Planner(planned_shape(config, options))
                print(table_line(planner, planner.plan(config), cluster), flush=True)


def table_line(planner: Planner, plan: Plan, cluster: str) -> str:
    config, worst = plan.config, max(plan.phases, key=plan.phases.get)
    parts = plan.components
    working = sum(
        size for name, size in parts.items() if name.startswith(("activations", "working", "head", "gathered"))
    )
    fits = "yes"
    if not plan.fits:
        found = planner.suggestions(config, 1)
        fits = f"with {' '.join(found[0][0])}" if found else "no"
    _, images = config.train.accumulation(config.launch.processes // config.parallel.tp)
    return (
        f"| {cluster} | {config.mode} | {config.parallel.tp} | {images} | {(plan.phases[worst] - working) / GIB:.1f} | {working / GIB:.1f} "
        f"| {plan.memory / GIB:.1f} of {plan.limit / GIB:.0f} | {fits} | {plan.seconds:.1f} | {plan.sent_seconds:.1f} |"
    )


def gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def seconds(value: float) -> str:
    return f"{value:.2f} s"


def days(value: float) -> str:
    return f"{value / 86_400:.1f} days" if value > 2 * 86_400 else f"{value / 3600:.1f} hours"
