"""One process's share of a sampling request; `python -m piflow_dist.sampling.sampler SETTINGS.yaml`, one per rank.

A part (a batch of images) is one file, written under a temporary name and renamed: a killed run leaves whole parts or none,
and the same command makes the missing ones.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record

from data_pipeline.codec import Codec, load_codec
from data_pipeline.description import load_description
from data_pipeline.prompts import load_prompt_encoder, pad_prompts
from piflow_dist.config import GuidanceConfig, read_config
from piflow_dist.distill.objectives import Batch, TeacherVelocity, base_segment, build_schedule, guidance_input
from piflow_dist.flow.schedule import FlowSchedule
from piflow_dist.flow.solvers import euler_sample, policy_sample
from piflow_dist.launch.console import StepProgress
from piflow_dist.models.heads import make_policy
from piflow_dist.models.pretrained import load_model
from piflow_dist.parallel.environment import find_place
from piflow_dist.parallel.topology import choose_device, die_with_parent
from piflow_dist.policies import DXPolicy, GMFlowPolicy, MeanPolicy
from piflow_dist.sampling.settings import SampleConfig, SampleRequest, build_request, part_path


class Sampler:
    """A model on one device, with the codec and prompts of its data."""

    def __init__(self, request: SampleRequest, device: torch.device):
        self.request, self.device = request, device
        run = request.run
        description = load_description(run.data.root)
        self.latent_shape = description.typical_shape
        self.codec: Codec = load_codec(description.codec)
        encoder = load_prompt_encoder(description.prompt_encoder)
        unique = sorted(set(request.prompts))
        self.embeddings = dict(zip(unique, encoder.encode(unique), strict=True))
        self.empty_LD = encoder.encode([""])[0].to(device)
        self.model = load_model(request.checkpoint, run, request.config.ema).to(device).eval()
        self.schedule: FlowSchedule = build_schedule(run.schedule, self.latent_shape)

    @torch.no_grad()
    def sample(self, indices: range) -> Tensor:
        """Latents (n,C,H,W), float32, of the images with these indices."""
        generators = [torch.Generator().manual_seed(self.request.image_seed(index)) for index in indices]
        noise_BCHW = torch.stack([torch.randn(self.latent_shape, generator=g) for g in generators]).to(self.device)
        text_BLD, mask_BL = pad_prompts([self.embeddings[self.request.prompts[index]] for index in indices])
        batch = Batch(noise_BCHW, text_BLD.to(self.device), mask_BL.to(self.device), self.empty_LD)
        if self.request.kind == "teacher":
            return self._teacher(noise_BCHW, batch)
        return self._student(noise_BCHW, batch, generators)

    def _teacher(self, noise_BCHW: Tensor, batch: Batch) -> Tensor:
        guidance = GuidanceConfig(scale=self.request.config.guidance)
        velocity = TeacherVelocity(self.model, batch, guidance, self.request.run.model.guidance_embeds)
        return euler_sample(velocity, noise_BCHW, self.schedule, self.request.config.steps)

    def _student(self, noise_BCHW: Tensor, batch: Batch, generators: list[torch.Generator]) -> Tensor:
        run, config = self.request.run, self.request.config

        takes_span = run.policy.type == "mean"

        def predict(
            x_BCHW: Tensor, sigma_B: Tensor, tau_B: Tensor, end_B: Tensor | None = None
        ) -> GMFlowPolicy | DXPolicy | MeanPolicy:
            guidance_B = guidance_input(run.model.guidance_embeds, run.distill.guidance.scale, sigma_B)
            span_B = sigma_B - end_B if takes_span else None
            outputs = self.model(x_BCHW, sigma_B, batch.text_BLD, batch.mask_BL, guidance_B, span_B)
            return make_policy(outputs, x_BCHW, sigma_B, run.policy, base_segment(run), self.schedule.shift)

        return policy_sample(
            predict,
            noise_BCHW,
            self.schedule,
            self.request.evaluations,
            final_step_size_scale=run.distill.final_step_size_scale,
            trained_nfe=None if run.objective == "meanflow" else run.distill.nfe,
            total_substeps=config.substeps,
            temperature=self.request.temperature,
            h=float(config.h),
            generators=generators,
            with_end=takes_span,
        )


def to_uint8(images_Bchw: Tensor) -> Tensor:
    return ((images_Bchw.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def write_part(path: Path, latents_BCHW: Tensor, images_Bchw: Tensor, seconds: float) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    tensors = {
        "latents": latents_BCHW.float().cpu().contiguous(),
        "images": to_uint8(images_Bchw).contiguous(),
        "seconds": torch.tensor(seconds, dtype=torch.float64),
    }
    save_file(tensors, temporary)
    os.replace(temporary, path)


@record
def main() -> None:
    config = read_config(Path(sys.argv[1]), SampleConfig)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()
    place = find_place()
    rank, world_size = place.rank, place.world_size
    device = choose_device(config.launch.device, place.local_rank)
    request, out = build_request(config), Path(config.out)
    parts = request.parts()
    mine = [part for part in range(rank, len(parts), world_size) if not part_path(out, part).exists()]
    if not mine:
        return
    sampler = Sampler(request, device)
    images = sum(len(parts[part]) for part in mine)
    # Rank 0 reports for itself; the other ranks have as many parts, or one fewer.
    with StepProgress(f"{out.name} (process 0 of {world_size})", images, every=1) as progress:
        done, began = 0, time.perf_counter()
        for part in mine:
            start = time.perf_counter()
            latents_BCHW = sampler.sample(parts[part])
            seconds = time.perf_counter() - start
            write_part(part_path(out, part), latents_BCHW, sampler.codec.decode(latents_BCHW), seconds)
            done += len(parts[part])
            progress.update(done, f"{done / (time.perf_counter() - began):.1f} images/s")


if __name__ == "__main__":
    main()
