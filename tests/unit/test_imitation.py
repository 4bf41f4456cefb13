"""imitation_segment: where the states lie, who is asked what, and where gradients go."""

import pytest
import torch
from torch.testing import assert_close

from piflow_dist.distill.imitation import ImitationSettings, imitation_segment
from piflow_dist.flow.schedule import FlowSchedule
from piflow_dist.policies import DXPolicy, GMFlowPolicy, rollout, windowed_velocity

SCHEDULE = FlowSchedule(3.2)
B, K, C = 3, 4, 5
TAU = torch.tensor([1.0, 5 / 7, 1 / 7])
SIZE = torch.tensor([2 / 7, 2 / 7, 1 / 7])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def student(frames=False, kind="gm"):
    """(leaves, policy, x_src) of a batch at TAU."""
    space = (2, 3, 2) if frames else (3, 2)
    x_src = normal(B, C, *space, seed=4)
    if kind == "dx":
        out = normal(B, 10, C, *space).requires_grad_()
        return [out], DXPolicy(out, x_src, SCHEDULE.warp(TAU)), x_src
    leaves = [
        normal(B, K, C, *space),
        normal(B, *[1] * (2 + len(space)), seed=1) * 0.2 - 1.5,
        normal(B, K, 1, *space, seed=2),
    ]
    for leaf in leaves:
        leaf.requires_grad_()
    return leaves, GMFlowPolicy(*leaves, x_src, SCHEDULE.warp(TAU)), x_src


class Teacher:
    """A fixed linear velocity field that notes what it was asked."""

    def __init__(self):
        self.states, self.sigmas, self.grad = [], [], []

    def __call__(self, x, sigma):
        self.states.append(x)
        self.sigmas.append(sigma)
        self.grad.append(torch.is_grad_enabled())
        return 0.5 * x + sigma.reshape(-1, *[1] * (x.dim() - 1))


def segment(policy, x_src, teacher=None, **changes):
    settings = ImitationSettings(
        **{key: changes.pop(key) for key in list(changes) if key in ImitationSettings.__dataclass_fields__}
    )
    return imitation_segment(policy, teacher or Teacher(), x_src, TAU, SIZE, SCHEDULE, settings, **changes)


UNIFORMS = torch.tensor([[0.9, 0.2], [0.5, 0.4], [0.0, 1.0]])


def test_states_lie_on_the_policy_at_the_sorted_uniforms():
    leaves, policy, x_src = student()
    teacher = Teacher()
    out = segment(policy, x_src, teacher, student_uniforms_BM=UNIFORMS)
    window = 3 * SIZE / torch.round(SIZE * 128)
    taus = TAU - UNIFORMS.sort(1)[0].T * (SIZE - window)
    assert_close(torch.stack(teacher.sigmas), SCHEDULE.warp(taus))
    assert_close(out.sigma_MB, SCHEDULE.warp(taus))
    x = x_src
    for i, start in enumerate((TAU, taus[0])):
        x, _ = rollout(policy.detach(), x, start, taus[i], SCHEDULE)
        assert_close(teacher.states[i], x)
        assert_close(
            out.prediction[i], windowed_velocity(policy, x, taus[i], taus[i] - window, SCHEDULE), rtol=1e-4, atol=1e-5
        )
        assert_close(out.target[i], 0.5 * x + SCHEDULE.warp(taus[i]).reshape(B, 1, 1, 1))
    assert_close(out.x_end, rollout(policy.detach(), x, taus[1], TAU - SIZE, SCHEDULE)[0], rtol=1e-4, atol=1e-5)
    assert teacher.grad == [False, False]


def test_loss_is_the_scaled_mean_square_and_reaches_the_policy():
    leaves, policy, x_src = student()
    out = segment(policy, x_src, student_uniforms_BM=UNIFORMS, loss_scale=30.0)
    assert_close(out.loss, 15 * (out.prediction - out.target).square().mean())
    assert_close(out.loss_B.mean(), out.loss.detach())
    assert not (out.loss_B.requires_grad or out.target.requires_grad or out.x_end.requires_grad)
    out.loss.backward()
    assert all(leaf.grad.isfinite().all() and leaf.grad.abs().sum() > 0 for leaf in leaves)


