"""Evaluation while training goes on: images from fixed prompts and noises beside the teacher's, every evaluation.every steps.

All ranks take part, since the weights are sharded over them: data-parallel ranks share the images, the ranks of a tensor-parallel
group make the same ones. What training reads is left as it was: random states, modes, weights.

B images  C latent channels  H W latent size  L text tokens  D width; images are (B, c, h, w) with their own size
"""

import gc
import io
import json
import logging
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from data_pipeline.codec import Codec, load_codec
from data_pipeline.description import DatasetDescription
from data_pipeline.empty_prompt import read_empty_prompt
from data_pipeline.prompts import load_prompt_encoder, pad_prompts
from piflow_dist.checkpoint.files import step_name
from piflow_dist.config import Config, GuidanceConfig, require
from piflow_dist.distill.objectives import Batch, TeacherVelocity
from piflow_dist.distill.student import predictor, takes_end, trained_nfe
from piflow_dist.evaluation import figures, metrics
from piflow_dist.evaluation.evaluate import write_atomically
from piflow_dist.evaluation.metrics import NotMeasurable
from piflow_dist.evaluation.samples import EvaluationError
from piflow_dist.flow.schedule import FlowSchedule
from piflow_dist.flow.solvers import euler_sample, policy_sample
from piflow_dist.parallel.topology import Topology
from piflow_dist.parallel.zero import FrozenModel, TiedTeacher, TrainedModel
from piflow_dist.sampling.control import PATIENCE
from piflow_dist.seeds import seed_from

log = logging.getLogger(__name__)

FOLDER = "evaluation"


