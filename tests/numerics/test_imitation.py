"""imitation_segment with fixed uniforms against a Python loop over samples, states and substeps."""

from dataclasses import dataclass, field

import pytest
import torch

from piflow_dist.distill.imitation import ImitationSettings, imitation_segment
from piflow_dist.flow.schedule import FlowSchedule
from piflow_dist.policies import windowed_velocity

from .cases import F64, dx_arrays, gm_arrays, normal, per_sample, relative_error_B, rng
from .reference import Imitation, imitate, mean_velocity, warp

SHIFT = 3.2
SCHEDULE = FlowSchedule(shift=SHIFT)
# Four steps with the last one halved, the third sample in the last; the fourth is a segment of another size.
TAU_SRC = [1.0, 3 / 7, 1 / 7, 0.8]
SEGMENTS = [2 / 7, 2 / 7, 1 / 7, 0.37]


def teacher(x, sigma):
    """Some velocity that bends in x and sigma; sigma: (B,) for a batch, or a float for one sample."""
    batched = isinstance(sigma, torch.Tensor)
    sigma = per_sample(sigma, x) if batched else sigma
    return torch.tanh(1.3 * x.roll(1, -1)) - 0.5 * sigma * x + torch.cos(4 * x.roll(1, -2) * sigma)


def arrays_for(kind: str):
    sources = [warp(tau, SHIFT) for tau in TAU_SRC]
    if kind == "gm":
        return gm_arrays(sources, components=3, channels=2, space=(2, 3), seed=70)
    if kind == "gm frames":
        return gm_arrays(sources, components=3, channels=2, space=(2, 1, 3), seed=71)
    return dx_arrays(sources, mode=kind.split()[1], nodes=4, channels=2, space=(2, 3), segment_size=2 / 7, seed=72)


@dataclass
class Setup:
    """Everything that fixes one call."""

    kind: str = "gm"
    ratio: float = 0.0
    states: int = 2
    window: int = 3
    total: int = 128
    scale: float = 30.0
    stack: bool = False
    drop: bool = False
    dtype: torch.dtype = F64
    seed: int = 80
    uniforms: torch.Tensor = field(init=False)
    cuts: torch.Tensor = field(init=False)

    def __post_init__(self):
        self.uniforms = torch.rand(len(TAU_SRC), self.states, generator=rng(self.seed), dtype=F64).to(self.dtype)
        self.cuts = torch.rand(len(TAU_SRC), self.states - 1, generator=rng(self.seed + 1), dtype=F64).to(self.dtype)

    def frozen_arrays(self, arrays):
        """The detached policy that picks the states may have lost components."""
        frozen = arrays.leaves()
        if self.drop:
            frozen.logweights = frozen.logweights.detach().clone()
            frozen.logweights[0, 1] = frozen.logweights[3, 2] = -torch.inf
        return frozen

    def package(self, arrays):
        settings = ImitationSettings(
            num_intermediate_states=self.states,
            window_substeps=self.window,
            total_substeps=self.total,
            loss_scale=self.scale,
            stack_teacher_states=self.stack,
        )
        options = {"rollout_policy": self.frozen_arrays(arrays).package().detach()} if self.drop else {}
        return imitation_segment(
            arrays.package(),
            teacher,
            arrays.x_src,
            torch.tensor(TAU_SRC, dtype=self.dtype),
            torch.tensor(SEGMENTS, dtype=self.dtype),
            SCHEDULE,
            settings,
            student_uniforms_BM=self.uniforms,
            teacher_uniforms_BM1=self.cuts,
            teacher_ratio=self.ratio,
            **options,
        )

    def reference(self, arrays) -> list[Imitation]:
        frozen = self.frozen_arrays(arrays).reference()
        return [
            imitate(
                policy,
                teacher,
                arrays.x_src[b].double(),
                TAU_SRC[b],
                SEGMENTS[b],
                SHIFT,
                window_substeps=self.window,
                total_substeps=self.total,
                ratio=self.ratio,
                student_uniforms=self.uniforms[b].tolist(),
                teacher_cuts=self.cuts[b].tolist(),
                frozen=frozen[b].detach(),
            )
            for b, policy in enumerate(arrays.reference())
        ]

    def check(self, limit: float = 1e-9, gradient_limit: float | None = None) -> None:
        arrays = arrays_for(self.kind).to(self.dtype)
        ours, theirs = arrays.leaves(), arrays.leaves()
        out, want = self.package(ours), self.reference(theirs)
        predictions = torch.stack([torch.stack(one.predictions) for one in want], 1)
        targets = torch.stack([torch.stack(one.targets) for one in want], 1)
        for got, right in ((out.prediction, predictions), (out.target, targets)):
            assert got.shape == right.shape == (self.states, *arrays.x_src.shape)
            assert relative_error_B(got.flatten(0, 1), right.detach().flatten(0, 1)).max() < limit
        assert (
            relative_error_B(out.x_end - arrays.x_src, torch.stack([w.x_end for w in want]) - arrays.x_src).max()
            < limit
        )
        loss_B = self.scale / 2 * torch.stack([one.squared_error() for one in want])
        torch.testing.assert_close(out.loss_B.double(), loss_B.detach(), rtol=10 * limit, atol=0)
        torch.testing.assert_close(out.loss.double(), loss_B.mean().detach(), rtol=10 * limit, atol=0)
        assert not (out.target.requires_grad or out.x_end.requires_grad or out.loss_B.requires_grad)
        gradients = torch.autograd.grad(out.loss, ours.outputs())
        right_gradients = torch.autograd.grad(loss_B.mean(), theirs.outputs())
        for got, right in zip(gradients, right_gradients, strict=True):
            assert relative_error_B(got, right).max() < (gradient_limit or limit)