def test_gradient_ignores_how_the_states_came_about():
    """The states come from the detached policy: only the prediction at each of them is differentiated."""
    leaves, policy, x_src = student()
    teacher = Teacher()
    out = segment(policy, x_src, teacher, student_uniforms_BM=UNIFORMS)
    got = torch.autograd.grad(out.loss, leaves)
    window = 3 * SIZE / torch.round(SIZE * 128)
    taus = TAU - UNIFORMS.sort(1)[0].T * (SIZE - window)
    fixed = torch.stack(
        [windowed_velocity(policy, x, tau, tau - window, SCHEDULE) for x, tau in zip(teacher.states, taus, strict=True)]
    )
    for a, b in zip(got, torch.autograd.grad(15 * (fixed - out.target).square().mean(), leaves), strict=True):
        assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind, frames", [("gm", False), ("gm", True), ("dx", False)])
def test_stacked_teacher_equals_unstacked(kind, frames):
    leaves, policy, x_src = student(frames, kind)
    one, many = Teacher(), Teacher()
    stacked = segment(policy, x_src, one, student_uniforms_BM=UNIFORMS, stack_teacher_states=True)
    plain = segment(policy, x_src, many, student_uniforms_BM=UNIFORMS)
    assert len(one.states) == 1 and len(many.states) == 2
    assert_close(one.states[0], torch.cat(many.states))
    assert_close(one.sigmas[0], torch.cat(many.sigmas))
    for name in ("loss", "prediction", "target", "x_end", "sigma_MB"):
        assert_close(getattr(stacked, name), getattr(plain, name))
    assert stacked.prediction.shape == (2, *x_src.shape)


def test_teacher_ratio_mixes_policy_and_teacher_steps():
    leaves, policy, x_src = student()
    teacher, cuts, ratio = Teacher(), torch.tensor([[0.3], [0.8], [0.5]]), 0.6
    out = segment(
        policy,
        x_src,
        teacher,
        student_uniforms_BM=UNIFORMS,
        teacher_uniforms_BM1=cuts,
        teacher_ratio=ratio,
        stack_teacher_states=True,
    )  # not possible here: each state needs the answer before it
    assert len(teacher.states) == 2
    window = 3 * SIZE / torch.round(SIZE * 128)
    room = SIZE - window
    student_steps = UNIFORMS.sort(1)[0].T.diff(dim=0, prepend=torch.zeros(1, B)) * (1 - ratio) * room
    teacher_steps = torch.stack([cuts[:, 0], 1 - cuts[:, 0]]) * ratio * room
    x, tau, frozen = x_src, TAU, policy.detach()
    for i in range(2):
        a = tau - student_steps[i]
        x, sigma_a = rollout(frozen, x, tau, a, SCHEDULE)
        assert_close(teacher.states[i], x, rtol=1e-4, atol=1e-5)
        tau = a - teacher_steps[i]
        prediction = windowed_velocity(policy, x, a, tau - window, SCHEDULE)
        assert_close(out.prediction[i], prediction, rtol=1e-3, atol=1e-4)
        x = x + (SCHEDULE.warp(tau) - sigma_a).reshape(B, 1, 1, 1) * out.target[i]
    assert_close(out.x_end, rollout(frozen, x, tau, (TAU - SIZE).clamp(min=0), SCHEDULE)[0], rtol=1e-4, atol=1e-5)


def test_full_teacher_ratio_walks_the_segment_along_the_teacher():
    leaves, policy, x_src = student()
    teacher = Teacher()
    out = segment(policy, x_src, teacher, teacher_ratio=1.0, generator=torch.Generator().manual_seed(0))
    assert torch.equal(teacher.states[0], x_src)
    assert out.prediction.isfinite().all() and out.x_end.isfinite().all()


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("window_substeps", [0, 3, 1000])
def test_time_never_passes_the_end_of_the_segment(ratio, window_substeps):
    leaves, policy, x_src = student()
    for uniforms in (torch.ones(B, 3), torch.zeros(B, 3)):
        out = segment(
            policy,
            x_src,
            student_uniforms_BM=uniforms,
            teacher_uniforms_BM1=uniforms[:, :2],
            teacher_ratio=ratio,
            num_intermediate_states=3,
            window_substeps=window_substeps,
        )
        assert (out.sigma_MB <= SCHEDULE.warp(TAU) + 1e-6).all()
        assert (out.sigma_MB >= SCHEDULE.warp(TAU - SIZE).clamp(min=0) - 1e-6).all()
        assert out.loss.isfinite() and out.x_end.isfinite().all()


