"""Advantages and returns: GAE, the truncated EGAE of T-PPO, Monte Carlo returns, the length-adaptive lambda, whitening.

    delta_t = r_t + gamma V(s_{t+1}) - V(s_t),        A_t = delta_t + gamma lam A_{t+1}    inside a row's run of tokens

GAE and EGAE differ in what stands for V after the run's last token: that is the whole of truncation. All sums over a run are
`recurrence.discounted_sum`; the arguments are checked in checks.py. Suffixes: B responses, T response tokens, right-padded.
`values_BT[b, t]` is V(s_t) of row b, the value before token t.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from tppo_ref.method import checks
from tppo_ref.method.checks import Runs, refused
from tppo_ref.method.recurrence import discounted_sum

CutValue = Literal["previous", "critic", "zero"]
WHITEN_EPS = 1e-8  # added to the standard deviation by `whiten`


@torch.no_grad()
def gae(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, *,
    gamma: float, lam: float | Tensor, last_value_B: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16), over one run of tokens per row.

        delta_t = r_t + gamma V(s_{t+1}) - V(s_t),        A_t = sum_k (gamma lam)^k delta_{t+k}    to the end of the run

    What follows a row's last token is worth 0, or `last_value_B[b]` if given. lam = 0 is the one-step error delta; lam = 1 is the
    Monte Carlo return minus V; with V = 0 as well, the return.

    rewards, values  [B, T], float32 or float64, the same dtype, in units of reward. Not read outside the mask.
    mask             [B, T] bool, per row one contiguous run, which may be empty and may start anywhere.
    gamma, lam       in [0, 1]; lam a number or a float tensor [B].
    last_value_B     [B], the dtype of rewards; read on every row whose run is not empty.
    Returns [B, T] in the same dtype, exactly 0 outside the mask, without gradient; neither autocast nor TF32 acts here. Raises
    ValueError for a wrong rank, shape, dtype or device, a hole in a run, gamma or lam out of range, and values that are read but
    not finite. Departs from the paper only in that the sum is finite: a run has an end.
    """
    runs = checks.tokens(rewards_BT, mask_BT, values_BT)
    end_value_B = rewards_BT.new_zeros(len(rewards_BT))
    if last_value_B is not None:
        end_value_B = checks.last_value(last_value_B, rewards_BT, read_B=runs.stop_B > runs.first_B)
    return _sum_of_deltas(rewards_BT, values_BT, runs, end_value_B, gamma, lam)


