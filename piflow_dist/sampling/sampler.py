"""One process's share of a sampling request; `python -m piflow_dist.sampling.sampler SETTINGS.yaml`, one per rank.

Data-parallel ranks make different images, the ranks of a tensor-parallel group the same ones together. An image's pixels depend
on its prompt, seed and size, the weights and the settings: not on ranks, batches or order. What that takes is in `Sampler`.

B rows of the network, C latent channels, H W latent size, L text tokens, D width; images are (c, h, w) with their own size.
"""

import logging
import signal
import sys
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record

from data_pipeline.codec import Codec, load_codec
from data_pipeline.errors import DataError
from piflow_dist.checkpoint.files import CheckpointError
from piflow_dist.config import ConfigError, GuidanceConfig, read_config
from piflow_dist.distill.objectives import Batch, Network, TeacherVelocity
from piflow_dist.distill.student import predictor, takes_end, trained_nfe
from piflow_dist.flow.schedule import FlowSchedule
from piflow_dist.flow.solvers import euler_sample, policy_sample
from piflow_dist.launch.console import StepProgress
from piflow_dist.launch.failures import last_words
from piflow_dist.models.heads import PATCH
from piflow_dist.parallel.topology import Topology
from piflow_dist.sampling.control import Control, start_ranks
from piflow_dist.sampling.embeddings import EmbeddingCache
from piflow_dist.sampling.failures import FailureLog
from piflow_dist.sampling.gather import check_unchanged
from piflow_dist.sampling.images import ImageRequest, save_image, to_uint8
from piflow_dist.sampling.network import load_network
from piflow_dist.sampling.settings import SampleConfig, SampleRequest, build_request

log = logging.getLogger(__name__)

NO_ROOM = "the device's memory does not suffice"
SHOWN_CUTS = 5
LIVE, PLAIN = 0.5, 10.0
"""Seconds between two looks at how many images there are: for a bar on a terminal, and for lines in a log."""
CPU_TOKENS = 1024
"""Tokens of one evaluation on a CPU, about: more rows gain nothing there."""


