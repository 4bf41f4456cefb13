"""A student's evaluation as flow/solvers.policy_sample asks for it: state and noise level in, policy out."""

from collections.abc import Callable

from torch import Tensor

from piflow_dist.config import Config
from piflow_dist.distill.objectives import Batch, Network, base_segment, guidance_input
from piflow_dist.flow.schedule import FlowSchedule
from piflow_dist.models.heads import make_policy
from piflow_dist.policies import DXPolicy, GMFlowPolicy, MeanPolicy


def takes_end(run: Config) -> bool:
    """Whether the network is told where its step ends (policy.type=mean)."""
    return run.policy.type == "mean"


def trained_nfe(run: Config) -> int | None:
    """The fewest evaluations that sampling may take; None: any number, as MeanFlow's students know all intervals."""
    return None if run.objective == "meanflow" else run.distill.nfe


def predictor(
    network: Network, batch: Batch, run: Config, schedule: FlowSchedule
) -> Callable[..., GMFlowPolicy | DXPolicy | MeanPolicy]:
    """(x_BCHW, sigma_B, tau_B[, sigma_end_B]) -> policy, for the prompts of the batch."""

    def predict(
        x_BCHW: Tensor, sigma_B: Tensor, tau_B: Tensor, end_B: Tensor | None = None
    ) -> GMFlowPolicy | DXPolicy | MeanPolicy:
        guidance_B = guidance_input(run.model.guidance_embeds, run.distill.guidance.scale, sigma_B)
        span_B = None if end_B is None else sigma_B - end_B
        outputs = network(x_BCHW, sigma_B, batch.text_BLD, batch.mask_BL, guidance_B, span_B)
        return make_policy(outputs, x_BCHW, sigma_B, run.policy, base_segment(run), schedule.shift)

    return predict
