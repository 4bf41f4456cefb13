"""The rollout of a GMFlow policy on mixture coefficients: no image-sized work between its first and last substep.

B batch, K components, C channels, P latent pixels (of all trailing axes), N substeps.
With the policy's centred form (policies/gmflow.py), y = x - x_s - (t - s) mu_ref follows, under Euler substeps,

    y' = a y + b eps_ref + g sum_k w_k eta_k,      so      y_n = A_n y_0 + B_n eps_ref + sum_k c_k eta_k

with A, B one number per sample and c (B, K, P). The weights need eta_k . y alone, that is the Gram matrix of the eta_k
and their products with eps_ref and y_0, formed once. With many components of few channels (K > 2C) the Gram matrix is
the larger thing, and sum_k c_k eta_k is followed itself (channel_displacement). Everything is elementwise or a sum,
never a matrix product, so that autocast and TF32 leave it alone. Source of the policy: GMFlow (arXiv 2504.05304).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_ELEMENTS = 1 << 18  # CPU: numbers of eta in a block of pixels; it and its result stay in a core's cache


class SubstepTable(NamedTuple):
    """Factors of each substep, (N, B) each.

    logits = log A - (h_e e + h_p p + h_q (gram c) + h_d diag gram), with e = eta . eps_ref and p = eta . y_0;
    then c' = a c + g softmax(logits).
    """

    h_e: Tensor
    h_p: Tensor
    h_q: Tensor
    h_d: Tensor
    a: Tensor
    g: Tensor


def substep_table(s_B: Tensor, rho_B: Tensor, t_NB: Tensor, step_NB: Tensor) -> tuple[SubstepTable, Tensor, Tensor]:
    """The factors of every substep, and the final A and B, in float64. Differentiable in rho_B = exp(2 logstd)."""
    s, rho, t = s_B, rho_B, t_NB
    z = (s - t) * (s + t - 2 * s * t)
    inv_D = 1 / (t * t + rho * z)
    a = 1 + step_NB * (t - rho * (s * s * (1 - t) + t * (1 - s) ** 2)) * inv_D
    b = -step_NB * rho * s * (s - t) * inv_D
    last_A, last_B = torch.ones_like(s), torch.zeros_like(s)
    before_A, before_B = [last_A], [last_B]
    for a_B, b_B in zip(a.unbind(0), b.unbind(0), strict=True):
        last_A, last_B = a_B * last_A, torch.addcmul(b_B, a_B, last_B)
        before_A.append(last_A)
        before_B.append(last_B)
    pull = s * (1 - t) * inv_D
    h_e = t * (s - t) * inv_D + pull * torch.stack(before_B)[:-1]
    table = SubstepTable(
        h_e=h_e, h_p=pull * torch.stack(before_A)[:-1], h_q=pull, h_d=z * inv_D / 2, a=a, g=step_NB * t * s * inv_D
    )
    return table, last_A, last_B


def products(eta_BKCP: Tensor, v_BCP: Tensor) -> Tensor:
    """eta_k . v for each pixel: (B, K, P)."""
    out_BKP = torch.empty_like(eta_BKCP[:, :, 0])
    for px in _blocks(eta_BKCP):
        torch.sum(eta_BKCP[..., px] * v_BCP[:, None, :, px], 2, out=out_BKP[..., px])
    return out_BKP


def combination(c_BKP: Tensor, eta_BKCP: Tensor) -> Tensor:
    """sum_k c_k eta_k for each pixel: (B, C, P)."""
    c_BK1P = c_BKP.unsqueeze(2)
    out_BCP = eta_BKCP[:, 0] * c_BK1P[:, 0]
    for k in range(1, eta_BKCP.shape[1]):
        out_BCP.addcmul_(eta_BKCP[:, k], c_BK1P[:, k])
    return out_BCP


def gram_matrix(eta_BKCP: Tensor) -> Tensor:
    """eta_k . eta_j for each pixel: (B, K, K, P)."""
    gram_BKKP = eta_BKCP[:, :, None, 0] * eta_BKCP[:, None, :, 0]
    for c in range(1, eta_BKCP.shape[2]):
        gram_BKKP.addcmul_(eta_BKCP[:, :, None, c], eta_BKCP[:, None, :, c])
    return gram_BKKP


class Walk(NamedTuple):
    """What the host knows of one rollout: see policies.rollout.SubstepGrid."""

    order_B: Tensor | None
    active: list[int]

    def sort(self, value: Tensor | None, axis: int = 0) -> Tensor | None:
        return value if value is None or self.order_B is None else value.index_select(axis, self.order_B)

    def unsort(self, value: Tensor | None, axis: int = 0) -> Tensor | None:
        if value is None or self.order_B is None:
            return value
        return torch.empty_like(value).index_copy_(axis, self.order_B, value)


class MixtureDisplacement(torch.autograd.Function):
    """sum_k c_k eta_k (B, C, P) after all substeps, for each of several rollouts of one policy.

    apply(eta_BKCP, logweights_BKP, eps_ref_BCP, gram_BKKP, e_BKP, walks, record, *factors, *y): factors (6, N, B) and
    y_BCP (or None for zero) of each walk; record: whether gradients are enabled. gram and e = eta . eps_ref are values
    that a policy keeps; their gradients are formed here, once for all walks, so that no graph is kept between calls.
    Differentiable once, in all but gram and e.
    """

    @staticmethod
    def forward(ctx, eta_BKCP, logweights_BKP, eps_ref_BCP, gram_BKKP, e_BKP, walks, record, *factors_and_y):
        factors, starts_y = factors_and_y[: len(walks)], factors_and_y[len(walks) :]
        record = record and any(ctx.needs_input_grad)
        outputs, saved = [], []
        for walk, factors_6NB, y_BCP in zip(walks, factors, starts_y, strict=True):
            p_BKP = None if y_BCP is None else products(eta_BKCP, y_BCP)
            terms = _Terms(*(walk.sort(value) for value in (logweights_BKP, gram_BKKP, e_BKP, p_BKP)))
            factors_6NB = walk.sort(factors_6NB, axis=2)
            c_BKP, weights, starts = _run_substeps(terms, factors_6NB, walk.active, record)
            c_BKP = walk.unsort(c_BKP)
            outputs.append(combination(c_BKP, eta_BKCP))
            saved += [y_BCP, c_BKP, p_BKP, factors_6NB, *weights, *starts]
        if record:
            ctx.save_for_backward(eta_BKCP, eps_ref_BCP, gram_BKKP, e_BKP, *saved)
            ctx.walks = walks
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads_BCP):
        eta_BKCP, eps_ref_BCP, gram_BKKP, e_BKP, *saved = ctx.saved_tensors
        wants = ctx.needs_input_grad
        wants_factors, wants_y = wants[7 : 7 + len(ctx.walks)], wants[7 + len(ctx.walks) :]
        total = _Terms(torch.zeros_like(e_BKP), torch.zeros_like(gram_BKKP), torch.zeros_like(e_BKP), None)
        outer, dfactors, dys = [], [], []
        for i, (walk, grad_BCP) in enumerate(zip(ctx.walks, grads_BCP, strict=True)):
            y_BCP, c_BKP, p_BKP, factors_6NB, *saved = saved
            n = len(walk.active)
            weights, starts, saved = saved[:n], saved[n : 2 * n], saved[2 * n :]
            terms = _Terms(None, *(walk.sort(value) for value in (gram_BKKP, e_BKP, p_BKP)))
            part = _Terms(
                *(value if walk.order_B is None else torch.zeros_like(value) for value in total[:3]),
                None if p_BKP is None else torch.zeros_like(p_BKP),
            )
            dfactors_6NB = torch.zeros_like(factors_6NB) if wants_factors[i] else None
            dc_BKP = walk.sort(products(eta_BKCP, grad_BCP))
            _reverse_substeps(part, dfactors_6NB, dc_BKP, terms, factors_6NB, walk.active, weights, starts)
            if walk.order_B is not None:
                for whole, value in zip(total[:3], part[:3], strict=True):
                    whole.index_add_(0, walk.order_B, value)
            dp_BKP = walk.unsort(part.p)
            outer += [(c_BKP, grad_BCP), (dp_BKP, y_BCP)]
            dfactors.append(walk.unsort(dfactors_6NB, axis=2))
            dys.append(combination(dp_BKP, eta_BKCP) if wants_y[i] else None)
        deta = _eta_gradient(eta_BKCP, total.gram, [*outer, (total.e, eps_ref_BCP)]) if wants[0] else None
        deps = combination(total.e, eta_BKCP) if wants[2] else None
        return deta, total.logweights, deps, None, None, None, None, *dfactors, *dys


def channel_displacement(
    eta_BKCP: Tensor, logweights_BKP: Tensor, eps_ref_BCP: Tensor, factors_6NB: Tensor, y_BCP: Tensor | None, walk: Walk
) -> Tensor:
    """As MixtureDisplacement for one rollout, following v = sum_k c_k eta_k in the channels; plain autograd."""
    eta, logweights, eps_ref, y = (walk.sort(value) for value in (eta_BKCP, logweights_BKP, eps_ref_BCP, y_BCP))
    factors_6NB = walk.sort(factors_6NB, axis=2)
    square_BKP = eta.square().sum(2)
    v, finished = torch.zeros_like(eps_ref), []
    for n, m in enumerate(walk.active):
        if m < len(v):
            finished.append(v[m:])
            v = v[:m]
        h_e, h_p, h_q, h_d, a, g = factors_6NB[:, n, :m, None, None].unbind(0)
        pull = h_e * eps_ref[:m] + h_q * v
        if y is not None:
            pull = pull + h_p * y[:m]
        logits = logweights[:m] - h_d * square_BKP[:m] - (eta[:m] * pull.unsqueeze(1)).sum(2)
        v = a * v + g * (eta[:m] * logits.softmax(1).unsqueeze(2)).sum(1)
    return walk.unsort(torch.cat([v, *reversed(finished)]))


class _Terms(NamedTuple):
    """What the logits of a substep are made of, samples in the walk's order; or the gradients of these."""

    logweights: Tensor | None
    gram: Tensor
    e: Tensor
    p: Tensor | None

    @property
    def diagonal(self) -> Tensor:
        return self.gram.diagonal(dim1=1, dim2=2).transpose(1, 2)

    def first(self, m: int) -> "_Terms":
        return self if m == len(self.e) else _Terms(*(None if value is None else value[:m] for value in self))