class Sampler:
    """A network on its device, with the prompts' embeddings: images in, latents out.

    On a CPU the last bits of a matrix product depend on how many rows it has (the library chooses its kernel by that), not on
    which row is where or what the others hold (measured, docs/decisions.md). So every evaluation there has a number of rows that
    follows from the image's own tokens alone, and spare rows are filled with copies. Text is not padded to other prompts' length:
    images of one evaluation have prompts of one length.
    """

    def __init__(self, request: SampleRequest, network: Network, cache: EmbeddingCache, device: torch.device):
        self.request, self.network, self.cache, self.device = request, network, cache, device
        self.empty_LD = self.embedding("").to(device)

    def embedding(self, prompt: str) -> Tensor:
        found = self.cache.read(prompt)
        if found is None:
            raise FileNotFoundError(f"{self.cache.path(prompt)}, the embedding of {prompt!r}, is gone. Start again.")
        return found

    def pieces(self, images: list[ImageRequest]) -> list[list[ImageRequest]]:
        """Images that are made at once: of one size and one length of prompt, batch_size at most."""
        prompts = {image.prompt for image in images}
        lengths = {prompt: self.cache.length(prompt) for prompt in prompts}

        def shape(image: ImageRequest) -> tuple[int, int, int]:
            return image.height, image.width, lengths[image.prompt]

        pieces = []
        for (_, _, length), same in groupby(sorted(images, key=shape), key=shape):
            group = list(same)
            size = min(self.request.config.batch_size, self.rows(group[0], length) or len(group))
            pieces += [group[start : start + size] for start in range(0, len(group), size)]
        return pieces

    def rows(self, image: ImageRequest, text_length: int) -> int | None:
        """How many images one evaluation has, whether wanted or not; None: as many as wanted."""
        if self.device.type != "cpu":
            return None
        _, H, W = self.request.latent_shape(image)
        tokens = (H // PATCH) * (W // PATCH) + text_length
        return 1 << max(0, (CPU_TOKENS // tokens).bit_length() - 1)

    @torch.no_grad()
    def sample(self, images: list[ImageRequest]) -> Tensor:
        """Latents (n,C,H,W), float32, of the images of one piece."""
        texts = {prompt: self.embedding(prompt) for prompt in {image.prompt for image in images}}
        rows = self.rows(images[0], len(texts[images[0].prompt])) or len(images)
        filled = images + images[-1:] * (rows - len(images))
        generators = [torch.Generator().manual_seed(image.noise_seed) for image in filled]
        shape = self.request.latent_shape(images[0])
        noise_BCHW = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(self.device)
        text_BLD = torch.stack([texts[image.prompt] for image in filled]).to(self.device)
        mask_BL = torch.ones(text_BLD.shape[:2], dtype=torch.bool, device=self.device)
        batch, schedule = Batch(noise_BCHW, text_BLD, mask_BL, self.empty_LD), self.request.schedule(images[0])
        if self.request.kind == "teacher":
            return self._teacher(noise_BCHW, batch, schedule)[: len(images)]
        return self._student(noise_BCHW, batch, schedule, generators)[: len(images)]

    def _teacher(self, noise_BCHW: Tensor, batch: Batch, schedule: FlowSchedule) -> Tensor:
        config = self.request.config
        guidance = GuidanceConfig(scale=config.guidance, interval=config.guidance_interval)
        velocity = TeacherVelocity(self.network, batch, guidance, self.request.run.model.guidance_embeds)
        return euler_sample(velocity, noise_BCHW, schedule, config.steps)

    def _student(
        self, noise_BCHW: Tensor, batch: Batch, schedule: FlowSchedule, generators: list[torch.Generator]
    ) -> Tensor:
        run, config = self.request.run, self.request.config

        return policy_sample(
            predictor(self.network, batch, run, schedule),
            noise_BCHW,
            schedule,
            self.request.evaluations,
            final_step_size_scale=run.distill.final_step_size_scale,
            trained_nfe=trained_nfe(run),
            total_substeps=config.substeps,
            temperature=self.request.temperature,
            h=float(config.h),
            generators=generators,
            with_end=takes_end(run),
        )


def sample_or_none(sampler: Sampler, piece: list[ImageRequest]) -> Tensor | None:
    """Latents on the CPU; None where the device's memory does not hold so many images."""
    try:
        return sampler.sample(piece).cpu()  # waits for the device
    except torch.OutOfMemoryError:
        config = sampler.request.config
        if config.parallel.tp > 1 or config.parallel.shard_base:  # the others are in the middle of it
            raise
    return None


class Saver:
    """Decodes and writes images, the files beside the next evaluation: compressing pixels takes no GPU."""

    def __init__(
        self,
        request: SampleRequest,
        codec: Codec,
        failures: FailureLog,
        device: torch.device,
        cuts: Mapping[str, str],
    ):
        """cuts: what was left out of prompts, which their images say too."""
        self.request, self.codec, self.failures, self.device, self.cuts = request, codec, failures, device, cuts
        self.writer, self.waiting = ThreadPoolExecutor(1), list[Future]()
        self.info = {"source": str(request.checkpoint), **request.settings()}
        self.side_by_side = request.config.launch.processes // request.config.parallel.tp

    def save(self, images: list[ImageRequest], latents_nCHW: Tensor, seconds: float, compiled: bool = False) -> None:
        """latents on the CPU. seconds: that sampling them took, whose share is kept with each image for the folder's rate.
        compiled: the network was compiled in that time."""
        self.finish()
        info = {**self.info, "seconds": seconds / len(images) / self.side_by_side}
        info |= {"compiled": True} if compiled else {}
        for image, latents_CHW in zip(images, latents_nCHW, strict=True):
            if not latents_CHW.isfinite().all():
                self.failures.add([image], "its latents are not finite: the weights or the settings diverge.")
                continue
            try:
                # One by one: a VAE's memory is that of one image, and its last bits do not depend on the others.
                pixels_chw = self.codec.decode(latents_CHW[None].to(self.device))[0]
            except torch.OutOfMemoryError:
                self.failures.add([image], f"{NO_ROOM} to decode it: ask for a smaller size.")
                continue
            if not pixels_chw.isfinite().all():
                self.failures.add([image], "its pixels are not finite: the decoder diverges.")
                continue
            kept = latents_CHW if self.request.config.latents else None
            cut = {"cut": self.cuts[image.prompt]} if image.prompt in self.cuts else {}
            file = (self.request.out, image, to_uint8(pixels_chw), kept, info | cut)
            self.waiting.append(self.writer.submit(save_image, *file))

    def finish(self) -> None:
        """Wait for the files of earlier images. Raises what went wrong with them."""
        for future in self.waiting:
            future.result()
        self.waiting.clear()


def encode_prompts(
    request: SampleRequest,
    images: list[ImageRequest],
    cache: EmbeddingCache,
    failures: FailureLog,
    topology: Topology,
    control: Control,
) -> list[ImageRequest]:
    """Fill the cache, every rank with prompts of its own, and return the images whose prompt has an embedding."""
    prompts = sorted({image.prompt for image in images} | {""})
    mine = prompts[topology.rank :: topology.world_size]
    reasons = cache.encode(mine, topology.device)
    if "" in reasons:
        raise ValueError(f"The empty prompt cannot be encoded: {reasons['']}")
    for prompt, reason in reasons.items():
        failures.add([image for image in images if image.prompt == prompt], reason)
    if topology.device.type != "cpu":
        torch.accelerator.empty_cache()  # of the encoder, before the network comes
    failed = control.any_rank([prompt in reasons for prompt in prompts])
    bad = {prompt for prompt, any_failed in zip(prompts, failed, strict=True) if any_failed}
    return [image for image in images if image.prompt not in bad]


def find_cuts(images: list[ImageRequest], cache: EmbeddingCache, is_main: bool) -> dict[str, str]:
    """Prompt -> what its encoder left out, of those that are longer than it reads; rank 0 says so before the work begins."""
    first = {image.prompt: image.prompt_index for image in reversed(images)}
    cuts = {prompt: cut for prompt in sorted(first, key=first.__getitem__) if (cut := cache.cut(prompt))}
    if cuts and is_main:
        shown = "".join(f"\n  prompt {first[prompt]}: {cut}" for prompt, cut in list(cuts.items())[:SHOWN_CUTS])
        more = "\n  ..." if len(cuts) > SHOWN_CUTS else ""
        log.warning(
            "%d of %d prompts are longer than the text encoder reads (each is named as `cut` in manifest.jsonl):%s%s",
            *(len(cuts), len(first), shown, more),
        )
    return cuts


def run(request: SampleRequest, topology: Topology, control: Control) -> None:
    """Make the missing images. Ranks agree on what is missing before the first image, so that each makes its own."""
    config, out = request.config, request.out
    absent = {image.index for image in request.missing()}
    wanted = control.from_main([image.index in absent for image in request.images])
    images = [image for image, is_wanted in zip(request.images, wanted, strict=True) if is_wanted]
    failures = FailureLog(out, topology.rank)
    cache = EmbeddingCache(config.embeddings_folder, request.dataset.prompt_encoder)
    images = encode_prompts(request, images, cache, failures, topology, control)
    if not images:
        return
    cuts = find_cuts(images, cache, topology.is_main)
    codec = load_codec(request.dataset.codec, topology.device)
    sampler = Sampler(request, load_network(request, topology), cache, topology.device)
    pieces = sampler.pieces(images)
    mine = pieces[topology.dp_rank :: topology.dp_size]
    saver = Saver(request, codec, failures, topology.device, cuts)
    control.share_layers(topology, config.parallel.shard_base)
    before = len(request.images) - len(absent)
    with StepProgress(out.name, len(request.images), start=before, every=1) as progress:
        began = due = time.perf_counter()
        waiting, shapes = mine[::-1], set()
        while waiting:
            control.wait_for_layers()
            piece, start = waiting.pop(), time.perf_counter()
            latents_nCHW = sample_or_none(sampler, piece)
            if latents_nCHW is None:
                half = len(piece) // 2
                if half:
                    waiting += [piece[half:], piece[:half]]
                else:
                    failures.add(piece, f"{NO_ROOM} to sample it: ask for a smaller size, dtype=bf16 or parallel.tp.")
                if topology.device.type != "cpu":
                    torch.accelerator.empty_cache()  # of pieces of another size
                continue
            if topology.tp_rank == 0:
                shape = (*latents_nCHW.shape, cache.length(piece[0].prompt))
                saver.save(piece, latents_nCHW, time.perf_counter() - start, config.compile and shape not in shapes)
                shapes.add(shape)
            if topology.is_main and time.perf_counter() > due:
                due = time.perf_counter() + (LIVE if progress.bar else PLAIN)
                done = count_whole(out)  # of all ranks
                rate = (done - before) / (time.perf_counter() - began)
                progress.update(done, f"{rate:.3g} images/s" if rate else "")
        if config.parallel.shard_base and len(mine) < -(-len(pieces) // topology.dp_size):
            control.wait_for_layers()
            sampler.sample(pieces[-1])  # the others need this rank's part of every layer once more
        saver.finish()
        control.wait_for_all()
        if topology.is_main:
            progress.update(count_whole(out))


def count_whole(out: Path) -> int:
    return sum(1 for _ in (out / "images").glob("[0-9]*.png"))


@record
def main() -> None:
    config = read_config(Path(sys.argv[1]), SampleConfig)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    topology, control = start_ranks(config)
    with last_words(Path(config.out), topology.rank, (ConfigError, CheckpointError, DataError)):
        request = build_request(config)
        check_unchanged(request)
        run(request, topology, control)
    control.close()


if __name__ == "__main__":
    main()