class TrainingEvaluation:
    """The fixed prompts and noises of a training, and the teacher's images from them."""

    def __init__(
        self,
        config: Config,
        description: DatasetDescription,
        schedule: FlowSchedule,
        topology: Topology,
    ):
        """Raises ConfigError where evaluation is asked for and there is no prompt."""
        self.config, self.settings, self.schedule, self.topology = config, config.evaluation, schedule, topology
        self.folder = Path(config.run_dir) / FOLDER
        if not self.settings.every:
            return
        self.latent_shape, self.codec_description = description.typical_shape, description.codec
        unique = read_prompts(config, description)
        self.prompts = [prompt for prompt in unique for _ in range(self.settings.images_per_prompt)]
        # Encoded now and by one rank: an encoder may be a large model, of which a node's memory does not hold one a rank.
        text_BLD, mask_BL = encode(unique, description, topology)
        self.text_BLD, self.mask_BL = (
            each.repeat_interleave(self.settings.images_per_prompt, dim=0) for each in (text_BLD, mask_BL)
        )
        self.empty_LD = read_empty_prompt(description).to(topology.device)
        self.codec: Codec | None = None
        self.of_teacher: tuple[Tensor, Tensor] | None = None
        """Latents and images, once they have been made."""

    def is_due(self, step: int) -> bool:
        return self.settings.every > 0 and step > 0 and step % self.settings.every == 0

    def is_owed(self, step: int) -> bool:
        """Whether a stop came between this step and its evaluation: the training that goes on makes it up. Asks rank 0."""
        if not self.is_due(step):
            return False
        missing = torch.tensor(float(not self._file(step, "json").exists()), device=self.topology.device)
        dist.broadcast(missing, src=0)
        return bool(missing.item())

    def run(
        self, step: int, model: TrainedModel, teacher: FrozenModel | TiedTeacher | None, averages: list[Tensor]
    ) -> tuple[dict[str, float], Path | None]:
        """Metrics of the model as it is after `step`, and a picture; both on rank 0 alone.

        averages: flat like the model's masters; sampled where evaluation.ema is set. Called by all ranks, between steps.
        """
        began = time.perf_counter()
        with undisturbed(model.engine.module, self.topology.device):
            if self.codec is None:
                self.codec = load_codec(self.codec_description, self.topology.device)
            if teacher is not None and self.of_teacher is None:
                guidance = self.config.distill.guidance
                self.of_teacher = self._images(lambda batch: self._euler(teacher, batch, guidance))
            with model.working_with(averages) if self.settings.ema else nullcontext():
                # Past the engine, as a teacher is that shares its weights: its forward would prepare a backward.
                mine = self._images(lambda batch: self._sample(model.engine.module, batch))
            if not self.topology.is_main:
                return {}, None
            values = self._measure(*mine) | {"eval_seconds": time.perf_counter() - began}
            return values, self._write(step, values, mine[1])

    def _sample(self, network: nn.Module, batch: Batch) -> Tensor:
        if not self.config.distils:
            guidance = GuidanceConfig(scale=self.settings.guidance, interval=self.settings.guidance_interval)
            return self._euler(network, batch, guidance)
        run, settings = self.config, self.settings

        return policy_sample(
            predictor(network, batch, run, self.schedule),
            batch.x0_BCHW,
            self.schedule,
            settings.nfe or run.distill.nfe,
            final_step_size_scale=run.distill.final_step_size_scale,
            trained_nfe=trained_nfe(run),
            total_substeps=run.distill.total_substeps,
            temperature=settings.temperature if settings.temperature == "auto" else float(settings.temperature),
            with_end=takes_end(run),
        )

    def _euler(self, network: Callable[..., Any], batch: Batch, guidance: GuidanceConfig) -> Tensor:
        velocity = TeacherVelocity(network, batch, guidance, self.config.model.guidance_embeds)
        return euler_sample(velocity, batch.x0_BCHW, self.schedule, self.settings.teacher_steps)

    @torch.no_grad()
    def _images(self, sample: Callable[[Batch], Tensor]) -> tuple[Tensor, Tensor]:
        """(latents, uint8 images) of all prompts, on the CPU of every rank. sample: batch whose x0_BCHW is noise -> latents.

        Every rank takes equally many, the last ones again where they do not share out: with sharded weights a forward
        pass of one is a forward pass of all.
        """
        dp_rank, dp_size, device = self.topology.dp_rank, self.topology.dp_size, self.topology.device
        count = len(self.prompts)
        share = math.ceil(count / dp_size)
        mine = [min(dp_rank * share + index, count - 1) for index in range(share)]
        latents, images = [], []
        for start in range(0, share, self.settings.batch_size):
            indices = mine[start : start + self.settings.batch_size]
            noise_BCHW = torch.stack([self._noise(index) for index in indices]).to(device)
            text_BLD, mask_BL = (each[indices].to(device) for each in (self.text_BLD, self.mask_BL))
            latents_BCHW = sample(Batch(noise_BCHW, text_BLD, mask_BL, self.empty_LD)).float()
            latents.append(latents_BCHW)
            # One at a time: at full size a VAE's first layers take gibibytes an image.
            images += [to_uint8(self.codec.decode(latent_1CHW)) for latent_1CHW in latents_BCHW.split(1)]
        gathered = (self._gather(torch.cat(parts)) for parts in (latents, images))
        latents_BCHW, images_Bchw = (tensor[:count].cpu() for tensor in gathered)
        return latents_BCHW, images_Bchw

    def _noise(self, index: int) -> Tensor:
        """A function of evaluation.seed and the place among the images, on any number of ranks and devices."""
        generator = torch.Generator().manual_seed(seed_from(self.settings.seed, index))
        return torch.randn(self.latent_shape, generator=generator)

    def _gather(self, mine: Tensor) -> Tensor:
        """The data-parallel ranks' tensors one after another."""
        parts = [torch.empty_like(mine) for _ in range(self.topology.dp_size)]
        dist.all_gather(parts, mine.contiguous(), group=self.topology.dp_group)
        return torch.cat(parts)

    def _measure(self, latents_BCHW: Tensor, images_Bchw: Tensor) -> dict[str, float]:
        """Against the teacher's images from the same noises. What is not finite, or cannot be told, is left out."""
        if self.of_teacher is None:
            return {}
        their_latents_BCHW, their_images_Bchw = self.of_teacher
        pixels, their_pixels = (each.flatten(1).float() / 255 for each in (images_Bchw, their_images_Bchw))
        values = {
            "eval_psnr_db": metrics.psnr_per_image(images_Bchw, their_images_Bchw).mean().item(),
            "eval_latent_error": metrics.latent_relative_error(latents_BCHW, their_latents_BCHW),
        }
        try:
            values["eval_diversity"] = metrics.relative_diversity(pixels, their_pixels, self.prompts)
        except NotMeasurable as reason:
            log.info("no diversity: %s", reason)
        return {key: value for key, value in values.items() if math.isfinite(value)}

    def _write(self, step: int, values: dict[str, float], images_Bchw: Tensor) -> Path | None:
        """The picture and, after it, the values; a full disk costs these and not the training."""
        names = figures.short_names(self.prompts)
        rows = [figures.GridRow(label=f"step {step}", images=list(images_Bchw))]
        if self.of_teacher is not None:
            rows.insert(
                0, figures.GridRow(label=f"teacher, {self.settings.teacher_steps}", images=list(self.of_teacher[1]))
            )
        picture = figures.grid(rows, [names[prompt] for prompt in self.prompts], figures.tile_for(images_Bchw))
        found = {
            "step": step,
            "weights": "ema" if self.settings.ema else "raw",
            "prompts": self.prompts,
            "values": values,
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._file(step, "png"), on_white(picture))
            write_atomically(self._file(step, "json"), json.dumps(found, indent=1) + "\n")
        except (OSError, EvaluationError) as error:
            log.warning("the evaluation of step %d was not written: %s", step, error)
            return None
        return self._file(step, "png")

    def _file(self, step: int, ending: str) -> Path:
        return self.folder / f"{step_name(step)}.{ending}"


