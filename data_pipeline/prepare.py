"""Raw images and captions -> DALI -> latents and embeddings -> MDS shards beside a dataset.json: `prepare(config)`."""

import logging
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock

from data_pipeline.codec import BlockCodec, Codec, load_codec
from data_pipeline.decode import Decoder
from data_pipeline.description import FILE_NAME, DatasetDescription, check_files, load_description
from data_pipeline.digits import DigitSource
from data_pipeline.empty_prompt import write_empty_prompt
from data_pipeline.errors import DataError
from data_pipeline.parts import MOST_LISTED_PROMPTS, Assembled, Workshop, assemble, work_off
from data_pipeline.plan import OpenItems, Plan, make_plan, wait_for_plan
from data_pipeline.prepare_settings import PrepareConfig
from data_pipeline.progress import Progress
from data_pipeline.prompts import PromptEncoder, load_prompt_encoder
from data_pipeline.shared import describe_shared, encoder_of_captions, pretrained_codec, pretrained_prompt_encoder
from data_pipeline.source import Source
from data_pipeline.staging import publish, staging_folder
from data_pipeline.world import local_device, rank_and_size
from data_pipeline.writing import SplitWriter, encode_images, in_batches, latent_deviation

PACKAGES = ("mosaicml-streaming", "numpy", "nvidia-dali-cuda130", "torch")
logger = logging.getLogger(__name__)


def prepare(config: PrepareConfig, *, show_progress: bool = True) -> DatasetDescription | None:
    """Write the set `config.out`, or return at once where a whole one with the same settings is there.

    The folder appears under its name only when everything in it is written: a killed call leaves nothing that could be
    taken for a set. All sources but the digits may be worked off by several processes (torchrun or SLURM tasks), and
    what a killed call has finished is not done again; a process that has done its share while others are still at work
    returns None. Raises ValueError (`out` holds something else), DataError (an image or caption cannot be used, the
    source or the finished set in `out` is damaged), OSError (folder not writable, disk full).
    """
    out = Path(config.out).absolute()
    if not config.overwrite and (finished := _finished(out, config)) is not None:
        shutil.rmtree(config.work_folder, ignore_errors=True)  # of a call that was killed after its last step
        return finished
    if config.source == "digits" and rank_and_size()[0] > 0:
        return None  # seconds of work, which are not shared
    try:
        return (
            _prepare_digits(out, config, show_progress)
            if config.source == "digits"
            else _prepare_together(out, config, show_progress)
        )
    except OSError as error:
        if error.errno is None:
            raise  # one of our own: a source or a model that is not there
        raise OSError(f"Cannot write {out}: {error}. Choose another out=, or free space there.") from error


def _prepare_digits(out: Path, config: PrepareConfig, show_progress: bool) -> DatasetDescription:
    with staging_folder(out) as staged:
        _write_set(staged, config, show_progress)
        try:
            publish(staged, out, replace=config.overwrite)
        except FileExistsError:
            # Another call was faster. Its set is as good as ours if the settings are the same.
            if (finished := _finished(out, config)) is None:
                raise
            return finished
    return load_description(out)


def _prepare_together(out: Path, config: PrepareConfig, show_progress: bool) -> DatasetDescription | None:
    """_prepare_parts beside other ranks, of which one publishes the set and removes the parts at whatever moment of this one."""
    try:
        return _prepare_parts(out, config, show_progress)
    except (FileNotFoundError, FileExistsError):
        if config.overwrite or (finished := _finished(out, config)) is None:
            raise
        shutil.rmtree(config.work_folder, ignore_errors=True)  # waiting for a lock makes its folder again
        return finished


def _prepare_parts(out: Path, config: PrepareConfig, show_progress: bool) -> DatasetDescription | None:
    rank, size = rank_and_size()
    if config.overwrite and size > 1:
        raise ValueError(f"overwrite=true on {size} processes: each would remove what the others make. Remove {out}.")
    device = local_device(config.device)
    opened: list[tuple[Codec, PromptEncoder]] = []

    def describe(items: OpenItems) -> dict[str, Any]:
        shared = describe_shared(config, items)
        opened.append(_open_models(shared, device))  # before there is a plan: a wrong model_path leaves none behind
        return shared

    if rank == 0:
        plan = make_plan(config, describe)
    else:
        plan = wait_for_plan(config, rank, lambda: _finished(out, config))
        if plan is None:
            return load_description(out)
    codec, encoder = opened[0] if opened else _open_models(plan.shared, device)
    shape = plan.shared["prompt_shape"]
    shop = Workshop.open(config, codec, encoder, device, tuple(shape) if shape else None)
    with Progress(show_progress and rank == 0) as progress:
        _work(plan, rank, size, shop, progress)
    return _publish_if_whole(plan, out, config, shop, rank)


def _open_models(shared: Mapping[str, Any], device: str) -> tuple[Codec, PromptEncoder]:
    return load_codec(shared["codec"], device), load_prompt_encoder(shared["prompt_encoder"], device)


def _work(plan: Plan, rank: int, size: int, shop: Workshop, progress: Progress) -> None:
    """This process's share: every `size`-th part, so that no two ever want the same one."""
    mine = plan.parts[rank::size]
    waiting = plan.unfinished()
    done = sum(part.items for part in plan.parts if part not in waiting)
    others = {part for part in waiting if part not in mine}
    with progress.stage("encoding", plan.total, completed=done) as advance:
        for part in mine:
            if part not in waiting:
                continue
            work_off(plan, part, shop, advance)
            still = others & set(plan.unfinished())
            advance(sum(part.items for part in others - still))
            others = still


