"""Measuring several sources side by side, over any number of processes: `python -m piflow_dist.evaluation.compare SETTINGS.yaml`.

Each rank looks at its share of the images; features and scores are put together in the order of images (shares.py). Then each
metric of each source is computed by one rank, whole, so that no result depends on the number of ranks.
"""

import json
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record

from data_pipeline.errors import DataError
from piflow_dist.checkpoint.files import write_atomic
from piflow_dist.config import read_config
from piflow_dist.evaluation import quality
from piflow_dist.evaluation.instruments import Tools, open_tools, scorers
from piflow_dist.evaluation.measures import measures_of
from piflow_dist.evaluation.metrics import NotMeasurable, psnr_per_image
from piflow_dist.evaluation.networks import FeatureNetwork, Lpips, SmallNetwork
from piflow_dist.evaluation.quality import Result
from piflow_dist.evaluation.real import by_shape
from piflow_dist.evaluation.samples import EvaluationError, SampleFolder, distinct_titles, open_samples, pair_up
from piflow_dist.evaluation.settings import EvaluateConfig
from piflow_dist.evaluation.shares import Share
from piflow_dist.launch.console import StepProgress
from piflow_dist.launch.failures import last_words

RESULT = "result.json"
SMALL = 32
"""Edge that images are brought to for distances between pixels."""
READERS = 4
OF_FEATURES = (
    "inception_score",
    "fid",
    "kid",
    "precision",
    "recall",
    "patch_fid",
    "diversity",
    "fid_reference",
    "prompt_accuracy",
)
"""Metrics that a feature network gives."""