def read_prompts(config: Config, description: DatasetDescription) -> list[str]:
    settings = config.evaluation
    if settings.prompts is None:
        prompts = list(description.prompts)
        require(
            bool(prompts),
            f"{config.data.root} lists no captions. Give evaluation.prompts=FILE, one a line, or evaluation.every=0.",
        )
    else:
        path = Path(settings.prompts)
        require(path.is_file(), f"evaluation.prompts={path} does not exist. Give a text file, one prompt a line.")
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        require(bool(prompts), f"evaluation.prompts={path} is empty. Write one prompt a line.")
    return prompts[: settings.max_prompts]


def encode(prompts: list[str], description: DatasetDescription, topology: Topology) -> tuple[Tensor, Tensor]:
    """(text, mask), on the CPU of every rank, padded over all prompts, so that an image does not depend on its batch."""
    # The others wait while a model is read, which may take longer than a collective of the training.
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    told: list[Any] = [encode_here(prompts, description, topology.device) if topology.is_main else None]
    dist.broadcast_object_list(told, src=0, group=group)
    return told[0]


def encode_here(prompts: list[str], description: DatasetDescription, device: torch.device) -> tuple[Tensor, Tensor]:
    """By an encoder on `device`, or on the CPU where it finds no room beside the training's models; it is gone afterwards."""
    try:
        found = encode_on(device, prompts, description)
    except torch.OutOfMemoryError:
        log.info("evaluation.prompts: %s has no room for the encoder; they are encoded on the CPU", device)
        found = None
    if device.type != "cpu":
        gc.collect()
        torch.accelerator.empty_cache()
    return found or encode_on(torch.device("cpu"), prompts, description)


def encode_on(device: torch.device, prompts: list[str], description: DatasetDescription) -> tuple[Tensor, Tensor]:
    encoder = load_prompt_encoder(description.prompt_encoder, device)
    found = pad_prompts(encoder.encode(prompts))
    for index, prompt in enumerate(prompts):
        if cut := encoder.cut(prompt):
            log.warning("evaluation.prompts: prompt %d is cut: %s", index, cut)
    return found


@contextmanager
def undisturbed(module: nn.Module, device: torch.device) -> Iterator[None]:
    """`module` is in evaluation mode inside; afterwards its modes and all random states of the process are as they were."""
    modes = [(each, each.training) for each in module.modules()]
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            module.eval()
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        for each, training in modes:
            each.training = training


def to_uint8(images_Bchw: Tensor) -> Tensor:
    """[-1, 1] -> uint8; what is not a number is grey, and said: a picture of it is worth more than an end of the training."""
    broken = int((~images_Bchw.isfinite()).flatten(1).any(1).sum())
    if broken:
        log.warning(
            "evaluation: %d of %d images have pixels that are not finite; they are grey", broken, len(images_Bchw)
        )
    return ((images_Bchw.nan_to_num(0).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def on_white(png: bytes) -> bytes:
    """Without transparency, which MLflow's viewer shows as black."""
    picture = Image.open(io.BytesIO(png))
    ground = Image.new("RGBA", picture.size, "white")
    buffer = io.BytesIO()
    Image.alpha_composite(ground, picture).convert("RGB").save(buffer, format="PNG")
    return buffer.getvalue()