def test_no_window_takes_the_local_velocity():
    leaves, policy, x_src = student()
    teacher = Teacher()
    out = segment(policy, x_src, teacher, student_uniforms_BM=UNIFORMS, window_substeps=0)
    for i in range(2):
        local = policy.velocity(teacher.states[i], teacher.sigmas[i])
        assert_close(out.prediction[i], local, rtol=1e-3, atol=1e-4)


def test_generator_fixes_the_randomness_and_draws_student_first():
    leaves, policy, x_src = student()
    first = segment(policy, x_src, generator=torch.Generator().manual_seed(5))
    again = segment(policy, x_src, generator=torch.Generator().manual_seed(5))
    assert torch.equal(first.prediction, again.prediction)
    g = torch.Generator().manual_seed(5)
    given = segment(
        policy,
        x_src,
        student_uniforms_BM=torch.rand(B, 2, generator=g),
        teacher_uniforms_BM1=torch.rand(B, 1, generator=g),
    )
    assert torch.equal(first.prediction, given.prediction)
    other = segment(policy, x_src, generator=torch.Generator().manual_seed(6))
    assert not torch.equal(first.prediction, other.prediction)


def test_rollout_policy_picks_the_states_but_not_the_prediction():
    leaves, policy, x_src = student()
    dropped = policy.detach().with_dropout(0.5, torch.Generator().manual_seed(1))
    teacher = Teacher()
    out = segment(policy, x_src, teacher, student_uniforms_BM=UNIFORMS, rollout_policy=dropped)
    taus = SCHEDULE.unwarp(out.sigma_MB)
    assert_close(teacher.states[0], rollout(dropped, x_src, TAU, taus[0], SCHEDULE)[0], rtol=1e-4, atol=1e-5)
    plain = segment(policy, x_src, student_uniforms_BM=UNIFORMS)
    assert (out.target - plain.target).abs().max() > 1e-3
    window = 3 * SIZE / torch.round(SIZE * 128)
    assert_close(
        out.prediction[1],
        windowed_velocity(policy, teacher.states[1], taus[1], taus[1] - window, SCHEDULE),
        rtol=1e-3,
        atol=1e-4,
    )


def test_bfloat16_network_output_gives_a_float32_loss():
    leaves, _, x_src = student()
    low = [leaf.detach().bfloat16().requires_grad_() for leaf in leaves]
    policy = GMFlowPolicy(*low, x_src.bfloat16(), SCHEDULE.warp(TAU))
    out = segment(policy, policy.x_src, lambda x, sigma: x.bfloat16(), student_uniforms_BM=UNIFORMS)
    assert out.loss.dtype == out.target.dtype == out.x_end.dtype == torch.float32
    out.loss.backward()
    assert all(leaf.grad.dtype == torch.bfloat16 and leaf.grad.isfinite().all() for leaf in low)


def test_one_segment_size_for_all_samples():
    leaves, policy, x_src = student()
    args = (policy, Teacher(), x_src, TAU, 1 / 7, SCHEDULE, ImitationSettings(), UNIFORMS)
    out = imitation_segment(*args)
    per_sample = imitation_segment(*args[:4], torch.full((B,), 1 / 7), *args[5:])
    assert_close(out.loss, per_sample.loss)


def test_errors_name_value_and_option():
    leaves, policy, x_src = student()
    with pytest.raises(ValueError, match="teacher_ratio=1.5"):
        segment(policy, x_src, teacher_ratio=1.5)
    with pytest.raises(ValueError, match=r"student_uniforms_BM.*\(3, 2\).*num_intermediate_states"):
        segment(policy, x_src, student_uniforms_BM=torch.rand(B, 3))
    with pytest.raises(ValueError, match=r"teacher_uniforms_BM1.*\(3, 1\)"):
        segment(policy, x_src, teacher_uniforms_BM1=torch.rand(B, 2))
    with pytest.raises(ValueError, match="num_intermediate_states=0"):
        ImitationSettings(num_intermediate_states=0)
    with pytest.raises(ValueError, match="window_substeps=-1"):
        ImitationSettings(window_substeps=-1)