@torch.no_grad()
def egae(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, cut_B: Tensor, *,
    gamma: float, lam: float | Tensor, cut_value: CutValue = "previous", last_value_B: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Extended GAE of T-PPO (arXiv 2506.15050): GAE on responses of which some are cut while still running.

        A_t = delta_t + gamma lam A_{t+1},  A_l = 0,      delta_{l-1} = r_{l-1} + gamma V(s_l) - V(s_{l-1})

    for a run that was cut before token l. `cut_value` says what stands for V(s_l):
        "previous"  V(s_{l-1}), the run's own last value: the paper's rule. The last delta is r + (gamma - 1) V: 0 with gamma 1.
        "critic"    last_value_B, the critic's estimate after the cut: bootstrapped truncation. Unbiased for V exact.
        "zero"      0: a trainer that takes the cut for an end.
    Rows that are not cut agree with `gae`, under each rule; a cut row with an empty run gives zeros.

    cut_B            [B] bool, True where the run ends at a window's edge and the response still runs.
    last_value_B     [B], for "critic" only (required there, an error with the others); read only where cut_B is True.
    The other arguments, the result and the errors are those of `gae`. No departure from the paper under "previous";
    the other two rules are there to be compared with it.
    """
    runs = checks.tokens(rewards_BT, mask_BT, values_BT)
    checks.like("cut_B", cut_B, rewards_BT, torch.bool, ndim=1)
    checks.choice("cut_value", cut_value, ("previous", "critic", "zero"))
    if (last_value_B is not None) != (cut_value == "critic"):
        wanted = "V after the cut, [B]," if cut_value == "critic" else "None"
        raise refused("last_value_B", last_value_B, f"{wanted} with cut_value={cut_value!r}")
    if last_value_B is not None:
        last_value_B = checks.last_value(last_value_B, rewards_BT, read_B=cut_B & (runs.stop_B > runs.first_B))
    end_value_B = value_at_cut(values_BT, runs, cut_B, cut_value, last_value_B)
    return _sum_of_deltas(rewards_BT, values_BT, runs, end_value_B, gamma, lam)


def value_at_cut(values_BT: Tensor, runs: Runs, cut_B: Tensor, cut_value: CutValue, last_value_B: Tensor | None) -> Tensor:
    """V(s_l) after the last token, [B]: V(s_{l-1}) at a cut (T-PPO), or another `CutValue`; 0 at an end, as in last_value_B."""
    if cut_value == "previous":
        return torch.where(cut_B, _last(values_BT, runs), 0.0)
    return values_BT.new_zeros(len(values_BT)) if last_value_B is None else last_value_B


def _sum_of_deltas(
    rewards_BT: Tensor, values_BT: Tensor, runs: Runs, end_value_B: Tensor, gamma: float, lam: float | Tensor
) -> Tensor:
    """A_t = delta_t + gamma lam A_{t+1} over each row's run, after whose last token V is `end_value_B`."""
    gamma, lam_B1 = checks.number("gamma", gamma, 0, 1), checks.lam(lam, rewards_BT)
    last_delta_B = _last(rewards_BT, runs) + gamma * end_value_B - _last(values_BT, runs)

    def deltas(rows: slice, columns: slice, out_RT: Tensor) -> None:
        """Writes delta_t = r_t + gamma V(s_{t+1}) - V(s_t) of a few rows, so that it is made and summed in the cache."""
        values_RT = values_BT[rows, columns]
        torch.sub(rewards_BT[rows, columns], values_RT, out=out_RT)  # r_t - V(s_t)
        out_RT[:, :-1].add_(values_RT[:, 1:], alpha=gamma)  # + gamma V(s_{t+1})
        last_R1 = (runs.stop_B[rows, None] - 1 - columns.start).clamp(min=0)
        out_RT.scatter_(1, last_R1, last_delta_B[rows, None])  # where the run ends

    advantages_BT = discounted_sum(deltas, runs, gamma * lam_B1, dtype=rewards_BT.dtype)
    _refuse_non_finite(advantages_BT, runs, rewards_BT=rewards_BT, values_BT=values_BT)
    return advantages_BT


@torch.no_grad()
def monte_carlo_returns(rewards_BT: Tensor, mask_BT: Tensor, *, gamma: float) -> Tensor:
    """Discounted sum of the rewards from each token to the end of its run: the critic's target in T-PPO.

        G_t = r_t + gamma G_{t+1} = sum_k gamma^k r_{t+k}             (arXiv 2506.15050, value update; gamma = 1 there)

    Equals `gae` with lam = 1 and V = 0. Meaningful for ended responses only: nothing is added after the last token.
    Shapes, dtypes, masks and errors are those of `gae`.
    """
    runs = checks.tokens(rewards_BT, mask_BT, None)
    gamma_B1 = rewards_BT.new_full((1, 1), checks.number("gamma", gamma, 0, 1), dtype=torch.float64)
    returns_BT = discounted_sum(rewards_BT, runs, gamma_B1)
    _refuse_non_finite(returns_BT, runs, rewards_BT=rewards_BT)
    return returns_BT


def _last(x_BT: Tensor, runs: Runs) -> Tensor:
    """x at the last token of each row's run, [B]; anything where the run is empty."""
    if x_BT.shape[1] == 0:
        return x_BT.new_zeros(len(x_BT))
    return x_BT.gather(1, (runs.stop_B - 1).clamp(min=0)[:, None])[:, 0]


def _refuse_non_finite(sum_BT: Tensor, runs: Runs, **terms: Tensor) -> None:
    """The sum at a run's first token holds all of the run's terms: it is finite only if they are."""
    if sum_BT.shape[1] and not sum_BT.gather(1, runs.first_B[:, None]).isfinite().all():
        for name, term_BT in terms.items():  # finite terms whose sum overflows are no error of the arguments
            checks.every(name, term_BT, term_BT.isfinite() | ~runs.mask_BT)


@torch.no_grad()
def length_adaptive_lambda(length_B: Tensor, *, alpha: float = 0.05, floor: float = 0.95) -> Tensor:
    """Trace parameter that grows with the response: max(floor, 1 - 1/(alpha L))   (VAPO, arXiv 2504.05118).

    The weights of the trace then sum to about alpha L, so the end of a long response is still seen from its beginning. length_B is
    [B], integer, float32 or float64, in tokens, not negative; length 0 gives the floor. Returns [B], float32 for integers, else the
    same dtype. Raises ValueError for lengths that are negative or not finite, alpha that is not positive and finite, floor outside
    [0, 1]. Departs from VAPO by the floor: the formula alone is negative at L < 1/alpha, and below 0.95, PPO's usual lambda, up to
    L = 20/alpha.
    """
    checks.lengths("length_B", length_B)
    checks.positive("alpha", alpha)
    checks.number("floor", floor, 0.0, 1.0)
    lam_B = (1 - 1 / (alpha * length_B.double())).clamp(min=floor)  # length 0: 1 - inf, clamped
    return lam_B.to(length_B.dtype if length_B.is_floating_point() else torch.float32)


def lambda_of_rows(length_B: Tensor, cut_B: Tensor, window: int, *, lam: float = 0.95, alpha: float | None = 0.05) -> Tensor:
    """lambda of each row's policy advantages, [B].

        max(lam, 1 - 1/(alpha L)),    L = tokens of the response so far, plus half a window where it is cut

    A RUNNING response will be longer than it is. The length-adaptive lambda is VAPO's (arXiv 2504.05118), for the policy alone (the
    value model's is 1: Monte Carlo returns); the half window is read in T-PPO's authors' port [P]. alpha=None: lam for every row.

    length_B is [B], as in `length_adaptive_lambda`; cut_B [B] bool; window in tokens, at least 1. Returns what
    `length_adaptive_lambda` does, float64 for a constant. Raises ValueError that names the argument.
    """
    checks.lengths("length_B", length_B)
    checks.like("cut_B", cut_B, length_B, torch.bool, ndim=1)
    checks.count("window", window, least=1)
    lam = checks.number("lam", lam, 0.0, 1.0)
    if alpha is None:
        return torch.full_like(length_B, lam, dtype=torch.float64)
    return length_adaptive_lambda(length_B + cut_B * (window / 2), alpha=alpha, floor=lam)


@torch.no_grad()
def whiten(x_BT: Tensor, mask_BT: Tensor, *, mean: float | Tensor | None = None, std: float | Tensor | None = None) -> Tensor:
    """(x - mean) / (std + 1e-8) on the mask, exactly 0 outside it.

    Without `mean` and `std` the moments are those of the masked elements (population standard deviation, divided by n, not n - 1;
    summed in float64); give both, as numbers or tensors of one element, for moments over a whole step and all ranks, or neither. An
    empty mask gives zeros. So does a standard deviation that rounding can explain: equal elements carry no signal.

    x_BT is [B, T], float32 or float64, not read outside the mask; mask_BT [B, T] bool, any pattern. Same dtype out, no gradient.
    Raises ValueError for a wrong rank, shape, dtype or device, x not finite on the mask, a mean or std that is not finite, a std
    below 0, and one of the two without the other.
    """
    checks.tensor("x_BT", x_BT, 2, *checks.FLOATS)
    checks.like("mask_BT", mask_BT, x_BT, torch.bool)
    if (mean is None) != (std is None):
        missing, given = ("mean", "std") if mean is None else ("std", "mean")
        raise refused(missing, None, f"both moments or neither, and {given} was given")
    zero = x_BT.new_zeros(())
    x_BT = torch.where(mask_BT, x_BT, zero)
    count = int(mask_BT.count_nonzero())
    total = x_BT.sum(dtype=torch.float64).item() if count else 0.0
    if not math.isfinite(total):
        checks.every("x_BT", x_BT, x_BT.isfinite())
    if mean is not None and std is not None:
        mean, std = (x.item() if isinstance(x, Tensor) and x.numel() == 1 else x for x in (mean, std))
        largest = torch.finfo(x_BT.dtype).max
        mean, std = checks.number("mean", mean, -largest, largest), checks.number("std", std, 0, largest)
    else:
        mean = total / max(count, 1)
        centred_BT = torch.where(mask_BT, x_BT - mean, zero)
        std = math.sqrt(centred_BT.square().sum(dtype=torch.float64).item() / max(count, 1))
    if count == 0 or std <= 8 * torch.finfo(x_BT.dtype).eps * abs(mean):  # equal elements and their mean, each rounded
        return torch.zeros_like(x_BT)
    return torch.where(mask_BT, x_BT.sub_(mean).div_(std + WHITEN_EPS), zero)