def _run_substeps(
    terms: _Terms, factors_6NB: Tensor, active: list[int], record: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The substeps in place, samples by falling substep count.

    Returns the last c (B, K, P) and, to record, the weights of every substep and the c it starts from.
    """
    c = torch.zeros_like(terms.e)
    weights, starts = [], []
    scales = factors_6NB[..., None, None].unbind(1)
    count = -1
    for n, m in enumerate(active):
        if m != count:  # views of the samples still on their way
            count, now, c_m = m, terms.first(m), c[:m]
            rows, diagonal = now.gram.unbind(1), now.diagonal
        h_e, h_p, h_q, h_d, a, g = scales[n][:, :m].unbind(0)
        logits = torch.addcmul(now.logweights, now.e, h_e, value=-1).addcmul_(diagonal, h_d, value=-1)
        if now.p is not None:
            logits.addcmul_(now.p, h_p, value=-1)
        if n > 0:  # c starts at zero
            for row, c_k in zip(rows, (c_m * h_q).unsqueeze(2).unbind(1), strict=True):
                logits.addcmul_(row, c_k, value=-1)
        w = logits.softmax(1)
        if record:
            weights.append(w)
            starts.append(c_m.clone())
        c_m.mul_(a).addcmul_(w, g)
    return c, weights, starts


def _reverse_substeps(
    grads: _Terms,
    dfactors_6NB: Tensor | None,
    dc: Tensor,
    terms: _Terms,
    factors_6NB: Tensor,
    active: list[int],
    weights: list[Tensor],
    starts: list[Tensor],
) -> None:
    """Walk the substeps backwards and add up the gradients of what they read. dc: gradient of the last c, used up."""
    scales = factors_6NB[..., None, None].unbind(1)
    for n in reversed(range(len(active))):
        m, w, c_m, dc_m = active[n], weights[n], starts[n], dc[: active[n]]
        now, out = terms.first(m), grads.first(m)
        h_e, h_p, h_q, h_d, a, g = scales[n][:, :m].unbind(0)
        dw = w * dc_m
        if dfactors_6NB is not None:
            dfactors_6NB[5, n, :m] = dw.sum((1, 2))
            dfactors_6NB[4, n, :m] = _dot(dc_m, c_m)
        dlogits = torch.addcmul(dw, w, dw.sum(1, keepdim=True), value=-1).mul_(g)
        dc_m.mul_(a)
        out.logweights.add_(dlogits)
        out.e.addcmul_(dlogits, h_e, value=-1)
        out.diagonal.addcmul_(dlogits, h_d, value=-1)
        if now.p is not None:
            out.p.addcmul_(dlogits, h_p, value=-1)
        pulled = torch.zeros_like(c_m)  # gram dlogits
        if n > 0:
            scaled_c = c_m * h_q
            rows, drows = now.gram.unbind(1), out.gram.unbind(1)
            for row, drow, dlogit_k in zip(rows, drows, dlogits.unsqueeze(2).unbind(1), strict=True):
                pulled.addcmul_(row, dlogit_k)
                drow.addcmul_(scaled_c, dlogit_k, value=-1)
            dc_m.addcmul_(pulled, h_q, value=-1)
        if dfactors_6NB is not None:
            dfactors_6NB[0, n, :m] = -_dot(dlogits, now.e)
            dfactors_6NB[2, n, :m] = -_dot(pulled, c_m)
            dfactors_6NB[3, n, :m] = -_dot(dlogits, now.diagonal)
            if now.p is not None:
                dfactors_6NB[1, n, :m] = -_dot(dlogits, now.p)


def _dot(a_BKP: Tensor, b_BKP: Tensor) -> Tensor:
    return (a_BKP * b_BKP).sum((1, 2))


def _eta_gradient(eta_BKCP: Tensor, dgram_BKKP: Tensor, outer: list[tuple[Tensor | None, Tensor | None]]) -> Tensor:
    """sum_j (dG_kj + dG_jk) eta_j, and for each (coefficients (B, K, P), vector (B, C, P)) their outer product."""
    deta_BKCP = torch.empty_like(eta_BKCP)
    for px in _blocks(eta_BKCP):
        out, eta = deta_BKCP[..., px], eta_BKCP[..., px]
        both = dgram_BKKP[..., px] + dgram_BKKP[..., px].transpose(1, 2)
        torch.mul(both[:, :, 0, None], eta[:, 0, None], out=out)
        for j in range(1, eta.shape[1]):
            out.addcmul_(both[:, :, j, None], eta[:, j, None])
        for c_BKP, v_BCP in outer:
            if c_BKP is not None and v_BCP is not None:
                out.addcmul_(c_BKP[:, :, None, px], v_BCP[:, None, :, px])
    return deta_BKCP


def _blocks(eta_BKCP: Tensor) -> Iterator[slice]:
    """Pixel ranges to work on one after the other; all at once on an accelerator."""
    width = pixels = eta_BKCP.shape[-1]
    if eta_BKCP.device.type == "cpu":
        width = max(64, BLOCK_ELEMENTS * pixels // max(1, eta_BKCP.numel()))
    for low in range(0, pixels, width):
        yield slice(low, low + width)
