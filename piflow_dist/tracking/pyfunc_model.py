"""An exported student as an MLflow model: `mlflow.pyfunc.load_model(uri).predict(DataFrame of prompts)` gives images.

MLflow stores this file itself and runs it ("models from code"): nothing is pickled. The adapter travels with the model; the base under
it (40 GB) and the data set that says codec and prompt encoder are places, which load_model(uri, model_config={...}) can change.
"""

import io
import logging
from typing import Any

import mlflow
import pandas
import torch
from mlflow.pyfunc import PythonModel, PythonModelContext
from PIL import Image
from torch import Tensor

from data_pipeline.codec import load_codec
from data_pipeline.description import load_description
from data_pipeline.prompts import load_prompt_encoder, pad_prompts
from piflow_dist.distill.objectives import base_segment, build_schedule, guidance_input
from piflow_dist.flow.solvers import policy_sample
from piflow_dist.models.heads import make_policy
from piflow_dist.models.pretrained import load_model
from piflow_dist.parallel.topology import choose_device
from piflow_dist.sampling.images import noise_seed
from piflow_dist.sampling.settings import SampleConfig, resolve_source

log = logging.getLogger(__name__)


class StudentModel(PythonModel):
    """Input: a DataFrame with a column `prompt` and, if wanted, `seed`. Output: `prompt`, `seed`, `png` (bytes of an image).

    model_config: base, dataset (as in tools/sample.py), device (auto, cpu or cuda), batch_size. params of predict: nfe.
    """

    def load_context(self, context: PythonModelContext) -> None:
        settings = context.model_config
        config = SampleConfig(
            source=context.artifacts["student"], base=settings["base"], dataset=settings["dataset"], out="unused"
        )
        folder, self.run = resolve_source(config)
        self.device = choose_device(settings["device"], 0)
        self.batch_size = settings["batch_size"]
        description = load_description(self.run.data.root)
        self.shape = description.typical_shape
        self.schedule = build_schedule(self.run.schedule, self.shape)
        self.encoder, self.codec = load_prompt_encoder(description.prompt_encoder), load_codec(description.codec)
        self.model = load_model(folder, self.run).to(self.device).eval()

    def predict(
        self, context: PythonModelContext, model_input: pandas.DataFrame, params: dict[str, Any] | None = None
    ) -> pandas.DataFrame:
        prompts = [str(prompt) for prompt in model_input["prompt"]]
        seeds = [int(seed) for seed in model_input.get("seed", range(len(prompts)))]
        nfe = int((params or {}).get("nfe") or self.run.distill.nfe)
        for row, prompt in enumerate(prompts):
            if cut := self.encoder.cut(prompt):
                log.warning("row %d: %s", row, cut)
        images: list[bytes] = []
        for start in range(0, len(prompts), self.batch_size):
            chosen = slice(start, start + self.batch_size)
            images += map(as_png, self._sample(prompts[chosen], seeds[chosen], nfe))
        return pandas.DataFrame({"prompt": prompts, "seed": seeds, "png": images})

    @torch.no_grad()
    def _sample(self, prompts: list[str], seeds: list[int], nfe: int) -> Tensor:
        """Pixels (B,c,h,w) in [-1, 1]; an image depends on its prompt, seed and nfe."""
        run, schedule = self.run, self.schedule
        generators = [
            torch.Generator().manual_seed(noise_seed(seed, prompt)) for seed, prompt in zip(seeds, prompts, strict=True)
        ]
        noise_BCHW = torch.stack([torch.randn(self.shape, generator=g) for g in generators]).to(self.device)
        text_BLD, mask_BL = (tensor.to(self.device) for tensor in pad_prompts(self.encoder.encode(prompts)))

        def predict(x_BCHW: Tensor, sigma_B: Tensor, tau_B: Tensor) -> Any:
            guidance_B = guidance_input(run.model.guidance_embeds, run.distill.guidance.scale, sigma_B)
            outputs = self.model(x_BCHW, sigma_B, text_BLD, mask_BL, guidance_B)
            return make_policy(outputs, x_BCHW, sigma_B, run.policy, base_segment(run), schedule.shift)

        latents_BCHW = policy_sample(
            predict,
            noise_BCHW,
            schedule,
            nfe,
            final_step_size_scale=run.distill.final_step_size_scale,
            trained_nfe=run.distill.nfe,
            total_substeps=run.distill.total_substeps,
            temperature="auto" if run.policy.type == "gmflow" else 1.0,
            h=0.0,
            generators=generators,
        )
        return self.codec.decode(latents_BCHW)


def as_png(image_chw: Tensor) -> bytes:
    pixels = ((image_chw.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, "PNG")
    return buffer.getvalue()


mlflow.models.set_model(StudentModel())
