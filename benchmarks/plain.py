"""A training step as one would write it first: diffusers' transformer, peft's adapters, autograd, the policy's textbook form.

Nothing is batched that the algorithm does one after the other, nothing is fused, nothing is sharded. It draws its random
numbers in the order of the real step, so that both have the same loss on the same weights.
B batch, C latent channels, H W latent size, K components, N grid nodes, T image tokens, M intermediate states.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from meter import Meter
from policies import TextbookPolicy, textbook_rollout
from torch import Tensor, nn

from data_pipeline.compat import repair_torchvision
from piflow_dist.config import Config
from piflow_dist.distill.ema import karras_beta
from piflow_dist.distill.objectives import Batch, base_segment, segment_boundaries, teacher_ratio
from piflow_dist.flow.schedule import FlowSchedule
from piflow_dist.models.architecture import initial_head
from piflow_dist.models.heads import pack, unpack
from piflow_dist.models.weights import WeightSource

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class PlainDX:
    """The clean image on a time grid, one substep at a time."""

    def __init__(
        self, out: Tensor, x_src: Tensor, sigma_src: Tensor, segment: float, schedule: FlowSchedule, mode: str
    ):
        s = sigma_src.reshape(-1, 1, 1, 1, 1)
        self.nodes, self.schedule, self.mode, self.segment = x_src.unsqueeze(1) - s * out, schedule, mode, segment
        self.tau_src = schedule.unwarp(sigma_src).reshape(-1, 1, 1, 1)

    def detach(self) -> "PlainDX":
        policy = object.__new__(PlainDX)
        vars(policy).update(vars(self) | {"nodes": self.nodes.detach()})
        return policy

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        tau, last = self.schedule.unwarp(t), self.nodes.shape[1] - 1
        index = torch.arange(last + 1, device=x.device, dtype=x.dtype).reshape(1, -1, 1, 1, 1)
        if self.mode == "polynomial":
            weights = (self.tau_src - tau).unsqueeze(1) ** index
        else:
            tau_dst = (self.tau_src - self.segment).clamp(min=0)
            place = ((tau - tau_dst) / (self.tau_src - tau_dst) * last).clamp(0, last).unsqueeze(1)
            weights = (1 - (place - index).abs()).clamp(min=0)
        return (x - (weights * self.nodes).sum(1)) / t.clamp(min=1e-4)


class PlainStep:
    """step(batch, number, generator) -> loss: one optimiser step on this process's share, all of it at once.

    policy_dtype: in float32 the textbook form loses digits (6 % of the gradient of a logstd, seen); a test that compares
    weights computes it in float64.
    """

    policy_dtype = torch.float32

    def __init__(
        self, config: Config, schedule: FlowSchedule, weights: WeightSource, device: torch.device, meter: Meter
    ):
        self.config, self.schedule, self.device, self.meter = config, schedule, device, meter
        self.dtype = DTYPES[config.train.dtype]
        self.model = self.load(weights, config)
        self.head = self.load_head(weights, config)
        self.temb: Tensor | None = None
        if config.mode == "tied":
            self.teacher = self.model
            self.adapt()
        else:
            self.teacher = self.load(weights, config)
            self.model.float().requires_grad_(True)
        self.teacher_output = self.teacher.norm_out, self.teacher.proj_out
        self.student_output = self.own_norm(), nn.Identity()
        self.model.norm_out, self.model.proj_out = self.student_output
        # What nothing reads cannot be trained.
        last = self.model.transformer_blocks[-1]
        for unread in (last.txt_mlp, last.attn.to_add_out):
            unread.requires_grad_(False)
        self.model.time_text_embed.register_forward_hook(self.keep_embedding)
        if config.parallel.recompute_every:
            self.model.enable_gradient_checkpointing()
        self.head.train(), self.model.train()
        modules = (self.model, self.head, self.student_output[0])
        self.parameters = list(dict.fromkeys(p for module in modules for p in module.parameters() if p.requires_grad))
        self.averages = [parameter.detach().clone() for parameter in self.parameters]
        optim = config.optim
        if optim.type == "sgd":
            self.optimizer = torch.optim.SGD(self.parameters, optim.lr, optim.momentum, weight_decay=optim.weight_decay)
        else:
            self.optimizer = torch.optim.AdamW(
                self.parameters, optim.lr, tuple(optim.betas), optim.eps, optim.weight_decay
            )

    def load(self, weights: WeightSource, config: Config) -> nn.Module:
        repair_torchvision()
        from diffusers import QwenImageTransformer2DModel
        from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope

        shape, model = config.model, None
        with torch.device("meta"):
            model = QwenImageTransformer2DModel(
                patch_size=2, in_channels=4 * shape.latent_channels, out_channels=shape.latent_channels,
                num_layers=shape.num_layers, attention_head_dim=shape.attention_head_dim,
                num_attention_heads=shape.num_attention_heads, joint_attention_dim=shape.joint_attention_dim,
                axes_dims_rope=tuple(shape.axes_dims_rope),
            )  # fmt: skip
        model = model.to(self.dtype).to_empty(device=self.device).requires_grad_(False)
        model.pos_embed = QwenEmbedRope(theta=10000, axes_dim=list(shape.axes_dims_rope), scale_rope=True)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights.view(f"head.{name}" if name.startswith("proj_out.") else name))
        return model

    def load_head(self, weights: WeightSource, config: Config) -> nn.ModuleDict:
        """The published heads, three linear layers or one, trained in fp32."""
        found = initial_head(config.model, config.policy, weights, config.train.seed).tensors
        layers = {}
        for name in sorted({key.rpartition(".")[0] for key in found}):
            weight = found[f"{name}.weight"]
            layer = nn.Linear(weight.shape[1], weight.shape[0])
            layer.load_state_dict({kind: found[f"{name}.{kind}"] for kind in ("weight", "bias")})
            layers[name.removeprefix("head.").replace(".", "_")] = layer
        return nn.ModuleDict(layers).to(self.device)

    def adapt(self) -> None:
        from peft import LoraConfig

        lora = self.config.lora
        target = "|".join(f"({target})" for target in lora.targets)
        self.model.add_adapter(
            LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=target)
        )
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    def own_norm(self) -> nn.Module:
        import copy

        if self.config.mode == "full":
            return self.model.norm_out
        return copy.deepcopy(self.model.norm_out).float().requires_grad_(True)

    def keep_embedding(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self.temb = output

    def forward(self, model: nn.Module, output: tuple, x: Tensor, sigma: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        model.norm_out, model.proj_out = output
        H, W = x.shape[-2:]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return model(
                hidden_states=pack(x).to(self.dtype), encoder_hidden_states=text.to(self.dtype),
                encoder_hidden_states_mask=mask, timestep=sigma, img_shapes=[[(1, H // 2, W // 2)]] * len(x),
                return_dict=False,
            )[0]  # fmt: skip

    def student(self, x: Tensor, sigma: Tensor, batch: Batch) -> TextbookPolicy | PlainDX:
        config, size = self.config, x.shape[-2:]
        with self.meter.part("student forward"):
            tokens = self.forward(self.model, self.student_output, x, sigma, batch.text_BLD, batch.mask_BL)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                outputs = {name: self.head[name](tokens) for name in self.head if "logstds" not in name}
                if config.policy.type == "gmflow":
                    inner = F.silu(self.head["proj_out_logstds_1"](F.silu(self.temb.detach())))
                    logstd = self.head["proj_out_logstds_3"](inner).float()[:, :, None, None, None]
        if config.policy.type == "dx":
            out = unpack(outputs["proj_out"], size, config.policy.num_nodes).float()
            return PlainDX(out, x, sigma, base_segment(config), self.schedule, config.policy.mode)
        means = unpack(outputs["proj_out_means"], size, config.policy.num_components).float()
        logits = unpack(outputs["proj_out_logweights"], size, config.policy.num_components).float()
        numbers = (means, logstd, logits.log_softmax(1), x, sigma)
        return TextbookPolicy(*(value.to(self.policy_dtype) for value in numbers))

    @torch.no_grad()
    def teacher_velocity(self, x: Tensor, sigma: Tensor, batch: Batch, empty: Batch) -> Tensor:
        """One state at a time, with and without its prompt in one batch."""
        guidance = self.config.distill.guidance.scale
        with self.meter.part("teacher"):
            if self.config.mode == "tied":
                self.model.disable_adapters()
            self.teacher.eval()
            prompts = [batch, empty] if guidance > 1 else [batch]
            text, mask = (torch.cat([getattr(p, name) for p in prompts]) for name in ("text_BLD", "mask_BL"))
            repeats = len(prompts)
            tokens = self.forward(
                self.teacher, self.teacher_output, x.repeat(repeats, 1, 1, 1), sigma.repeat(repeats), text, mask
            )
            self.model.train()
            if self.config.mode == "tied":
                self.model.enable_adapters()
            u = unpack(tokens, x.shape[-2:], 1)[:, 0].float()
            if guidance <= 1:
                return u
            u_cond, u_uncond = u.chunk(2)
            return u_cond + (guidance - 1) * (u_cond - u_uncond)

    def segment(
        self, x: Tensor, tau: Tensor, length: Tensor, batch: Batch, ratio: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """(loss, end of the segment): pi-ID as its paper has it."""
        distill, schedule, total = self.config.distill, self.schedule, self.config.distill.total_substeps
        policy = self.student(x, schedule.warp(tau), batch)
        frozen, empty = policy.detach(), batch.without_prompts()
        if self.config.policy.type == "gmflow" and distill.component_dropout > 0:
            frozen.logweights = self.drop(frozen.logweights, generator)
        M, B = distill.num_intermediate_states, len(x)
        window = distill.window_substeps * length / torch.round(length * total).clamp(min=1)
        student = torch.rand(B, M, generator=generator, device=self.device).sort(1)[0] * (1 - ratio)
        teacher = torch.rand(B, M - 1, generator=generator, device=self.device).sort(1)[0]
        student = student.diff(dim=1, prepend=student.new_zeros(B, 1)) * (length - window)[:, None]
        ends = (teacher.new_zeros(B, 1), teacher.new_ones(B, 1))
        teacher = teacher.diff(dim=1, prepend=ends[0], append=ends[1]) * ratio * (length - window)[:, None]
        losses, tau_end = [], (tau - length).clamp(min=0)
        for i in range(M):
            tau_a = (tau - student[:, i]).clamp(min=0)
            tau_b = (tau_a - teacher[:, i]).clamp(min=0)
            with torch.no_grad():
                x, sigma = textbook_rollout(frozen, x, tau, tau_a, schedule, total)
            sigma_a = sigma.flatten()
            target = self.teacher_velocity(x, sigma_a, batch, empty)
            ahead, sigma_end = textbook_rollout(policy, x, tau_a, (tau_b - window).clamp(min=0), schedule, total)
            losses.append((((ahead - x) / (sigma_end - sigma)) - target).square().mean())
            if ratio > 0:
                x = x + (schedule.warp(tau_b) - sigma_a)[:, None, None, None] * target
            tau = tau_b
        with torch.no_grad():
            if self.config.objective == "imitation_datafree":
                x, _ = textbook_rollout(frozen, x, tau, torch.minimum(tau_end, tau), schedule, total)
        return torch.stack(losses).mean() * distill.loss_scale / 2, x

    def drop(self, logweights: Tensor, generator: torch.Generator) -> Tensor:
        B, K = logweights.shape[:2]
        drop = torch.rand(B, K, generator=generator, device=self.device) < self.config.distill.component_dropout
        drop = drop & ~drop.all(1, keepdim=True)
        return logweights.masked_fill(drop[:, :, None, None, None], -torch.inf)

    def step(self, batch: Batch, number: int, generator: torch.Generator) -> float:
        config, schedule = self.config, self.schedule
        boundaries = segment_boundaries(config, schedule).to(self.device)
        ratio, total = teacher_ratio(number, config), 0.0
        with self.meter.part("policy"):
            if config.objective == "imitation":
                tau = 1 - torch.rand(len(batch.x0_BCHW), generator=generator, device=self.device)
                index = (boundaries[None, 1:] >= tau[:, None]).sum(1)
                noise = self.noise(batch, generator)
                sigma = schedule.warp(boundaries[index])[:, None, None, None]
                starts = [(boundaries[index], boundaries[index] - boundaries[index + 1], 1.0)]
                x = (1 - sigma) * batch.x0_BCHW + sigma * noise
            else:
                x = self.noise(batch, generator)
                pairs = zip(boundaries[:-1], boundaries[1:], strict=True)
                starts = [(a.expand(len(x)), (a - b).expand(len(x)), a - b) for a, b in pairs]
            for tau, length, weight in starts:
                loss, x = self.segment(x, tau, length, batch, ratio, generator)
                with self.meter.part("backward"):
                    (loss * weight).backward()
                total += loss.detach() * weight
        with self.meter.part("optimizer"):
            self.update(number)
        return float(total)

    def noise(self, batch: Batch, generator: torch.Generator) -> Tensor:
        return torch.randn(batch.x0_BCHW.shape, generator=generator, device=self.device)

    def update(self, number: int) -> None:
        optim = self.config.optim
        if dist.get_world_size() > 1:
            for parameter in self.parameters:
                dist.all_reduce(parameter.grad.div_(dist.get_world_size()))
        if optim.clip and number >= optim.clip_from_step:
            torch.nn.utils.clip_grad_norm_(self.parameters, optim.clip)
        group: dict[str, Any] = self.optimizer.param_groups[0]
        group["lr"] = optim.lr * min(1.0, (number + 1) / max(1, optim.warmup_steps))
        self.optimizer.step()
        self.optimizer.zero_grad()
        beta = karras_beta(number + 1, self.config.ema.gamma) if number + 1 > self.config.ema.start_step else 0.0
        with torch.no_grad():
            for average, parameter in zip(self.averages, self.parameters, strict=True):
                average.lerp_(parameter, 1 - beta)