@pytest.mark.parametrize("ratio", [0.0, 0.45, 1.0])
@pytest.mark.parametrize("kind", ["gm", "gm frames", "dx grid", "dx polynomial"])
def test_loss_states_end_and_gradients(kind, ratio):
    Setup(kind, ratio).check()


@pytest.mark.parametrize("ratio", [0.0, 0.3])
@pytest.mark.parametrize("states", [1, 2, 4])
def test_number_of_states(states, ratio):
    Setup(states=states, ratio=ratio, seed=90).check()


@pytest.mark.parametrize("ratio", [0.0, 0.3])
@pytest.mark.parametrize("window", [0, 1, 2, 10])
def test_window(window, ratio):
    """0 and 1: the local velocity, unless the teacher interval makes the rollout longer."""
    Setup(window=window, ratio=ratio, seed=100).check()


def test_window_as_long_as_the_segment():
    """Every state is the source, every prediction the mean over the whole segment."""
    Setup(window=1000, seed=105).check()


@pytest.mark.parametrize("total, scale", [(32, 30.0), (200, 3.0)])
def test_substeps_and_loss_scale(total, scale):
    Setup(total=total, scale=scale, ratio=0.5, seed=110).check()


def test_components_dropped_from_the_rollout_policy_only():
    """The states come from the thinned policy, the predictions and all gradients from the whole one."""
    for ratio in (0.0, 0.6):
        Setup(drop=True, ratio=ratio, seed=120).check()


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_stacked_teacher_states(ratio):
    """One teacher call on all states where the ratio is 0; the numbers stay."""
    Setup(stack=True, ratio=ratio, states=3, seed=130).check()


@pytest.mark.parametrize("ratio", [0.0, 0.45, 1.0])
@pytest.mark.parametrize("kind", ["gm", "dx grid"])
def test_float32(kind, ratio):
    Setup(kind, ratio, dtype=torch.float32, seed=140).check(limit=2e-4)


def test_uniforms_of_one_reach_the_window_and_of_zero_stay_at_the_source():
    setup = Setup(seed=150)
    setup.uniforms = torch.tensor([[0.0, 1.0]] * len(TAU_SRC), dtype=F64)
    setup.check()
    out = setup.package(arrays_for("gm").leaves())
    ends = [tau - length + 3 * length / round(length * 128) for tau, length in zip(TAU_SRC, SEGMENTS, strict=True)]
    want = torch.tensor([[warp(tau, SHIFT) for tau in TAU_SRC], [warp(tau, SHIFT) for tau in ends]], dtype=F64)
    torch.testing.assert_close(out.sigma_MB.double(), want, rtol=1e-9, atol=0)


def test_teacher_sees_states_without_gradients():
    def watching(x, sigma_B):
        assert not torch.is_grad_enabled() and not x.requires_grad
        return teacher(x, sigma_B)

    arrays = arrays_for("gm").leaves()
    imitation_segment(
        arrays.package(),
        watching,
        arrays.x_src,
        torch.tensor(TAU_SRC, dtype=F64),
        torch.tensor(SEGMENTS, dtype=F64),
        SCHEDULE,
        ImitationSettings(),
        generator=rng(1),
    )


