"""GMFlow policy on CPU: our rollout and windowed loss against a plain textbook implementation, in one run.

    OMP_NUM_THREADS=1 python benchmarks/policies.py [--repeats 5] [--cases demo,qwen1,qwen2]

The textbook (below) evaluates the posterior mean with zeta and nu at every substep of a masked loop, with autograd
through it. Both include making the policy from the network output. Runs of the two alternate; the best of each counts.
B batch, K components, C channels, H W latent size, M states.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from piflow_dist.distill.imitation import ImitationSettings, imitation_segment
from piflow_dist.flow.schedule import FlowSchedule
from piflow_dist.policies import GMFlowPolicy, rollout, windowed_velocities

CASES = {
    "demo": (64, 8, 16, 8, 8),
    "demo32": (32, 8, 16, 8, 8),
    "qwen1": (1, 8, 16, 128, 128),
    "qwen2": (2, 8, 16, 128, 128),
    "imagenet": (16, 32, 4, 32, 32),
}
SCHEDULE = FlowSchedule(3.2)
SEGMENT, TOTAL, STATES = 1 / 3.5, 128, 2
WINDOW = 3 * SEGMENT / round(SEGMENT * TOTAL)


class TextbookPolicy:
    def __init__(self, means: Tensor, logstds: Tensor, logweights: Tensor, x_src: Tensor, sigma_src: Tensor):
        self.x_src, self.s = x_src, sigma_src.reshape(-1, 1, 1, 1)
        self.m = x_src.unsqueeze(1) - self.s.unsqueeze(1) * means
        self.v = self.s.unsqueeze(1).square() * (2 * logstds).exp()
        self.logweights = logweights

    def detach(self) -> "TextbookPolicy":
        policy = object.__new__(TextbookPolicy)
        policy.x_src, policy.s, policy.m = self.x_src, self.s, self.m.detach()
        policy.v, policy.logweights = self.v.detach(), self.logweights.detach()
        return policy

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        t = t.clamp(min=1e-4)
        zeta = ((1 - t) / t).square() - ((1 - self.s) / self.s).square()
        nu = (1 - t) * x / t.square() - (1 - self.s) * self.x_src / self.s.square()
        zeta, nu = zeta.unsqueeze(1), nu.unsqueeze(1)
        scale = 1 + self.v * zeta
        means = (self.m + self.v * nu) / scale
        change = (self.m * (nu - 0.5 * zeta * self.m)).sum(2, keepdim=True) / scale
        x_0 = ((self.logweights + change).softmax(1) * means).sum(1)
        return (x - x_0) / t


def textbook_rollout(
    policy: TextbookPolicy,
    x: Tensor,
    tau_start: Tensor,
    tau_end: Tensor,
    schedule: FlowSchedule = SCHEDULE,
    total: int = TOTAL,
) -> tuple[Tensor, Tensor]:
    tau, tau_end = tau_start.reshape(-1, 1, 1, 1), tau_end.reshape(-1, 1, 1, 1)
    count = torch.round((tau - tau_end) * total).clamp(min=1)
    step, sigma = (tau - tau_end) / count, schedule.warp(tau)
    for n in range(int(count.max())):
        tau_next = (tau - step).clamp(min=0)
        sigma_next = schedule.warp(tau_next)
        x_next = x + policy.velocity(x, sigma) * (sigma_next - sigma)
        active = count > n
        x, tau = torch.where(active, x_next, x), torch.where(active, tau_next, tau)
        sigma = torch.where(active, sigma_next, sigma)
    return x, sigma


def textbook_window(policy: TextbookPolicy, x: Tensor, tau_start: Tensor, tau_end: Tensor) -> Tensor:
    x_end, sigma_end = textbook_rollout(policy, x, tau_start, tau_end)
    return (x_end - x) / (sigma_end - SCHEDULE.warp(tau_start.reshape(-1, 1, 1, 1)))


class Case:
    """Random network outputs, as a student's are: components that differ by half a unit, logstd around log 0.2."""

    def __init__(self, shape: tuple[int, int, int, int, int]):
        B, K, C, H, W = shape
        torch.manual_seed(0)
        self.outputs = [
            torch.randn(B, 1, C, H, W) + 0.5 * torch.randn(B, K, C, H, W),
            torch.full((B, 1, 1, 1, 1), -1.6) + 0.2 * torch.randn(B, 1, 1, 1, 1),
            torch.randn(B, K, 1, H, W).log_softmax(1),
        ]
        for output in self.outputs:
            output.requires_grad_()
        self.x = torch.randn(B, C, H, W)
        self.tau = torch.full((B,), 1 - SEGMENT)
        self.sigma = SCHEDULE.warp(self.tau)
        self.full = self.tau - SEGMENT
        self.lengths = torch.rand(B, STATES).sort(1)[0] * (SEGMENT - WINDOW)
        self.targets = torch.randn(STATES, B, C, H, W)

    def backward(self, loss: Tensor) -> list[Tensor]:
        return torch.autograd.grad(loss, self.outputs)