def _publish_if_whole(
    plan: Plan, out: Path, config: PrepareConfig, shop: Workshop, rank: int
) -> DatasetDescription | None:
    """Whoever finds all parts finished puts them together."""
    missing = plan.unfinished()
    if missing:
        logger.info("rank %d has done its share; %d of %d parts are missing", rank, len(missing), len(plan.parts))
        return None
    with FileLock(plan.folder / ".lock"):
        staged = plan.folder / "set"
        assembled = assemble(plan, staged)
        _describe(plan, staged, config, shop, assembled)
        publish(staged, out, replace=config.overwrite)
    shutil.rmtree(plan.folder, ignore_errors=True)  # ranks that wait for the lock may put it there again, and remove it
    return load_description(out)


def _describe(plan: Plan, staged: Path, config: PrepareConfig, shop: Workshop, assembled: Assembled) -> None:
    if not assembled.bucket_lists:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in assembled.left_out.items())
        raise DataError(f"None of the {plan.total:,} samples of {config.path} can be used: {reasons}.")
    for what, counts in (("left out", assembled.left_out), ("changed", assembled.changed)):
        for reason, count in counts.items():
            logger.warning("%s: %d of %d samples (%s)", what, count, plan.total, reason)
    DatasetDescription(
        root=staged,
        bucket_lists=assembled.bucket_lists,
        codec=shop.codec.describe(),
        prompt_encoder=shop.prompt_encoder.describe(),
        prompt_dim=shop.prompt_encoder.dim,
        pooled_dim=shop.prompt_encoder.pooled_dim,
        prompts=assembled.prompts,
        source={
            "name": config.source,
            "path": config.path,
            "samples": plan.total,
            "items_sha256": plan.digest,
            "content_sha256": assembled.content,
        },
        request=config.request(),
        created_by={name: version(name) for name in PACKAGES},
        latents=config.latents if config.has_images() else "none",
        left_out=assembled.left_out,
        changed=assembled.changed,
        empty_prompt=write_empty_prompt(staged, shop.prompt_encoder),
    ).write()


def _finished(out: Path, config: PrepareConfig) -> DatasetDescription | None:
    """The set in `out` if it was made with these settings, None if the place is free. Anything else is an error."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / FILE_NAME).is_file():
        raise ValueError(f"out={out} exists and is not a data set (no {FILE_NAME}). Choose another folder.")
    description = load_description(out)
    if differing := config.differences(description.request):
        raise ValueError(
            f"out={out} holds a set made with {', '.join(differing)}. Choose another folder, or overwrite=true."
        )
    check_files(description)
    return description


def _write_set(folder: Path, config: PrepareConfig, show_progress: bool) -> None:
    source = _open_source(config)
    with Progress(show_progress) as progress:
        codec, decoder = _open_codec(config, source, progress)
        prompt_encoder = _open_prompt_encoder(config, source)
        bucket_lists = {}
        for split in source.splits:
            writer = SplitWriter(folder / split, prompt_encoder, config.shard_mb << 20, config.keep_images)
            with progress.stage(f"writing {split}", source.count(split)) as advance:
                for batch in in_batches(source.samples(split), config.batch_size):
                    for group, latents_BCHW in encode_images(batch, codec, decoder, config.device):
                        writer.write(group, latents_BCHW)
                    advance(len(batch))
                bucket_lists[split] = writer.finish()
            if not bucket_lists[split]:
                raise DataError(f"Split {split!r} has no samples.")
    captions = source.captions()
    DatasetDescription(
        root=folder,
        bucket_lists=bucket_lists,
        codec=codec.describe(),
        prompt_encoder=prompt_encoder.describe(),
        prompt_dim=prompt_encoder.dim,
        pooled_dim=prompt_encoder.pooled_dim,
        prompts=tuple(captions) if len(captions) <= MOST_LISTED_PROMPTS else (),
        source=source.describe(),
        request=config.request(),
        created_by={name: version(name) for name in PACKAGES},
        empty_prompt=write_empty_prompt(folder, prompt_encoder),
    ).write()


def _open_source(config: PrepareConfig) -> Source:
    return DigitSource()  # the only one so far; others are chosen here, by config.source


def _open_prompt_encoder(config: PrepareConfig, source: Source) -> PromptEncoder:
    if (pretrained := pretrained_prompt_encoder(config)) is not None:
        return load_prompt_encoder(pretrained, config.device)
    return encoder_of_captions(config, set(source.captions()))


def _open_codec(config: PrepareConfig, source: Source, progress: Progress) -> tuple[Codec, Decoder]:
    """The codec, and a decoder that gives it the image channels it wants."""
    if (pretrained := pretrained_codec(config)) is not None:
        vae = load_codec(pretrained, config.device)
        return vae, _open_decoder(config, vae.image_channels)
    decoder = _open_decoder(config, channels=1)
    split = source.splits[0]
    with progress.stage("measuring latents", source.count(split)) as advance:
        batches = in_batches(source.samples(split), config.batch_size)
        deviation = latent_deviation(batches, BlockCodec(image_channels=1), decoder, config.device, advance)
    return BlockCodec(image_channels=1, scale=1 / deviation), decoder


def _open_decoder(config: PrepareConfig, channels: int) -> Decoder:
    return Decoder(channels, device=config.decode_device, batch_size=config.batch_size, threads=config.threads)