def test_drawn_uniforms_fill_the_segment_evenly():
    """Many samples with their own draws: at r = 0 the states' times are the order statistics of two uniforms."""
    count, segment = 4000, 2 / 7
    arrays = gm_arrays([1.0] * count, components=1, channels=1, space=(1, 1), seed=160)
    out = imitation_segment(
        arrays.package(),
        teacher,
        arrays.x_src,
        torch.ones(count, dtype=F64),
        torch.full((count,), segment, dtype=F64),
        FlowSchedule(shift=1.0),
        ImitationSettings(),
        generator=rng(2),
    )
    reach = segment - 3 * segment / round(segment * 128)
    first, second = (1 - out.sigma_MB.double()) / reach
    assert (first <= second).all() and second.max() <= 1 + 1e-6 and first.min() >= 0
    for place, mean in ((first, 1 / 3), (second, 2 / 3)):
        assert abs(place.mean().item() - mean) < 4 * (1 / 18 / count) ** 0.5


WINDOWS = [0.0, 0.4, 1.0, 1.6, 3.0, 12.3]


@pytest.mark.parametrize("kind", ["gm", "gm -3", "gm 1", "dx grid", "dx polynomial"])
@pytest.mark.parametrize("dtype, limit", [(F64, 1e-9), (torch.float32, 2e-4)])
def test_windowed_velocity_and_its_gradient(kind, dtype, limit):
    """Rollouts of 0 to 12 substeps in one batch, off the source; gradients for the network's outputs and x."""
    sources = [warp(0.9, SHIFT)] * len(WINDOWS)
    name, _, option = kind.partition(" ")
    if name == "gm":
        arrays = gm_arrays(sources, logstd=float(option or -1), seed=170)
    else:
        arrays = dx_arrays(sources, mode=option, seed=171)
    arrays = arrays.to(dtype)
    start_B = torch.full((len(WINDOWS),), 0.75, dtype=dtype)
    end_B = start_B - torch.tensor(WINDOWS, dtype=dtype) / 128
    x_start = (arrays.x_src + 0.2 * normal(*arrays.x_src.shape, seed=172)).to(dtype)
    cotangent = normal(*arrays.x_src.shape, seed=173).to(dtype)
    ours, theirs = arrays.leaves(), arrays.leaves()
    x, x_ref = x_start.clone().requires_grad_(), x_start.clone().requires_grad_()
    got = windowed_velocity(ours.package(), x, start_B, end_B, SCHEDULE)
    want = torch.stack(
        [
            mean_velocity(policy.velocity, x_ref[b].double(), start_B[b].item(), end_B[b].item(), SHIFT, 128)
            for b, policy in enumerate(theirs.reference())
        ]
    )
    assert relative_error_B(got.detach(), want.detach()).max() < limit
    gradients = torch.autograd.grad((got * cotangent).sum(), (*ours.outputs(), x))
    right_gradients = torch.autograd.grad((want * cotangent).sum(), (*theirs.outputs(), x_ref))
    for value, right in zip(gradients, right_gradients, strict=True):
        assert relative_error_B(value, right).max() < limit


@pytest.mark.parametrize("kind", ["gm", "dx grid", "dx polynomial"])
@pytest.mark.parametrize("tau_start", [0.9, 0.7])
def test_gradient_with_respect_to_the_source_state(kind, tau_start):
    """The policy leans on x_src everywhere; at tau 0.9 the rollout starts there, and x cancels from DX."""
    sources = [warp(0.9, SHIFT)] * 3
    arrays = gm_arrays(sources, seed=180) if kind == "gm" else dx_arrays(sources, mode=kind.split()[1], seed=181)
    start_B = torch.full((3,), tau_start, dtype=F64)
    end_B = start_B - torch.tensor([0.0, 3.0, 9.0], dtype=F64) / 128
    cotangent = normal(*arrays.x_src.shape, seed=182)
    gradients = []
    for package in (True, False):
        leaves = arrays.leaves()
        leaves.x_src = x = leaves.x_src.detach().clone().requires_grad_()
        if package:
            u = windowed_velocity(leaves.package(), x, start_B, end_B, SCHEDULE)
        else:
            spans = zip(leaves.reference(), x, end_B.tolist(), strict=True)
            u = torch.stack([mean_velocity(p.velocity, one, tau_start, end, SHIFT, 128) for p, one, end in spans])
        gradients.append(torch.autograd.grad((u * cotangent).sum(), (x, *leaves.outputs())))
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