def jobs(case: Case) -> dict[str, tuple[Callable, Callable]]:
    """name -> (textbook, ours); both return tensors that must agree."""
    ends = [case.tau - case.lengths[:, i] for i in range(STATES)]

    def ours_policy() -> GMFlowPolicy:
        return GMFlowPolicy(*case.outputs, case.x, case.sigma)

    def textbook_policy() -> TextbookPolicy:
        return TextbookPolicy(*case.outputs, case.x, case.sigma)

    states = [rollout(ours_policy().detach(), case.x, case.tau, end, SCHEDULE)[0] for end in ends]

    def textbook_windows() -> list[Tensor]:
        policy = textbook_policy()
        predictions = [textbook_window(policy, x, end, end - WINDOW) for x, end in zip(states, ends, strict=True)]
        return case.backward((torch.stack(predictions) - case.targets).square().mean())

    def ours_windows() -> list[Tensor]:
        predictions = windowed_velocities(ours_policy(), states, [(end, end - WINDOW) for end in ends], SCHEDULE)
        return case.backward((torch.stack(predictions) - case.targets).square().mean())

    def textbook_segment() -> list[Tensor]:
        policy = textbook_policy()
        x, tau, predictions = case.x, case.tau, []
        for end in ends:
            with torch.no_grad():
                x, _ = textbook_rollout(policy.detach(), x, tau, end)
            tau = end
            predictions.append(textbook_window(policy, x, tau, tau - WINDOW))
        return case.backward((torch.stack(predictions) - case.targets).square().mean())

    def ours_segment() -> list[Tensor]:
        targets = iter(case.targets)
        settings = ImitationSettings(num_intermediate_states=STATES, loss_scale=2.0)
        uniforms = case.lengths / case.lengths.new_tensor(SEGMENT - WINDOW)
        out = imitation_segment(
            ours_policy(),
            lambda x, sigma: next(targets),
            case.x,
            case.tau,
            SEGMENT,
            SCHEDULE,
            settings,
            student_uniforms_BM=uniforms,
        )
        return case.backward(out.loss)

    def no_grad(run: Callable) -> Callable:
        def wrapped() -> list[Tensor]:
            with torch.no_grad():
                return [run()[0]]

        return wrapped

    return {
        "rollout, 37 substeps each": (
            no_grad(lambda: textbook_rollout(textbook_policy(), case.x, case.tau, case.full)),
            no_grad(lambda: rollout(ours_policy(), case.x, case.tau, case.full, SCHEDULE)),
        ),
        "rollout, 0 to 34 substeps": (
            no_grad(lambda: textbook_rollout(textbook_policy(), case.x, case.tau, ends[1])),
            no_grad(lambda: rollout(ours_policy(), case.x, case.tau, ends[1], SCHEDULE)),
        ),
        "2 windows of 3, forward+backward": (textbook_windows, ours_windows),
        "whole segment loss, forward+backward": (textbook_segment, ours_segment),
    }


def compare(textbook: Callable, ours: Callable, repeats: int) -> tuple[float, float, float]:
    """(textbook ms, our ms, largest relative difference of the results). The best time: other load only adds."""
    pairs = zip(textbook(), ours(), strict=True)
    difference = max(((a - b).norm() / a.norm()).item() for a, b in pairs)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for run, out in zip((textbook, ours), times, strict=True):
            start = time.perf_counter()
            run()
            out.append(1e3 * (time.perf_counter() - start))
    return min(times[0]), min(times[1]), difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cases", default="demo,qwen1,qwen2", help=f"comma-separated, of {list(CASES)}")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, CPU, {torch.get_num_threads()} thread(s), float32")
    for name in args.cases.split(","):
        B, K, C, H, W = CASES[name]
        print(f"\n{name}: B={B} K={K} C={C} {H}x{W}\n{'':38}{'textbook':>10}{'ours':>10}{'ratio':>8}{'rel. diff':>11}")
        for job, (textbook, ours) in jobs(Case(CASES[name])).items():
            slow, fast, difference = compare(textbook, ours, args.repeats)
            print(f"{job:38}{slow:8.1f}ms{fast:8.1f}ms{slow / fast:7.1f}x{difference:11.1e}")


if __name__ == "__main__":
    main()
