"""The planner: what a run needs of each GPU, of the links, of time, disk and host memory, before a GPU is taken.

Everything but the constants below is counted by the dry run (dryrun.py) on the configured model and objective.
"""

import dataclasses
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

from data_pipeline.description import FILE_NAME, load_description
from data_pipeline.prompts import load_prompt_encoder
from piflow_dist.config import CONFIG_DIR, ClusterConfig, Config, ConfigError, require
from piflow_dist.models.architecture import architecture
from piflow_dist.parallel.dryrun import RankBytes, build_models, fake_world, rank_bytes, trace_step
from piflow_dist.parallel.tracker import Record
from piflow_dist.parallel.zero import BUCKET_ELEMENTS, DTYPES

GIB = 1 << 30
KEPT_FOR_REUSE = 550_000_000
"""Elements that DeepSpeed prefetches (50 million) or keeps gathered because they are soon read again (half of
stage3_max_reuse_distance), where its trace of the modules holds: not with mode=tied."""
CONTEXT, MESSAGES, FRAGMENTED = GIB, GIB, 0.05
"""Reserve: the CUDA context, NCCL's buffers, and the share of the rest that an allocator loses between blocks."""
PROCESS = 3 * GIB
"""Host memory of a process: libraries, CUDA's host side, batches of the data stream."""


@dataclass(frozen=True)
class Shape:
    """Of a training image. latent: (H, W). text_length: tokens of the longest prompt of a batch."""

    latent: tuple[int, int] = (128, 128)
    text_length: int = 512


def data_shape(config: Config, latent: tuple[int, int] | None, text_length: int | None) -> Shape:
    """What is given; else what the data set says, where there is one; else what is usual for the architecture."""
    default = Shape(*architecture(config.model).usual)
    if not (Path(config.data.root) / FILE_NAME).is_file():
        return Shape(latent or default.latent, text_length or default.text_length)
    description = load_description(config.data.root)
    if text_length is None:
        match description.prompt_encoder.get("kind"):
            case "token_table" if description.prompts:
                encoder = load_prompt_encoder(description.prompt_encoder)
                text_length = max(len(tokens) for tokens in encoder.encode(list(description.prompts)))
            case "class_labels":
                text_length = 1
            case "t5_clip":
                text_length = 1 + description.prompt_encoder["max_tokens"]
    return Shape(latent or description.latent_shape[1:], text_length or default.text_length)


@dataclass(frozen=True)
class Traffic:
    """Messages of one kind in one step, as one GPU sees them."""

    name: str
    link: str
    count: float
    bytes: float
    """Of what the rank has in the end (an all-gather's whole, an all-reduce's sum), or of what it puts in to scatter."""
    seconds: float


@dataclass(frozen=True)
class Plan:
    config: Config
    share: RankBytes
    components: dict[str, float]
    """Bytes per GPU at the worst moment of a step."""
    phases: dict[str, float]
    """Bytes per GPU at the worst moment of each phase, without the reserve."""
    limit: float
    traffic: list[Traffic]
    flops: dict[str, float]
    """Per GPU and step, by phase."""
    compute_seconds: float
    checkpoint: float
    host: dict[str, float]
    """Bytes per node."""
    host_limit: float

    @property
    def memory(self) -> float:
        return sum(self.components.values())

    @property
    def fits(self) -> bool:
        return self.memory <= self.limit and sum(self.host.values()) <= self.host_limit

    @property
    def sent_seconds(self) -> float:
        return sum(traffic.seconds for traffic in self.traffic)

    @property
    def seconds(self) -> float:
        """A step in which messages and arithmetic do not overlap, as DeepSpeed runs it here."""
        return self.compute_seconds + self.sent_seconds