@dataclass
class Row:
    """All measurements of one source: numbers, or the reason why there is none."""

    name: str
    title: str
    kind: str
    steps: int | None
    count: int
    folder: str
    pairs: int | None = None
    """Images that have a partner in the reference; None of the reference itself, and without one."""
    results: dict[str, Result] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def look_at(
    samples: SampleFolder,
    reference: SampleFolder | None,
    pairs: dict[int, int],
    tools: Tools,
    share: Share,
    batch_size: int,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """({what: one row an image}, {what: why it is not there}); the same on every rank.

    pairs: places of images -> those of their partners in the reference. An image without one has rows that are not a number.
    """
    rows: dict[str, dict[int, Tensor]] = {key: {} for key in rows_of(tools, reference)}
    failed: dict[str, str] = {}
    with (
        StepProgress(
            f"{samples.name} (process 0 of {share.world_size})", len(samples), every=10 * batch_size
        ) as progress,
        ThreadPoolExecutor(READERS) as readers,
    ):
        for indices in share.batches(len(samples), batch_size):
            images = list(readers.map(samples.image, indices))
            for place, image in enumerate(images):
                rows["pixels"][indices[place]] = reduced(image)
            if tools.network is not None:
                try:
                    add_features(rows, tools.network, images, indices)
                except NotMeasurable as reason:
                    failed |= dict.fromkeys(OF_FEATURES, str(reason))
            prompts = [samples.prompts[index] for index in indices]
            for key, scorer in scorers(tools).items():
                try:
                    rows[key] |= dict(zip(indices, scorer(images, prompts), strict=True))
                except NotMeasurable as reason:
                    failed.setdefault(key, str(reason))
            if reference is not None:
                paired = {index: pairs[index] for index in indices if index in pairs}
                theirs = dict(zip(paired, readers.map(reference.image, paired.values()), strict=True))
                for index, their in theirs.items():
                    mine = images[index - indices.start]
                    add_comparison(rows, (mine, their), samples, reference, (index, paired[index]), tools.lpips)
            if share.is_main:
                progress.update(min(indices[-1] + 1, len(samples)))
    gathered = {key: share.gather(rows[key], len(samples)) for key in sorted(rows)}
    return gathered, share.together(failed)


def rows_of(tools: Tools, reference: SampleFolder | None) -> list[str]:
    keys = ["pixels", *scorers(tools)]
    keys += ["features", "logits", "patch"] if tools.network is not None else []
    if reference is not None:
        keys += ["psnr", "latent"] + (["lpips"] if tools.lpips is not None else [])
    return keys


def add_features(
    rows: dict[str, dict[int, Tensor]], network: FeatureNetwork, images: list[Tensor], indices: range
) -> None:
    for members in by_shape(images):
        batch_Bchw = torch.stack([images[place] for place in members])
        features_BD, logits_BK = network.describe(batch_Bchw)
        patch_BD = network.describe_patch(batch_Bchw)
        for row, place in enumerate(members):
            rows["features"][indices[place]], rows["logits"][indices[place]] = features_BD[row], logits_BK[row]
            if patch_BD is not None:
                rows["patch"][indices[place]] = patch_BD[row]


def add_comparison(
    rows: dict[str, dict[int, Tensor]],
    images: tuple[Tensor, Tensor],
    samples: SampleFolder,
    reference: SampleFolder,
    places: tuple[int, int],
    lpips: Lpips | None,
) -> None:
    """An image against the reference's from the same noise."""
    (mine, their), (place, their_place) = images, places
    if mine.shape != their.shape:
        raise EvaluationError(
            f"{samples.path / samples.lines[place]['file']} is {tuple(mine.shape)} and "
            f"{reference.path / reference.lines[their_place]['file']} {tuple(their.shape)} (channels, height, width): they are not "
            "from the same noise. Sample both at one size, or leave reference= out."
        )
    rows["psnr"][place] = psnr_per_image(mine[None], their[None])[0]
    if lpips is not None:
        rows["lpips"][place] = lpips.distance(mine[None], their[None])[0]
    z, z_reference = samples.latent(place), reference.latent(their_place)
    if z is not None and z_reference is not None and z.shape == z_reference.shape:
        parts = ((z.double() - z_reference.double()).square().sum(), z_reference.double().square().sum())
        rows["latent"][place] = torch.stack(parts)


def reduced(image_chw: Tensor) -> Tensor:
    """Flat pixels in [0, 1], at one size for images of all sizes: small enough that a row of every image is kept."""
    return F.adaptive_avg_pool2d(image_chw.float() / 255, SMALL).reshape(-1)


def compare(config: EvaluateConfig, share: Share) -> dict[str, Any] | None:
    """Everything measured, on rank 0; None on the others. Raises EvaluationError where inputs do not fit each other.

    On a CPU with one thread, as the order of a sum over threads depends on their number: more cores are used by more processes.
    """
    threads = torch.get_num_threads()
    if share.device.type == "cpu":
        torch.set_num_threads(1)
    try:
        return measure_all(config, share)
    finally:
        torch.set_num_threads(threads)


def measure_all(config: EvaluateConfig, share: Share) -> dict[str, Any] | None:
    folders = [open_samples(path) for path in config.samples]
    reference = find_reference(config, folders)
    pairs = {samples.path: {} if reference is None else pair_up(samples, reference) for samples in folders}
    tools = open_tools(config, share, folders[0].image(0) if folders else None)
    if config.stats is not None:
        if tools.real is None:
            reason = tools.notes["features" if tools.network is None else "real"]
            raise EvaluationError(f"stats={config.stats} cannot be made: {reason}")
        if share.is_main:
            tools.real.save(Path(config.stats))
    everything = folders + ([reference] if reference is not None and reference not in folders else [])
    seen, notes = {}, {}
    for samples in everything:
        compared = None if samples is reference else reference
        seen[samples.path], notes[samples.path] = look_at(
            samples, compared, pairs.get(samples.path, {}), tools, share, config.batch_size
        )
    tasks = [
        (number, measure)
        for number, samples in enumerate(folders)
        for measure in measures_of(samples, seen, reference, pairs[samples.path], tools, config.resamples, share.device)
        if not set(measure.keys) & unusable(notes, samples, reference)
    ]
    mine: dict[int, dict[str, Result] | str] = {}
    for index in share.tasks([measure.cost for _, measure in tasks]):
        try:
            mine[index] = tasks[index][1]()
        except NotMeasurable as reason:
            mine[index] = str(reason)
    found = share.together(mine)
    if not share.is_main:
        return None
    rows = [describe(samples, tools, notes[samples.path], samples is reference, reference) for samples in folders]
    for row, samples, title in zip(rows, folders, distinct_titles(folders), strict=True):
        row.title = title
        row.pairs = None if reference in (None, samples) else len(pairs[samples.path])
    for index, (number, measure) in enumerate(tasks):
        outcome = found[index]
        if isinstance(outcome, str):
            rows[number].notes = dict.fromkeys(measure.keys, outcome) | rows[number].notes
        else:
            rows[number].results |= outcome
    return as_json(config, rows, reference, tools)


def unusable(notes: dict[Path, dict[str, str]], samples: SampleFolder, reference: SampleFolder | None) -> set[str]:
    """Metrics that images of this source or, for those that compare with it, of the reference could not be described for."""
    theirs = notes[reference.path] if reference is not None else {}
    missing = set(notes[samples.path]) & set(OF_FEATURES)
    for key in ("diversity", "fid_reference"):
        if key in theirs:
            missing.add(key)
            notes[samples.path].setdefault(key, f"of the reference: {theirs[key]}")
    return missing


def find_reference(config: EvaluateConfig, folders: list[SampleFolder]) -> SampleFolder | None:
    if config.reference is None:
        return None
    named = next((samples for samples in folders if samples.name == config.reference), None)
    if named is None:
        path = Path(config.reference).resolve()
        named = next((samples for samples in folders if samples.path.resolve() == path), None)
    return named or open_samples(config.reference)


def describe(
    samples: SampleFolder, tools: Tools, failed: dict[str, str], is_reference: bool, reference: SampleFolder | None
) -> Row:
    """A row with what its folder says, and the reasons for what was not attempted."""
    row = Row(samples.name, samples.title, samples.kind, samples.steps, len(samples), str(samples.path))
    meta = samples.meta
    row.results["evaluations_per_image"] = Result(float(meta["network_evaluations"]))
    if meta["seconds"] > 0:
        row.results["images_per_second"] = Result(meta["images"] / meta["seconds"])
    else:
        row.notes["images_per_second"] = f"meta.json says that sampling took {meta['seconds']} seconds."
    if tools.network is None:
        row.notes |= dict.fromkeys(OF_FEATURES, tools.notes["features"])
    elif tools.real is None:
        row.notes |= dict.fromkeys(
            ("fid", "kid", "precision", "recall", "patch_fid"), tools.notes.get("real", "no real images.")
        )
    if tools.network is not None and not isinstance(tools.network, SmallNetwork):
        row.notes["prompt_accuracy"] = "is of the small network of a data set alone."
    for key in ("psnr_db", "lpips", "latent_relative_error", "fid_reference", "diversity", "diversity_pixels"):
        if reference is None:
            row.notes[key] = "no reference was given. Set reference=DIR."
        elif is_reference and not key.startswith("diversity"):
            row.notes[key] = "this is the reference."
    row.notes = {key: note for key, note in tools.notes.items() if key not in ("features", "real")} | row.notes | failed
    return row


def as_json(config: EvaluateConfig, rows: list[Row], reference: SampleFolder | None, tools: Tools) -> dict[str, Any]:
    for row in rows:
        row.notes = {key: note for key, note in row.notes.items() if key not in row.results}
    definitions = {metric.key: metric.definition for metric in quality.QUALITY}
    definitions |= {reward.name: "Score of your own (rewards=), averaged over images." for reward in tools.rewards}
    return {
        "format": 2,
        "reference": None if reference is None else reference.name,
        "reference_folder": None if reference is None else str(reference.path),
        "reference_count": None if reference is None else len(reference),
        "network": None if tools.network is None else tools.network.title,
        "real": None if tools.real is None else tools.real.title,
        "missing": tools.notes,
        "resamples": config.resamples,
        "intervals": quality.BOOTSTRAP,
        "rewards": [entry.partition(":")[2] for entry in config.rewards],
        "definitions": definitions,
        "rows": [asdict(row) for row in rows],
    }


@record
def main() -> None:
    from piflow_dist.parallel.topology import start_process_group

    config = read_config(Path(sys.argv[1]), EvaluateConfig)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    topology = start_process_group(config.launch.device, config.launch.timeout_seconds)
    share = Share.of(topology)
    with last_words(Path(sys.argv[1]).parent, topology.rank, (EvaluationError, DataError)):
        result = compare(config, share)
    if result is not None:
        write_atomic(Path(sys.argv[1]).with_name(RESULT), json.dumps(result, indent=1) + "\n")
    share.wait()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
