"""What the loss alone does not say: by segment, by noise level, against the teacher's norm, and how the policy is doing.

Sums stay on the device and are read once in tracking.log_every steps, with one message: no step waits for them.

B batch, M intermediate states, K mixture components, N grid nodes, C latent channels, H W latent size.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from piflow_dist.distill.imitation import ImitationOutput

BINS = 10
"""Of sigma, equal parts of (0, 1]."""
SHOWN = {"entropy": "entropy", "effective": "effective_components", "logstd": "logstd", "spread": "grid_spread"}


class StepMeter:
    """Means over the images of all ranks since they were last read."""

    def __init__(self, device: torch.device, nfe: int, loss_scale: float):
        """nfe: segments; 0 for a teacher. loss_scale: of the imitation loss, in which its parts are given too."""
        self.nfe, self.loss_scale = nfe, loss_scale
        self.names = [
            *(f"{what}/{i}" for what in ("loss", "target", "states") for i in range(nfe)),
            *(f"{what}@{i}" for what in ("loss", "states") for i in range(BINS)),
            *("entropy", "effective", "logstd", "spread", "policies", "tokens"),
        ]
        self.figures: tuple[str, ...] = ()
        self.place = {name: index for index, name in enumerate(self.names)}
        self.sums = torch.zeros(len(self.names), dtype=torch.float64, device=device)

    @torch.no_grad()
    def add_imitation(self, out: ImitationOutput, outputs: Mapping[str, Tensor], index_B: Tensor) -> None:
        """One segment per image, number index_B, and the network's outputs that made its policy."""
        error_MB = (out.prediction - out.target).square().flatten(2).mean(2)
        target_MB = out.target.square().flatten(2).mean(2)
        chosen_BS = index_B[:, None] == torch.arange(self.nfe, device=index_B.device)
        for what, value_B in (("loss", error_MB.sum(0)), ("target", target_MB.sum(0))):
            # Not a product: an image whose error is not finite would be in every segment.
            self._add(f"{what}/0", torch.where(chosen_BS, value_B[:, None], 0).sum(0))
        self._add("states/0", chosen_BS.sum(0) * len(error_MB))
        self._add_by_sigma(error_MB * (self.loss_scale / 2), out.sigma_MB)
        if "logweights" in outputs:
            self.figures = ("entropy", "effective", "logstd")
            self._add("entropy", mixture_figures(outputs))
        else:
            self.figures = ("spread",)
            self._add("spread", grid_spread_B(outputs["out"]).sum()[None])
        self.sums[self.place["policies"]] += len(index_B)

    @torch.no_grad()
    def add_velocities(self, prediction_BCHW: Tensor, target_BCHW: Tensor, sigma_B: Tensor) -> None:
        """Of flow matching, and of the baselines: the same by noise level, as plain mean squares."""
        error_B = (prediction_BCHW - target_BCHW).square().flatten(1).mean(1)
        self._add_by_sigma(error_B[None], sigma_B[None])

    @torch.no_grad()
    def add_tokens(self, images: int, image_tokens: int, mask_BL: Tensor) -> None:
        """What a step has read: tokens of images and prompts, without padding."""
        self.sums[self.place["tokens"]] += mask_BL.sum() + images * image_tokens

    def read(self, tp: int) -> dict[str, float]:
        """Metrics, alike on all ranks, and `tokens` of the steps since the last reading; collective.

        tp: ranks that count every image.
        """
        dist.all_reduce(self.sums)
        sums = dict(zip(self.names, self.sums.tolist(), strict=True))
        self.sums.zero_()
        values, scale = {"tokens": sums["tokens"] / tp}, self.loss_scale / 2
        errors, targets = [sums[f"loss/{i}"] for i in range(self.nfe)], [sums[f"target/{i}"] for i in range(self.nfe)]
        for i, (error, target) in enumerate(zip(errors, targets, strict=True)):
            if states := sums[f"states/{i}"]:
                values[f"loss_segment/{i + 1}"] = scale * error / states
                values[f"velocity_error_segment/{i + 1}"] = relative(error, target)
        if sum(targets):
            values["velocity_error"] = relative(sum(errors), sum(targets))
        for i in range(BINS):
            if states := sums[f"states@{i}"]:
                values[f"loss_sigma/{(i + 1) / BINS:.1f}"] = sums[f"loss@{i}"] / states
        if policies := sums["policies"]:
            values |= {f"policy/{SHOWN[name]}": sums[name] / policies for name in self.figures}
        return values

    def _add(self, first: str, values: Tensor) -> None:
        start = self.place[first]
        self.sums[start : start + len(values)] += values

    def _add_by_sigma(self, loss_MB: Tensor, sigma_MB: Tensor) -> None:
        bin_MB = (sigma_MB * BINS).ceil().long().sub(1).clamp(0, BINS - 1)
        chosen_MBS = bin_MB[..., None] == torch.arange(BINS, device=bin_MB.device)
        self._add("loss@0", torch.where(chosen_MBS, loss_MB[..., None], 0).sum((0, 1)))
        self._add("states@0", chosen_MBS.sum((0, 1)))


def relative(error: float, norm: float) -> float:
    """Root mean square of an error by that of what it is compared with; nan against zero."""
    return (error / norm) ** 0.5 if norm else float("nan")


def mixture_figures(outputs: Mapping[str, Tensor]) -> Tensor:
    """(3,): sums over the batch of the mixture's entropy (nats, mean over pixels), of 1 / sum_k A_k^2 (mean over pixels:
    how many components of equal weight would be as concentrated), and of logstd."""
    logweights_BK1HW = outputs["logweights"].log_softmax(1)
    weights_BK1HW = logweights_BK1HW.exp()
    entropy_B = -(weights_BK1HW * logweights_BK1HW).sum(1).flatten(1).mean(1)
    effective_B = (1 / weights_BK1HW.square().sum(1)).flatten(1).mean(1)
    return torch.stack([entropy_B.sum(), effective_B.sum(), outputs["logstds"].sum()])


def grid_spread_B(out_BNCHW: Tensor) -> Tensor:
    """Standard deviation of a DX policy's velocities over its nodes (root mean square over pixels): 0 is one Euler step."""
    return out_BNCHW.var(1, unbiased=False).flatten(1).mean(1).sqrt()