class Planner:
    """Plans configurations of one run; what settings have in common is followed once."""

    def __init__(self, shape: Shape):
        self.shape = shape
        self.shares: dict[str, RankBytes] = {}
        self.records: dict[str, list[Record]] = {}

    def plan(self, config: Config, rank: int = 0) -> Plan:
        cluster = self._cluster(config)
        share, records = self._share(config, rank), self._records(config, rank)
        resident, host = residents(config, share)
        phases, parts = phase_needs(config, share, records)
        worst = max(phases, key=phases.get)
        components = {name: size for name, size in (resident | parts[worst]).items() if size}
        components["reserve: context, NCCL, allocator"] = reserve(cluster, sum(components.values()))
        last = records[-1]
        micro_batches, _ = config.train.accumulation(cluster.world_size // config.parallel.tp)
        flops = {phase: count * micro_batches for phase, count in last.flops.items()}
        checkpoint = share.trained_whole / share.trained_shard * (share.optimizer + 2 * share.ema)
        copies = {"processes": PROCESS, "in host memory": host, "a checkpoint's copy": share.optimizer + 2 * share.ema}
        if cluster.device == "cpu":  # all memory is host memory
            copies = {
                "as above": sum(components.values()),
                "in host memory": host,
                "a checkpoint's copy": copies["a checkpoint's copy"],
            }
        return Plan(
            config=config,
            share=share,
            components=components,
            phases={phase: size + sum(resident.values()) for phase, size in phases.items()},
            limit=cluster.gpu_memory_gib * GIB,
            traffic=step_traffic(config, share, last, micro_batches),
            flops=flops,
            compute_seconds=sum(flops.values()) / (cluster.peak_tflops * 1e12 * cluster.achieved_share),
            checkpoint=checkpoint,
            host={name: size * cluster.gpus_per_node for name, size in copies.items() if size},
            host_limit=cluster.host_memory_gib * GIB,
        )

    def suggestions(self, config: Config, wanted: int = 3) -> list[tuple[list[str], Plan]]:
        """Overrides under which the run fits: those with the fewest changes, fastest first. Tried, not guessed."""
        groups = alternatives(config)
        for changes in range(1, len(groups) + 1):
            found = []
            for chosen in combinations(groups, changes):
                for values in product(*chosen):
                    plan = self._try(config, dict(values))
                    if plan is not None and plan.fits:
                        found.append(([f"{key}={text(value)}" for key, value in values], plan))
                        break  # values of a setting are ordered: later ones change more
            if found:
                return sorted(found, key=lambda item: item[1].seconds)[:wanted]
        return []

    def _try(self, config: Config, changes: dict[str, Any]) -> Plan | None:
        try:
            config = changed(config, changes)
        except ConfigError:
            return None
        resident, _ = residents(config, self._share(config, 0))
        if sum(resident.values()) > self._cluster(config).gpu_memory_gib * GIB:
            return None
        return self.plan(config)

    def _cluster(self, config: Config) -> ClusterConfig:
        names = ", ".join(sorted(path.stem for path in (CONFIG_DIR / "cluster").glob("*.yaml")))
        require(config.cluster is not None, f"A plan needs a cluster. Add +cluster=NAME, one of: {names}.")
        return config.cluster

    def _share(self, config: Config, rank: int) -> RankBytes:
        parallel, tp = config.parallel, config.parallel.tp
        key = self._key(config, rank, config.optim, parallel.persistence_threshold, parallel.offload_optimizer)
        if key not in self.shares:
            with fake_world(config.launch.processes, rank, tp) as topology:
                self.shares[key] = rank_bytes(config, build_models(config, topology), topology)
        return self.shares[key]

    def _records(self, config: Config, rank: int) -> list[Record]:
        """Of a step while the teacher's trajectory is mixed in, if it is, and of one after that."""
        tp, decay = config.parallel.tp, config.distill.num_decay_iters
        dp = config.launch.processes // tp
        batches = config.train.accumulation(dp)[1]
        key = self._key(config, rank, config.distill, config.schedule, config.parallel.recompute_every, batches)
        if key not in self.records:
            with fake_world(config.launch.processes, rank, tp) as topology:
                self.records[key] = [
                    trace_step(config, topology, self.shape.latent, self.shape.text_length, step)
                    for step in sorted({0, decay if config.distils else 0})
                ]
        return self.records[key]

    def _key(self, config: Config, rank: int, *others: object) -> str:
        place = (rank % config.parallel.tp, config.parallel.tp, config.launch.processes)
        run = (config.mode, config.objective, config.train.dtype, config.model, config.policy, config.lora)
        return repr((place, run, others))


def residents(config: Config, share: RankBytes) -> tuple[dict[str, float], float]:
    """(bytes that stay on the GPU over a step, bytes in host memory), per rank."""
    size = DTYPES[config.train.dtype].itemsize
    bucket = BUCKET_ELEMENTS
    if config.cluster.device == "cpu":  # what is never written takes no memory there
        bucket = min(bucket, share.trained_slice)
    on_gpu = {
        "weights (ZeRO-3 shards)": share.weights,
        "small weights, kept whole": share.kept_whole,
        "gradients: bucket to be sent": bucket * size,
    }
    state = {
        "gradients: accumulated (fp32)": share.gradients,
        "fp32 masters": share.masters,
        "optimizer": share.optimizer,
        "EMA (fp32)": share.ema,
    }
    if config.parallel.offload_optimizer:
        return on_gpu, sum(
            state.values()
        ) + share.gradients + share.update / 2  # gradients once more, as the update reads them
    return on_gpu | state, 0


def phase_needs(
    config: Config, share: RankBytes, records: list[Record]
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """What each phase of a step needs on top of the residents: (sums, components), in bytes."""
    size, parallel = DTYPES[config.train.dtype].itemsize, config.parallel
    gathered = float(share.gathered)
    if gathered and config.mode != "tied":
        gathered += min(KEPT_FOR_REUSE * size, share.student_pass)
    if not parallel.memory_efficient_linear and parallel.tp == 1:
        gathered += share.linears_gathered * (1 - recomputed_share(config))
    parts: dict[str, dict[str, float]] = {}
    for record in records:
        for phase, peak in record.peaks.items():
            kept = min(record.kept, peak.total - peak.policy)
            part = {
                "gathered blocks": gathered,
                "activations kept for the backward pass": kept,
                f"working memory ({phase})": peak.total - peak.policy - kept,
                "head outputs and policy": peak.policy,
            }
            if phase == "backward":
                # The bucket's gradients are put into the order of the ranks before they are sent.
                part["gradients: bucket, rearranged"] = min(BUCKET_ELEMENTS, share.trained_slice) * size
            if phase not in parts or sum(part.values()) > sum(parts[phase].values()):
                parts[phase] = part
    parts["update"] = {"working memory (update)": 0 if parallel.offload_optimizer else share.update}
    return {phase: sum(part.values()) for phase, part in parts.items()}, parts


def recomputed_share(config: Config) -> float:
    every = config.parallel.recompute_every
    blocks = sum(getattr(config.model, name) for name in architecture(config.model).depths)
    return -(-blocks // every) / blocks if every else 0.0


def reserve(cluster: ClusterConfig, used: float) -> float:
    if cluster.device == "cpu":
        return CONTEXT + FRAGMENTED * used
    return CONTEXT + MESSAGES * (cluster.world_size > 1) + FRAGMENTED * used


def step_traffic(config: Config, share: RankBytes, record: Record, micro_batches: int) -> list[Traffic]:
    """All messages of a step but the few bytes of losses and norms."""
    cluster, tp = config.cluster, config.parallel.tp
    dp = cluster.world_size // tp
    size, rows = DTYPES[config.train.dtype].itemsize, []

    def over_data_parallel(name: str, count: float, each: float, rounds: int = 1) -> None:
        """each: bytes of the whole, of which a rank has its part before (all-gather) or after (reduce-scatter)."""
        if dp == 1 or count == 0:
            return
        inside = each * (dp - 1) / dp / (cluster.intra_node_gb_s * 1e9)
        # Every tensor-parallel rank's group brings its whole into each node once.
        between = each * tp * (cluster.nodes - 1) / cluster.nodes / (cluster.inter_node_gb_s * 1e9)
        link = "between nodes" if between > inside else "inside a node"
        rows.append(Traffic(name, link, count, count * each, rounds * count * max(inside, between)))

    passes = record.calls
    over_data_parallel(
        "all-gather of weights, student forward", passes["student forward"] * micro_batches, share.student_pass
    )
    # Recomputed blocks stay gathered from their second forward pass to their backward pass.
    over_data_parallel("all-gather of weights, backward", passes["backward"] * micro_batches, share.student_pass)
    over_data_parallel("all-gather of weights, derivative", passes["derivative"] * micro_batches, share.student_pass)
    over_data_parallel("all-gather of weights, teacher", passes["teacher"] * micro_batches, share.teacher_pass)
    muon = config.optim.type == "muon"  # DeepSpeed's Muon wants whole gradients
    name = "all-reduce of gradients" if muon else "reduce-scatter of gradients"
    over_data_parallel(name, passes["backward"] * micro_batches, share.trained_slice * size, 2 if muon else 1)
    over_data_parallel("all-gather of small weights, update", 1, share.kept_whole)
    for (phase, kind), messages in record.messages.items():
        rounds = 2 if kind == "all-reduce" else 1
        seconds = rounds * messages.bytes * (tp - 1) / tp / (cluster.intra_node_gb_s * 1e9)
        name = f"tensor-parallel {kind}, {phase}"
        count = messages.count * micro_batches
        rows.append(Traffic(name, "inside a node", count, messages.bytes * micro_batches, seconds * micro_batches))
    return rows


def alternatives(config: Config) -> list[list[tuple[str, Any]]]:
    """Settings that need less memory, each with its values: mild ones first."""
    parallel, train, distill, cluster = config.parallel, config.train, config.distill, config.cluster
    _, micro = train.accumulation(cluster.world_size // parallel.tp)
    groups = [
        [("parallel.recompute_every", every) for every in (2, 1) if not 0 < parallel.recompute_every <= every],
        [("train.micro_batch_size", n) for n in range(micro - 1, 0, -1) if micro % n == 0],
        [("distill.stack_teacher_states", False)]
        if config.distils and distill.stack_teacher_states and distill.num_intermediate_states > 1
        else [],
        [("parallel.tp", tp) for tp in (2, 4, 8) if parallel.tp < tp <= cluster.gpus_per_node],
        [] if parallel.offload_optimizer else [("parallel.offload_optimizer", True)],
        [("mode", "tied")] if config.distils and config.mode == "full" else [],
    ]
    return [group for group in groups if group]


def changed(config: Config, changes: dict[str, Any]) -> Config:
    """The configuration with dotted keys changed, checked as a whole. Raises ConfigError."""
    sections: dict[str, dict[str, Any]] = {}
    top = {}
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        if section:
            sections.setdefault(section, {})[name] = value
        else:
            top[name] = value
    parts = {name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    return dataclasses.replace(config, **parts, **top)


def text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
