"""advantages.py against hand arithmetic, its O(T^2) definition, a float64 loop, TorchRL, and an enumerated token MDP.

The laws P1 to P7 are those of docs/theory: A = GAE over the whole response, B = EGAE, C = cut-GAE (the critic's own
value at the cut), Z = zero-cut. `l` is the column of the cut, n = l - t.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from sim.lab.instances import Instance, load
from sim.lab.token_mdp import ENDED, Edges, TokenMDP
from tppo_ref.method.advantages import egae, gae, lambda_of_rows, length_adaptive_lambda, monte_carlo_returns, whiten

LAW = settings(max_examples=50, deadline=None)
CUT_RULES = ("previous", "critic", "zero")
F64 = torch.float64
NAN = float("nan")
END = 0  # the end token of the trees


def close(actual: torch.Tensor, expected: torch.Tensor, atol: float = 1e-11) -> None:
    """Float64 laws hold to rounding: an off-by-one in any term is at least ten orders of magnitude larger."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


# ------------------------------------------------------------------------------------------------------- the oracles


def definition(rewards: list[float], values: list[float], end_value: float, gamma: float, lam: float) -> list[float]:
    """O(T^2): A_t = sum_k (gamma lam)^k delta_{t+k}, delta_t = r_t + gamma V(s_{t+1}) - V(s_t), on one run."""
    following = [*values[1:], end_value]
    delta = [r + gamma * after - before for r, after, before in zip(rewards, following, values, strict=False)]
    n = len(delta)
    return [math.fsum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]


def loop(rewards: list[float], values: list[float], end_value: float, gamma: float, lam: float) -> list[float]:
    """The textbook backward recursion A_t = delta_t + gamma lam A_{t+1}, on one run."""
    out, following, advantage = [], end_value, 0.0
    for r, v in zip(reversed(rewards), reversed(values), strict=True):
        advantage = (r + gamma * following - v) + gamma * lam * advantage
        following = v
        out.append(advantage)
    return out[::-1]


def discounted(rewards: list[float], gamma: float) -> list[float]:
    """O(T^2): G_t = sum_k gamma^k r_{t+k}."""
    return [math.fsum(gamma ** (k - t) * rewards[k] for k in range(t, len(rewards))) for t in range(len(rewards))]


@dataclasses.dataclass
class Batch:
    rewards: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor
    cut: torch.Tensor
    last: torch.Tensor
    gamma: float
    lam: torch.Tensor
    runs: list[tuple[int, int]]

    def replace(self, **changes) -> Batch:
        return dataclasses.replace(self, **changes)

    def gae(self, last: torch.Tensor | None = None, **changes) -> torch.Tensor:
        b = self.replace(**changes)
        return gae(b.rewards, b.values, b.mask, gamma=b.gamma, lam=b.lam, last_value_B=last)

    def egae(self, rule: str, **changes) -> torch.Tensor:
        b = self.replace(**changes)
        last = b.last if rule == "critic" else None
        how = {"gamma": b.gamma, "lam": b.lam, "cut_value": rule, "last_value_B": last}
        return egae(b.rewards, b.values, b.mask, b.cut, **how)

    def returns(self, **changes) -> torch.Tensor:
        b = self.replace(**changes)
        return monte_carlo_returns(b.rewards, b.mask, gamma=b.gamma)

    def by_row(self, rule: str, row: Callable = definition) -> torch.Tensor:
        """The oracle `row` on every run; `rule` says what V is just after the run's last token."""
        out = torch.zeros_like(self.rewards)
        for b, (start, stop) in enumerate(self.runs):
            if stop == start:
                continue
            rewards, values = self.rewards[b, start:stop].tolist(), self.values[b, start:stop].tolist()
            is_cut = bool(self.cut[b])
            end_value = {
                "end": 0.0,
                "last": self.last[b].item(),
                "zero": 0.0,
                "previous": values[-1] if is_cut else 0.0,
                "critic": self.last[b].item() if is_cut else 0.0,
            }[rule]
            advantages = row(rewards, values, end_value, self.gamma, self.lam[b].item())
            out[b, start:stop] = torch.tensor(advantages, dtype=F64)
        return out


def make_batch(runs: list[tuple[int, int]], cut: list[bool], width: int, gamma: float, lam: list[float], seed: int):
    """Random float64 rows; outside the runs lies garbage of size 1e6."""
    g = torch.Generator().manual_seed(seed)
    shape = (len(runs), width)
    mask = torch.zeros(shape, dtype=torch.bool)
    for b, (start, stop) in enumerate(runs):
        mask[b, start:stop] = True
    rewards, values = (torch.randn(shape, generator=g, dtype=F64) for _ in range(2))
    last = torch.randn(len(runs), generator=g, dtype=F64)
    rewards, values = (torch.where(mask, x, 1e6 * (1 + x)) for x in (rewards, values))
    cut_B, lam_B = torch.tensor(cut, dtype=torch.bool), torch.tensor(lam, dtype=F64)
    return Batch(rewards, values, mask, cut_B, last, gamma, lam_B, runs)


UNIT = st.sampled_from([0.0, 0.5, 0.95, 1.0]) | st.floats(0.0, 1.0)
RUN_LENGTHS = st.integers(0, 8) | st.sampled_from([31, 32, 33, 63, 64, 65, 97])
ANY_START, FEW_ROWS, ANY_CUT = st.integers(0, 40), st.integers(1, 4), st.booleans()


@st.composite
def batches(draw, rows=FEW_ROWS, lengths=RUN_LENGTHS, starts=ANY_START, cuts=ANY_CUT) -> Batch:
    """Right-padded rows, each with one run of any length that starts anywhere."""
    drawn = draw(st.lists(st.tuples(starts, lengths, cuts, UNIT), min_size=(n := draw(rows)), max_size=n))
    runs = [(start, start + length) for start, length, _, _ in drawn]
    width = max((stop for _, stop in runs), default=0) + draw(st.integers(0, 3))
    cut, lam = [c for _, _, c, _ in drawn], [x for _, _, _, x in drawn]
    return make_batch(runs, cut, width, draw(UNIT), lam, draw(st.integers(0, 2**31)))


def everything(b: Batch) -> dict[str, torch.Tensor]:
    """All results on one batch, keyed by what was asked."""
    results = {"gae": b.gae(), "gae, last value": b.gae(b.last), "returns": b.returns()}
    return results | {f"egae, {rule}": b.egae(rule) for rule in CUT_RULES}


# ------------------------------------------------------------------------------------------------- hand-worked rows

# r = (0, 0, 1), V = (1/2, 1/4, 3/4), gamma = lam = 1/2, so gamma lam = 1/4. Dyadic numbers: no rounding anywhere.
#   delta_0 = 0 + 1/2 * 1/4 - 1/2 = -3/8        delta_1 = 0 + 1/2 * 3/4 - 1/4 = 1/8
# The end decides the last one and, through the recursion, all:
#   V(end) = 0      delta_2 = 1 - 3/4             = 1/4    A_1 = 1/8 + 1/16  = 3/16    A_0 = -3/8 + 3/64   = -21/64
#   V(end) = 2      delta_2 = 1 + 1/2 * 2 - 3/4   = 5/4    A_1 = 1/8 + 5/16  = 7/16    A_0 = -3/8 + 7/64   = -17/64
#   V(end) = V_2    delta_2 = 1 + (1/2 - 1) * 3/4 = 5/8    A_1 = 1/8 + 5/32  = 9/32    A_0 = -3/8 + 9/128  = -39/128
HAND_ENDED = [-21 / 64, 3 / 16, 1 / 4]
HAND_CRITIC = [-17 / 64, 7 / 16, 5 / 4]
HAND_PREVIOUS = [-39 / 128, 9 / 32, 5 / 8]


@pytest.fixture(params=[torch.float32, F64], ids=["float32", "float64"])
def hand(request) -> dict[str, torch.Tensor]:
    """The hand-worked run twice: at column 0, and at column 2 between garbage."""
    make = functools.partial(torch.tensor, dtype=request.param)
    return {
        "rewards_BT": make([[0, 0, 1, NAN, 9], [9, NAN, 0, 0, 1]]),
        "values_BT": make([[0.5, 0.25, 0.75, 9, NAN], [NAN, 9, 0.5, 0.25, 0.75]]),
        "mask_BT": torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]], dtype=torch.bool),
    }


def hand_rows(row: list[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor([[*row, 0, 0], [0, 0, *row]], dtype=like.dtype)


def test_gae_by_hand(hand):
    advantages = gae(**hand, gamma=0.5, lam=0.5)
    torch.testing.assert_close(advantages, hand_rows(HAND_ENDED, advantages), rtol=0, atol=0)


def test_gae_with_a_last_value_by_hand(hand):
    last = torch.full((2,), 2.0, dtype=hand["rewards_BT"].dtype)
    advantages = gae(**hand, gamma=0.5, lam=0.5, last_value_B=last)
    torch.testing.assert_close(advantages, hand_rows(HAND_CRITIC, advantages), rtol=0, atol=0)


@pytest.mark.parametrize(("rule", "row"), [("previous", HAND_PREVIOUS), ("critic", HAND_CRITIC), ("zero", HAND_ENDED)])
def test_egae_by_hand(hand, rule, row):
    last = torch.full((2,), 2.0, dtype=hand["rewards_BT"].dtype) if rule == "critic" else None
    cut = torch.tensor([True, True])
    advantages = egae(**hand, cut_B=cut, gamma=0.5, lam=0.5, cut_value=rule, last_value_B=last)
    torch.testing.assert_close(advantages, hand_rows(row, advantages), rtol=0, atol=0)


def test_egae_uses_the_papers_rule_unless_told_otherwise(hand):
    advantages = egae(**hand, cut_B=torch.tensor([True, False]), gamma=0.5, lam=0.5)
    expected = hand_rows(HAND_PREVIOUS, advantages)
    expected[1] = hand_rows(HAND_ENDED, advantages)[1]
    torch.testing.assert_close(advantages, expected, rtol=0, atol=0)


def test_monte_carlo_returns_by_hand():
    # r = (1, 0, 2, 0), gamma = 1/2:  G_3 = 0, G_2 = 2, G_1 = 0 + 1 = 1, G_0 = 1 + 1/2 = 3/2
    rewards = torch.tensor([[NAN, 1.0, 0.0, 2.0, 0.0, 7.0]], dtype=F64)
    mask = torch.tensor([[False, True, True, True, True, False]])
    expected = torch.tensor([[0, 1.5, 1.0, 2.0, 0.0, 0]], dtype=F64)
    assert torch.equal(monte_carlo_returns(rewards, mask, gamma=0.5), expected)


# -------------------------------------------------------------------------------------------- definition, loop, peers


@LAW
@given(batches())
def test_gae_is_its_definition(b):
    close(b.gae(), b.by_row("end"))
    close(b.gae(b.last), b.by_row("last"))


@LAW
@given(batches(), st.sampled_from(CUT_RULES))
def test_egae_is_its_definition(b, rule):
    close(b.egae(rule), b.by_row(rule))


@LAW
@given(batches())
def test_monte_carlo_returns_are_their_definition(b):
    close(b.returns(), b.by_row("end", lambda r, v, end, gamma, lam: discounted(r, gamma)))


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 63, 64, 65, 1000, 1024, 1025, 5000])
@pytest.mark.parametrize(("gamma", "lam"), [(1, 1), (1, 0.95), (0.99, 1), (0.999, 0.9976), (1, 0), (0, 1)])
def test_every_length_agrees_with_the_loop(length, gamma, lam):
    """Full rows, a row one shorter, one that starts late, and one of a single token at the far end."""
    runs = [(0, length), (0, length - 1), (length // 3, length), (length - 1, length)]
    b = make_batch(runs, [True, False, True, True], length, gamma, [lam] * 4, seed=length)
    atol = 1e-11 if length < 200 else 1e-9
    close(b.gae(), b.by_row("end", loop), atol)
    close(b.gae(b.last), b.by_row("last", loop), atol)
    for rule in CUT_RULES:
        close(b.egae(rule), b.by_row(rule, loop), atol)
    close(b.returns(), b.by_row("end", lambda r, v, end, g, lam_: loop(r, [0.0] * len(r), 0.0, g, 1.0)), atol)


def zero_outside(b: Batch) -> Batch:
    return b.replace(rewards=b.rewards.where(b.mask, 0.0), values=b.values.where(b.mask, 0.0))


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.3])
@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("bootstrapped", [False, True])
def test_gae_agrees_with_torchrl(gamma, lam, bootstrapped):
    """TorchRL wants [B, T, 1]; `done` stops the trace, `terminated` sets the next value to 0."""
    functional = pytest.importorskip("torchrl.objectives.value.functional")
    runs = [(0, 40), (0, 33), (5, 38), (39, 40)]
    b = zero_outside(make_batch(runs, [True] * 4, 40, gamma, [lam] * 4, seed=3))
    last_column = torch.zeros_like(b.mask)
    last_column[range(4), [stop - 1 for _, stop in runs]] = True
    following = torch.where(last_column, b.last[:, None], b.values.roll(-1, dims=1))
    terminated = torch.zeros_like(b.mask) if bootstrapped else last_column
    args = (x[..., None] for x in (b.values, following, b.rewards, last_column, terminated))
    gamma_lam = (torch.tensor(x, dtype=F64) for x in (gamma, lam))  # numbers would be rounded to float32 there
    theirs, _ = functional.generalized_advantage_estimate(*gamma_lam, *args)
    theirs = theirs[..., 0].where(b.mask, 0.0)
    close(b.gae(b.last if bootstrapped else None), theirs)
    close(b.egae("critic" if bootstrapped else "zero"), theirs)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_monte_carlo_returns_agree_with_torchrl(gamma):
    """Theirs drops discounts below 1e-7: gamma^40 stays above."""
    functional = pytest.importorskip("torchrl.objectives.value.functional")
    runs = [(0, 40), (0, 33), (0, 1)]
    b = zero_outside(make_batch(runs, [False] * 3, 40, gamma, [1.0] * 3, seed=4))
    done = torch.zeros_like(b.mask)
    done[range(3), [stop - 1 for _, stop in runs]] = True
    theirs = functional.reward2go(b.rewards[..., None], done[..., None], gamma)[..., 0]
    close(b.returns(), theirs.where(b.mask, 0.0))


# --------------------------------------------------------------------------------------------- reduction identities


@LAW
@given(batches())
def test_lambda_1_is_monte_carlo_returns_minus_values(b):
    b = b.replace(lam=torch.ones_like(b.lam))
    close(b.gae(), (b.returns() - b.values).where(b.mask, 0.0))


@LAW
@given(batches(lengths=st.integers(1, 70)))
def test_lambda_1_with_a_last_value_pays_it_as_a_final_reward(b):
    """sum_k gamma^k r_{t+k} + gamma^n V(end) - V_t: it enters like gamma V(end) paid with the last token."""
    b = b.replace(lam=torch.ones_like(b.lam))
    paid = b.rewards.clone()
    for row, (_, stop) in enumerate(b.runs):
        paid[row, stop - 1] += b.gamma * b.last[row]
    close(b.gae(b.last), (b.returns(rewards=paid) - b.values).where(b.mask, 0.0))


@LAW
@given(batches())
def test_lambda_0_is_the_td_error(b):
    b = b.replace(lam=torch.zeros_like(b.lam))
    following = torch.cat([b.values[:, 1:], torch.zeros_like(b.values[:, :1])], dim=1)
    alive_after = torch.cat([b.mask[:, 1:], torch.zeros_like(b.mask[:, :1])], dim=1)
    following = following.where(alive_after, 0.0)
    close(b.gae(), (b.rewards + b.gamma * following - b.values).where(b.mask, 0.0))


@LAW
@given(batches(lengths=st.just(1)))
def test_a_single_token_is_its_td_error_under_each_rule(b):
    r, v = (x.masked_select(b.mask) for x in (b.rewards, b.values))
    for rule, end in {"previous": v, "critic": b.last, "zero": 0 * v}.items():
        close(b.egae(rule).masked_select(b.mask), r + b.gamma * end.where(b.cut, 0.0) - v)
    close(b.gae(b.last).masked_select(b.mask), r + b.gamma * b.last - v)


@LAW
@given(batches())
def test_a_perfect_critic_of_a_deterministic_response_leaves_no_advantage(b):
    """V = G: every TD error vanishes, whatever lambda, up to the cut."""
    b = b.replace(values=b.returns())
    close(b.gae(), torch.zeros_like(b.rewards))


@LAW
@given(batches(cuts=st.just(False)), st.sampled_from(CUT_RULES))
def test_egae_with_no_row_cut_is_gae(b, rule):
    close(b.egae(rule), b.gae())


@LAW
@given(batches())
def test_rows_that_are_not_cut_agree_with_gae_whatever_their_neighbours_are(b):
    for rule in CUT_RULES:
        close(b.egae(rule)[~b.cut], b.gae()[~b.cut])


@LAW
@given(batches())
def test_zero_cut_is_gae_that_takes_a_cut_for_an_end(b):
    close(b.egae("zero"), b.gae())


@LAW
@given(batches(cuts=st.just(True)))
def test_cut_gae_is_gae_with_the_critics_last_value(b):
    close(b.egae("critic"), b.gae(b.last))


@LAW
@given(batches())
def test_the_previous_rule_is_the_critic_rule_told_the_last_value_again(b):
    last = [b.values[i, stop - 1].item() if stop > start else 0.0 for i, (start, stop) in enumerate(b.runs)]
    close(b.egae("previous"), b.egae("critic", last=torch.tensor(last, dtype=F64)))


# -------------------------------------------------------------------------------------------------- the laws P1, P5, P6


@st.composite
def whole_and_cut(draw) -> tuple[Batch, Batch, list[int]]:
    """Whole responses, and the same rows seen up to a cut at column l: cut where l comes before the response's end."""
    whole = draw(batches(lengths=st.integers(1, 8) | st.sampled_from([31, 32, 33, 65]), starts=st.integers(0, 5)))
    edges = [draw(st.integers(start + 1, stop)) for start, stop in whole.runs]
    columns = torch.arange(whole.mask.shape[1])
    seen = whole.replace(
        mask=whole.mask & (columns < torch.tensor(edges)[:, None]),
        cut=torch.tensor([edge < stop for edge, (_, stop) in zip(edges, whole.runs, strict=True)]),
        last=torch.tensor([whole.values[b, edge if edge < stop else 0].item() for b, (edge, (_, stop)) in
                           enumerate(zip(edges, whole.runs, strict=True))], dtype=F64),
        runs=[(start, edge) for edge, (start, _) in zip(edges, whole.runs, strict=True)],
    )  # fmt: skip
    return whole, seen, edges


def tail_beyond_the_cut(whole: Batch, seen: Batch, edges: list[int], advantages: torch.Tensor) -> torch.Tensor:
    """P1's right-hand side: (gamma lam)^{n-1} gamma (V(s_l) - V(s_{l-1})) + (gamma lam)^n A_l on cut rows, else 0."""
    out = torch.zeros_like(whole.rewards)
    for b, (edge, (start, _)) in enumerate(zip(edges, whole.runs, strict=True)):
        if not seen.cut[b]:
            continue
        gl = whole.gamma * whole.lam[b].item()
        jump = whole.gamma * (whole.values[b, edge] - whole.values[b, edge - 1]).item()
        for t in range(start, edge):
            out[b, t] = gl ** (edge - t - 1) * jump + gl ** (edge - t) * advantages[b, edge].item()
    return out


@LAW
@given(whole_and_cut())
def test_p1_gae_minus_egae_is_the_jump_at_the_cut_and_what_lies_beyond(case):
    whole, seen, edges = case
    difference = (whole.gae() - seen.egae("previous")).where(seen.mask, 0.0)
    close(difference, tail_beyond_the_cut(whole, seen, edges, whole.gae()))


@LAW
@given(whole_and_cut())
def test_p5_cut_gae_minus_egae_is_the_discounted_jump_at_the_cut(case):
    whole, seen, edges = case
    close(
        seen.egae("critic") - seen.egae("previous"),
        tail_beyond_the_cut(whole, seen, edges, torch.zeros_like(whole.rewards)),
    )


@LAW
@given(whole_and_cut())
def test_p6_locality_the_second_window_alone_equals_the_whole_response(case):
    """Two windows meet at l. The second starts fresh and knows nothing of the first."""
    whole, seen, _ = case
    second = whole.mask & ~seen.mask
    alone = whole.gae(mask=second, rewards=whole.rewards.where(second, NAN), values=whole.values.where(second, NAN))
    close(alone, whole.gae().where(second, 0.0))


@LAW
@given(whole_and_cut())
def test_p6_recovery_two_windows_and_p1_give_back_gae_over_the_joined_response(case):
    whole, seen, edges = case
    second = whole.gae(mask=whole.mask & ~seen.mask)
    joined = seen.egae("previous") + tail_beyond_the_cut(whole, seen, edges, second) + second
    close(joined, whole.gae())


# ------------------------------------------------------------------------------------------- laws of the representation


@LAW
@given(batches(), st.sampled_from([NAN, float("inf"), -float("inf"), 1e300, -0.0]))
def test_garbage_outside_the_mask_changes_nothing_bit_for_bit(b, garbage):
    spoilt = b.replace(rewards=b.rewards.where(b.mask, garbage), values=b.values.where(b.mask, garbage))
    clean = everything(b)
    for name, result in everything(spoilt).items():
        assert torch.equal(result, clean[name]), name


@LAW
@given(batches())
def test_last_values_are_not_read_where_the_rule_does_not_need_them(b):
    """`egae` reads them on cut rows alone, `gae` on rows that are not empty."""
    assert torch.equal(b.egae("critic", last=b.last.where(b.cut, NAN)), b.egae("critic"))
    assert torch.equal(b.gae(b.last.where(b.mask.any(1), NAN)), b.gae(b.last))


@LAW
@given(batches())
def test_results_outside_the_mask_are_zero_and_shape_and_dtype_stay(b):
    for name, result in everything(b).items():
        assert result.shape == b.mask.shape, name
        assert result.dtype == F64, name
        assert (result[~b.mask] == 0).all(), name


@LAW
@given(batches(), st.randoms(use_true_random=False))
def test_permuting_the_batch_permutes_the_result(b, random):
    order = list(range(len(b.runs)))
    random.shuffle(order)
    fields = ("rewards", "values", "mask", "cut", "last", "lam")
    shuffled = b.replace(**{name: getattr(b, name)[order] for name in fields})
    clean = everything(b)
    for name, result in everything(shuffled).items():
        torch.testing.assert_close(result, clean[name][order], rtol=0, atol=1e-12, msg=name)


@LAW
@given(batches(), st.integers(1, 70))
def test_extra_padding_changes_nothing(b, extra):
    def pad(x):
        return torch.nn.functional.pad(x, (0, extra), value=0 if x.dtype == torch.bool else NAN)

    padded = b.replace(rewards=pad(b.rewards), values=pad(b.values), mask=pad(b.mask))
    clean = everything(b)
    for name, result in everything(padded).items():
        expected = torch.nn.functional.pad(clean[name], (0, extra))
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-12, msg=name)


@LAW
@given(batches())
def test_a_run_that_starts_anywhere_equals_the_row_shifted_to_column_0(b):
    """Each run alone, moved to the front of a batch of one."""
    clean = everything(b)
    for row, (start, stop) in enumerate(b.runs):
        one = b.replace(**{name: getattr(b, name)[row : row + 1, start:stop] for name in ("rewards", "values", "mask")})
        one = one.replace(cut=b.cut[row : row + 1], last=b.last[row : row + 1], lam=b.lam[row : row + 1])
        for name, result in everything(one).items():
            torch.testing.assert_close(result, clean[name][row : row + 1, start:stop], rtol=0, atol=1e-12, msg=name)


@LAW
@given(batches())
def test_lambda_per_row_equals_row_by_row_with_a_number(b):
    whole = {"gae": b.gae(), "previous": b.egae("previous")}
    for row in range(len(b.runs)):
        one = b.replace(**{name: getattr(b, name)[row : row + 1] for name in ("rewards", "values", "mask", "cut")})
        one = one.replace(lam=b.lam[row].item())
        close(one.gae(), whole["gae"][row : row + 1], atol=1e-12)
        close(one.egae("previous"), whole["previous"][row : row + 1], atol=1e-12)


@LAW
@given(batches(lengths=st.just(0)))
def test_empty_runs_give_zeros_cut_or_not(b):
    spoilt = b.replace(rewards=torch.full_like(b.rewards, NAN), values=torch.full_like(b.values, NAN))
    for name, result in everything(spoilt).items():
        assert torch.equal(result, torch.zeros_like(b.rewards)), name


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (3, 0)])
def test_no_rows_and_no_columns(shape):
    b = make_batch([(0, 0)] * shape[0], [True] * shape[0], shape[1], 0.9, [0.5] * shape[0], seed=0)
    for name, result in everything(b).items():
        assert result.shape == shape, name


@pytest.mark.parametrize("rule", CUT_RULES)
def test_corner_rows_the_longest_in_the_batch_may_be_cut_or_ended(rule):
    """Whether a row is cut is said by cut_B, never by where its run meets the tensor's edge (areal#1637)."""
    runs = [(0, 9), (0, 9), (0, 6), (0, 6), (0, 1), (8, 9), (4, 4)]
    b = make_batch(runs, [True, False, True, False, True, False, True], 9, 0.7, [0.6] * 7, seed=8)
    close(b.egae(rule), b.by_row(rule))
    differs = (b.egae(rule) - b.gae()).abs().amax(1) > 1e-3
    cut_rows = [rule != "zero" and bool(c) and stop > start for c, (start, stop) in zip(b.cut, runs, strict=True)]
    assert differs.tolist() == cut_rows


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_dtype_of_rewards_is_kept_whatever_lambdas_is(dtype):
    b = make_batch([(0, 5), (2, 5)], [True, False], 5, 0.9, [0.5, 0.75], seed=1)
    b32 = b.replace(rewards=b.rewards.to(dtype), values=b.values.to(dtype), last=b.last.to(dtype))
    for lam in (b.lam.float(), b.lam.double(), 0.5):
        for name, result in everything(b32.replace(lam=lam)).items():
            assert result.dtype == dtype, name


@pytest.mark.parametrize("length", [64, 1000, 5000])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.9976), (0.99, 0.95)])
def test_float32_is_no_farther_from_float64_than_the_float32_loop_is(length, gamma, lam):
    b = make_batch([(0, length)] * 4, [True] * 4, length, gamma, [lam] * 4, seed=length)
    single = b.replace(**{name: getattr(b, name).float() for name in ("rewards", "values", "last")})
    b = b.replace(**{name: getattr(single, name).double() for name in ("rewards", "values", "last")})
    exact, advantage, following = b.gae(b.last), torch.zeros(4), single.last
    looped = torch.empty_like(single.rewards)
    for t in reversed(range(length)):
        delta = single.rewards[:, t] + gamma * following - single.values[:, t]
        advantage = delta + gamma * lam * advantage
        looped[:, t], following = advantage, single.values[:, t]
    allowed = max((looped - exact).abs().max().item(), 2.0**-24 * exact.abs().max().item())
    assert (single.gae(single.last) - exact).abs().max().item() <= 2 * allowed
    assert (single.egae("critic") - exact).abs().max().item() <= 2 * allowed


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_autocast_does_not_touch_the_recursion(dtype):
    b = make_batch([(0, 300), (7, 290)], [True, False], 300, 0.99, [0.95, 1.0], seed=2)
    b = b.replace(**{name: getattr(b, name).to(dtype) for name in ("rewards", "values", "last", "lam")})
    clean = everything(b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = everything(b)
    for name, result in mixed.items():
        assert result.dtype == dtype, name
        assert torch.equal(result, clean[name]), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_on_a_gpu_the_result_is_the_cpus_and_tf32_does_not_touch_it(dtype, monkeypatch):
    b = make_batch([(0, 5000), (7, 4000)], [True, False], 5000, 1.0, [0.9976, 1.0], seed=2)
    fields = ("rewards", "values", "last", "lam", "mask", "cut")
    b = b.replace(**{name: getattr(b, name).to(dtype) for name in ("rewards", "values", "last", "lam")})
    on_gpu, exact = b.replace(**{name: getattr(b, name).cuda() for name in fields}), everything(b)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    for name, result in everything(on_gpu).items():
        tolerance = (2e-6 if dtype == torch.float32 else 1e-13) * exact[name].abs().max().item()
        assert result.is_cuda, name
        torch.testing.assert_close(result.cpu(), exact[name], rtol=0, atol=tolerance, msg=name)


def test_no_gradient_flows():
    b = make_batch([(0, 5), (2, 5)], [True, False], 5, 0.9, [0.5, 0.75], seed=1)
    for tensor in (b.rewards, b.values, b.last, b.lam):
        tensor.requires_grad_(True)
    for name, result in everything(b).items():
        assert not result.requires_grad, name
    assert not whiten(b.rewards, b.mask).requires_grad


def test_inputs_are_left_as_they_were():
    b = make_batch([(0, 70), (2, 65)], [True, False], 70, 0.9, [0.5, 0.75], seed=1)
    fields = ("rewards", "values", "mask", "cut", "last", "lam")
    before = {name: getattr(b, name).clone() for name in fields}
    everything(b)
    whiten(b.rewards, b.mask)
    for name in fields:
        assert torch.equal(getattr(b, name), before[name]), name


def test_views_with_strides_give_what_copies_give():
    b = make_batch([(0, 70), (2, 65), (0, 33)], [True, False, True], 70, 0.9, [0.5, 0.75, 1.0], seed=1)
    fields = ("rewards", "values", "mask")
    strided = b.replace(**{name: getattr(b, name).t().contiguous().t() for name in fields})
    expanded = b.replace(lam=torch.tensor(0.75, dtype=F64).expand(3))
    copied = b.replace(lam=torch.full((3,), 0.75, dtype=F64))
    clean = everything(b)
    for name, result in everything(strided).items():
        close(result, clean[name], atol=1e-12)
    for name, result in everything(expanded).items():
        close(result, everything(copied)[name], atol=1e-12)


# ------------------------------------------------------------------------------------------------------------- errors


def refusal_of(argument: str) -> str:
    """The one dialect of messages: `name: got VALUE; expected ...`, a place in a tensor as `name[b, t]`."""
    return rf"^{argument}(\[[\d, ]+\])?: got .+; expected .+"


def good(function: Callable) -> dict:
    """Arguments that work, for two rows of four columns."""
    arguments = {
        "rewards_BT": torch.ones(2, 4),
        "values_BT": torch.ones(2, 4),
        "mask_BT": torch.tensor([[True, True, True, False], [False, True, True, True]]),
        "gamma": 0.9,
    }
    if function is monte_carlo_returns:
        del arguments["values_BT"]
        return arguments
    arguments |= {"lam": 0.5}
    return arguments | {"cut_B": torch.tensor([True, False])} if function is egae else arguments


HOLE = torch.tensor([[True, False, True, False], [False, True, True, True]])


def spoilt(argument: str, index: tuple[int, int], value: float) -> torch.Tensor:
    tensor = torch.ones(2, 4)
    tensor[index] = value
    return tensor


EVERYWHERE = [
    ("rewards_BT", torch.ones(4), "rank 1"),
    ("rewards_BT", torch.ones(2, 4, 1), "rank 3"),
    ("rewards_BT", torch.ones(2, 4, dtype=torch.bfloat16), "bfloat16"),
    ("rewards_BT", torch.ones(2, 4, dtype=torch.float16), "float16"),
    ("rewards_BT", torch.ones(2, 4, dtype=torch.int64), "integers"),
    ("rewards_BT", spoilt("rewards_BT", (0, 1), NAN), "NaN inside the mask"),
    ("rewards_BT", spoilt("rewards_BT", (1, 3), float("inf")), "infinite inside the mask"),
    ("mask_BT", torch.ones(2, 4), "a float mask"),
    ("mask_BT", torch.ones(2, 4, dtype=torch.int64), "an integer mask"),
    ("mask_BT", torch.ones(4, dtype=torch.bool), "rank 1"),
    ("mask_BT", torch.ones(2, 5, dtype=torch.bool), "wider"),
    ("mask_BT", HOLE, "a hole in a run"),
    ("gamma", -0.1, "below 0"),
    ("gamma", 1.1, "above 1"),
    ("gamma", NAN, "not a number"),
]
WITH_VALUES = [
    ("values_BT", torch.ones(4), "rank 1"),
    ("values_BT", torch.ones(2, 5), "one more column, for the last value"),
    ("values_BT", torch.ones(1, 4), "one row, to be broadcast"),
    ("values_BT", torch.ones(2, 4, dtype=torch.bfloat16), "bfloat16"),
    ("values_BT", torch.ones(2, 4, dtype=torch.int32), "integers"),
    ("values_BT", torch.ones(2, 4, dtype=F64), "another dtype than the rewards"),
    ("values_BT", spoilt("values_BT", (0, 0), NAN), "NaN inside the mask"),
    ("values_BT", spoilt("values_BT", (1, 3), -float("inf")), "infinite inside the mask"),
    ("lam", 1.5, "above 1"),
    ("lam", -0.5, "below 0"),
    ("lam", NAN, "not a number"),
    ("lam", torch.tensor([0.5]), "[1] for two rows"),
    ("lam", torch.tensor([0.5, 0.5, 0.5]), "[3] for two rows"),
    ("lam", torch.tensor([[0.5], [0.5]]), "rank 2"),
    ("lam", torch.tensor([0.5, 1.5]), "one row above 1"),
    ("lam", torch.tensor([0.5, NAN]), "one row not a number"),
    ("lam", torch.tensor([1, 1]), "integers"),
    ("last_value_B", torch.ones(1), "[1] for two rows"),
    ("last_value_B", torch.ones(2, 1), "rank 2"),
    ("last_value_B", torch.ones(2, dtype=torch.bfloat16), "bfloat16"),
    ("last_value_B", torch.ones(2, dtype=torch.int64), "integers"),
    ("last_value_B", torch.tensor([NAN, 0.0]), "NaN where it is read"),
]
WITH_A_CUT = [
    ("cut_B", torch.tensor([1, 0]), "integers"),
    ("cut_B", torch.tensor([1.0, 0.0]), "floats"),
    ("cut_B", torch.tensor([True]), "[1] for two rows"),
    ("cut_B", torch.tensor([[True], [False]]), "rank 2"),
    ("cut_value", "next", "an unknown rule"),
    ("cut_value", None, "no rule"),
]
BAD_ARGUMENTS = [
    pytest.param(function, argument, value, id=f"{function.__name__}: {argument}, {what}")
    for function, table in [
        (gae, EVERYWHERE + WITH_VALUES),
        (egae, EVERYWHERE + WITH_VALUES + WITH_A_CUT),
        (monte_carlo_returns, EVERYWHERE),
    ]
    for argument, value, what in table
]


@pytest.mark.parametrize("function", [gae, egae, monte_carlo_returns])
def test_the_good_arguments_are_good(function):
    """Without this the error tests below could pass for another reason."""
    assert function(**good(function)).shape == (2, 4)


@pytest.mark.parametrize(("function", "argument", "value"), BAD_ARGUMENTS)
def test_a_bad_argument_is_named(function, argument, value):
    arguments = good(function) | {argument: value}
    if function is egae and argument == "last_value_B":
        arguments["cut_value"] = "critic"
    with pytest.raises(ValueError, match=refusal_of(argument)):
        function(**arguments)


@pytest.mark.parametrize("shape", [(2, 5), (3, 4), (1, 4)], ids=["wider", "more rows", "one row, to be broadcast"])
@pytest.mark.parametrize("function", [gae, egae, monte_carlo_returns])
def test_rewards_of_another_shape_than_the_rest_are_an_error_that_names_one_of_them(function, shape):
    with pytest.raises(ValueError, match=refusal_of("(rewards|values|mask)_BT")):
        function(**good(function) | {"rewards_BT": torch.ones(shape)})


@pytest.mark.parametrize("rule", ["previous", "zero"])
def test_a_last_value_that_the_rule_would_ignore_is_an_error(rule):
    with pytest.raises(ValueError, match=refusal_of("last_value_B")):
        egae(**good(egae), cut_value=rule, last_value_B=torch.ones(2))


def test_the_critic_rule_without_a_last_value_is_an_error():
    with pytest.raises(ValueError, match=refusal_of("last_value_B")):
        egae(**good(egae), cut_value="critic")


def test_one_lambda_for_one_row_is_fine():
    b = make_batch([(0, 4)], [True], 4, 0.9, [0.5], seed=5)
    close(b.egae("previous"), b.egae("previous", lam=0.5), atol=1e-15)


# --------------------------------------------------------------------------------------------- length-adaptive lambda


@pytest.mark.parametrize(
    ("length", "lam"),
    [
        (0, 0.95),  # 1 - 1/0 has no value: the floor
        (1, 0.95),  # 1 - 1/0.05 = -19
        (100, 0.95),  # 1 - 1/5 = 0.8
        (400, 0.95),  # 1 - 1/20 = 0.95: the adaptive branch begins to bind
        (800, 0.975),  # 1 - 1/40
        (8192, 0.99755859375),  # 1 - 1/409.6
        (24576, 1 - 1 / 1228.8),
    ],
)
def test_length_adaptive_lambda_by_hand(length, lam):
    assert length_adaptive_lambda(torch.tensor([length]))[0].item() == pytest.approx(lam, abs=6e-8)
    assert length_adaptive_lambda(torch.tensor([length], dtype=F64))[0].item() == pytest.approx(lam, abs=1e-15)


def test_length_adaptive_lambda_binds_just_above_400_tokens():
    below, at, above = length_adaptive_lambda(torch.tensor([399.0, 400.0, 401.0], dtype=F64)).tolist()
    assert below == 0.95
    assert at == pytest.approx(0.95, abs=1e-15)
    assert above == pytest.approx(1 - 1 / 20.05, abs=1e-15)
    assert above - below > 1e-4


@LAW
@given(st.lists(st.integers(0, 100_000), max_size=6), st.floats(0.001, 1.0), st.floats(0.0, 1.0))
@example([0], 0.05, 0.0)
def test_length_adaptive_lambda_is_its_formula_and_a_valid_lambda(lengths, alpha, floor):
    lam = length_adaptive_lambda(torch.tensor(lengths, dtype=torch.int64), alpha=alpha, floor=floor)
    expected = [max(floor, 1 - 1 / (alpha * n)) if n else floor for n in lengths]
    assert lam.shape == (len(lengths),)
    assert lam.is_floating_point()
    assert lam.tolist() == pytest.approx(expected, abs=2e-7)
    assert ((lam >= 0) & (lam <= 1)).all()


def test_length_adaptive_lambda_is_accepted_by_egae():
    b = make_batch([(0, 5), (1, 3)], [True, False], 5, 1.0, [0.95, 0.95], seed=6)
    lam = length_adaptive_lambda(torch.tensor([5, 400]))
    close(b.egae("previous", lam=lam), b.egae("previous"), atol=1e-6)


def test_lambda_of_rows_by_hand():
    """A window of 400 adds 200 tokens to a row that is cut: 1 - 1/(0.05 * 800) = 0.975 and 1 - 1/(0.05 * 600) = 29/30."""
    length, cut = torch.tensor([600.0, 600.0, 100.0, 100.0], dtype=F64), torch.tensor([True, False, True, False])
    assert lambda_of_rows(length, cut, 400).tolist() == pytest.approx([0.975, 29 / 30, 0.95, 0.95], abs=1e-12)
    assert lambda_of_rows(length, cut, 400, lam=0.0, alpha=0.05)[2:].tolist() == pytest.approx([1 - 1 / 15, 0.8], abs=1e-12)


@pytest.mark.parametrize("lam", [1, 0, 0.3])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, F64])
def test_without_an_alpha_every_row_has_the_number_itself(lam, dtype):
    """Whole numbers too, as `{"advantage.lam": 1}` gives them; egae cannot tell the tensor from the number."""
    b = make_batch([(0, 40), (3, 30)], [True, False], 41, 0.9, [lam] * 2, seed=7)
    lam_B = lambda_of_rows(torch.tensor([40, 27]).to(dtype), b.cut, 6, lam=lam, alpha=None)
    assert lam_B.tolist() == [lam, lam]
    close(b.egae("previous", lam=lam_B), b.egae("previous", lam=lam), atol=1e-12)


@LAW
@given(st.lists(st.tuples(st.integers(0, 100_000), st.booleans()), max_size=6), st.integers(1, 9000), UNIT, st.floats(0.001, 1.0))
def test_lambda_of_rows_is_the_length_adaptive_one_with_half_a_window_on_cut_rows(rows, window, lam, alpha):
    length, cut = [n for n, _ in rows], torch.tensor([c for _, c in rows], dtype=torch.bool)
    actual = lambda_of_rows(torch.tensor(length, dtype=F64), cut, window, lam=lam, alpha=alpha)
    expected = [n + window / 2 if c else n for n, c in rows]
    assert actual.tolist() == pytest.approx([max(lam, 1 - 1 / (alpha * n)) if n else lam for n in expected], abs=1e-12)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("length_B", torch.tensor([-1, 2])), ("length_B", torch.tensor([[1, 2]])), ("length_B", torch.tensor([True, False])),
     ("length_B", torch.tensor([1.0, NAN])), ("cut_B", torch.tensor([1, 0])), ("cut_B", torch.tensor([True])), ("window", 0),
     ("window", 2.5), ("lam", 1.5), ("lam", NAN), ("lam", True), ("alpha", 0.0), ("alpha", -1), ("alpha", float("inf"))],
)  # fmt: skip
def test_lambda_of_rows_names_a_bad_argument(argument, value):
    arguments = {"length_B": torch.tensor([4, 9]), "cut_B": torch.tensor([True, False]), "window": 4, "lam": 0.5, "alpha": 0.1}
    assert lambda_of_rows(**arguments).shape == (2,)
    with pytest.raises(ValueError, match=refusal_of(argument)):
        lambda_of_rows(**arguments | {argument: value})


# -------------------------------------------------------------------------------------------------------------- whiten


def test_whiten_by_hand():
    # x = (1, 3) inside: mean 2, (population) standard deviation 1, of which 1e-8 more divides
    x, mask = torch.tensor([[1.0, NAN], [77.0, 3.0]], dtype=F64), torch.tensor([[True, False], [False, True]])
    close(whiten(x, mask), torch.tensor([[-1.0, 0.0], [0.0, 1.0]], dtype=F64) / (1 + 1e-8), atol=1e-14)


def test_whiten_with_given_moments_by_hand():
    x, mask = torch.tensor([[1.0, NAN], [77.0, 3.0]], dtype=F64), torch.tensor([[True, False], [False, True]])
    expected = torch.tensor([[-9.0, 0.0], [0.0, -7.0]], dtype=F64) / (4 + 1e-8)  # 1 - 10, 3 - 10
    close(whiten(x, mask, mean=10.0, std=4.0), expected, atol=1e-14)
    as_tensors = {"mean": torch.tensor(10.0, dtype=F64), "std": torch.tensor(4.0, dtype=F64)}
    close(whiten(x, mask, **as_tensors), expected, atol=1e-14)


@pytest.mark.parametrize(("given_moment", "missing"), [("mean", "std"), ("std", "mean")])
def test_one_moment_without_the_other_is_named(given_moment, missing):
    x = torch.ones(1, 2, dtype=F64)
    with pytest.raises(ValueError, match=rf"^{missing}: got None; expected both moments or neither, and {given_moment} was given"):
        whiten(x, x.bool(), **{given_moment: 1.0})


@LAW
@given(batches(), st.floats(-100, 100), st.floats(0.1, 100))
def test_whitened_tokens_have_mean_0_and_standard_deviation_1(b, shift, scale):
    assume(b.mask.sum() >= 2)
    assume(b.rewards[b.mask].std() > 0.1)
    whitened = whiten(b.rewards * scale + shift, b.mask)
    inside = whitened[b.mask]
    assert whitened.dtype == F64
    assert (whitened[~b.mask] == 0).all()
    assert inside.mean().item() == pytest.approx(0, abs=1e-6)
    # Neither shift nor scale matters, but for the 1e-8 beside a standard deviation of 0.01 or more.
    assert inside.pow(2).mean().sqrt().item() == pytest.approx(1, abs=1.01e-6)
    close(whitened, whiten(b.rewards, b.mask), atol=1e-5)


@LAW
@given(batches(), st.sampled_from([NAN, float("inf"), 1e300]))
def test_whiten_reads_nothing_outside_the_mask(b, garbage):
    assert torch.equal(whiten(b.rewards.where(b.mask, garbage), b.mask), whiten(b.rewards, b.mask))


@LAW
@given(batches(rows=st.just(4)))
def test_whitening_in_parts_with_the_moments_of_the_whole_is_whitening_the_whole(b):
    """What ranks and micro-batches need: the moments come from outside."""
    assume(b.mask.sum() >= 2)
    inside = b.rewards[b.mask]
    moments = {"mean": inside.mean().item(), "std": inside.std(correction=0).item()}
    parts = [whiten(b.rewards[rows], b.mask[rows], **moments) for rows in (slice(0, 1), slice(1, 4))]
    close(torch.cat(parts), whiten(b.rewards, b.mask), atol=1e-12 / max(moments["std"], 1e-3))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -1 / 3, 1e4 / 3])
@pytest.mark.parametrize("count", [1, 3, 7, 1000])
def test_whitening_a_constant_gives_zeros_not_amplified_rounding(dtype, value, count):
    x = torch.full((2, count), value, dtype=dtype)
    mask = torch.tensor([[True], [False]]).expand(2, count)
    assert torch.equal(whiten(x, mask), torch.zeros_like(x))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("value", [1.0, 0.1, 0.9, -1 / 3, 1e4 / 3])
@pytest.mark.parametrize("count", [3, 7, 1000, 100_003])
def test_whitening_a_constant_with_the_moments_of_a_step_gives_zeros_too(dtype, value, count):
    """As the loop makes them over all ranks: in float64, the variance in a second pass."""
    x = torch.full((1, count), value, dtype=dtype)
    mean = x.double().sum().item() / count
    std = math.sqrt((x.double() - mean).square().sum().item() / count)
    whitened = whiten(x, torch.ones_like(x, dtype=torch.bool), mean=mean, std=std)
    assert torch.equal(whitened, torch.zeros_like(x))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("moments", ["given", "its own"])
def test_a_small_spread_that_is_no_rounding_is_still_whitened(dtype, moments):
    """One part in a hundred thousand: far above rounding, and as good a signal as any."""
    x = torch.tensor([[1 - 1e-5, 1 + 1e-5]], dtype=dtype)
    given = {"mean": x.double().mean().item(), "std": x.double().std(correction=0).item()} if moments == "given" else {}
    whitened = whiten(x, torch.ones(1, 2, dtype=torch.bool), **given)
    close(whitened.double(), torch.tensor([[-1.0, 1.0]], dtype=F64), atol=0.01)


def test_whitening_nothing_gives_zeros():
    assert torch.equal(whiten(torch.full((2, 3), NAN), torch.zeros(2, 3, dtype=torch.bool)), torch.zeros(2, 3))
    assert whiten(torch.ones(0, 3), torch.ones(0, 3, dtype=torch.bool)).shape == (0, 3)


@pytest.mark.parametrize(
    ("argument", "x", "mask"),
    [
        ("x_BT", torch.ones(4), torch.ones(4, dtype=torch.bool)),
        ("x_BT", torch.ones(2, 4, dtype=torch.bfloat16), torch.ones(2, 4, dtype=torch.bool)),
        ("x_BT", torch.ones(2, 4, dtype=torch.int64), torch.ones(2, 4, dtype=torch.bool)),
        ("x_BT", torch.full((2, 4), NAN), torch.ones(2, 4, dtype=torch.bool)),
        ("mask_BT", torch.ones(2, 4), torch.ones(2, 4)),
        ("mask_BT", torch.ones(2, 4), torch.ones(2, 5, dtype=torch.bool)),
    ],
    ids=["rank 1", "bfloat16", "integers", "NaN inside the mask", "float mask", "mask wider"],
)
def test_whiten_names_a_bad_argument(argument, x, mask):
    with pytest.raises(ValueError, match=refusal_of(argument)):
        whiten(x, mask)


# ------------------------------------------------------------------------- in expectation, on enumerated token MDPs


def tree(seed: int, *, max_tokens: int = 5, rewards_at: str = "every token", gamma: float = 1.0) -> Instance:
    """Three tokens of which END ends, every text a state of its own, policy and rewards drawn from (seed, text, token)."""

    def draw(what: str, text: tuple[int, ...], token: int, low: float, high: float) -> float:
        return random.Random(f"{what} {seed} {text} {token}").uniform(low, high)

    texts = [text for t in range(max_tokens) for text in itertools.product((1, 2), repeat=t)]
    place, rows, weights = {text: s for s, text in enumerate(texts)}, [], []
    for text, token in itertools.product(texts, range(3)):
        last = token == END or len(text) == max_tokens - 1
        reward = draw("reward", text, token, -1, 1) if last or rewards_at == "every token" else 0.0
        next_ = ENDED if token == END else place.get((*text, token), 0)  # at the cap any state will do
        rows.append((place[text], token, 1.0, reward, next_))
        weights.append(draw("policy", text, token, 0.2, 1.0))
    edges = Edges(*map(np.array, zip(*rows, strict=True)))
    mdp = TokenMDP(num_states=len(texts), num_tokens=3, edges=edges, max_tokens=max_tokens, gamma=gamma)
    weight_SA = np.array(weights).reshape(-1, 3)
    return Instance(mdp, mdp.by_node(weight_SA / weight_SA.sum(1, keepdims=True)), "")


MDPS = [
    *(
        pytest.param(tree(seed, rewards_at=where, gamma=gamma), lam, id=f"seed {seed}, {where}, gamma {gamma}, lam {lam}")
        for seed, where, gamma, lam in [
            (0, "every token", 0.9, 0.7),
            (1, "every token", 1.0, 1.0),
            (2, "the end", 1.0, 0.95),
            (3, "the end", 0.8, 1.0),
            (4, "every token", 0.7, 0.0),
        ]
    ),
    # a graph: nodes with several pasts, tokens with several outcomes of which some may end
    pytest.param(
        load("random", seed=5, num_states=3, num_tokens=2, outcomes=2, max_tokens=4, p_end=0.2, gamma=0.9), 0.8, id="graph"
    ),
]
on_token_mdps = pytest.mark.parametrize(("instance", "lam"), MDPS)


class Enumeration:
    """All responses of an MDP as one batch, and conditional expectations over it. `critic` adds an error to V [N]."""

    def __init__(self, instance: Instance, lam: float, *, critic: Callable[[np.ndarray], np.ndarray] = lambda value_N: value_N):
        self.mdp, self.policy_NA, _ = instance
        self.solution = self.mdp.solve(self.policy_NA)
        self.lam, self.gamma = lam, self.mdp.gamma
        self.critic_N = critic(self.solution.value_N)
        rows = self.mdp.trajectories(self.policy_NA)
        assert rows.mask_BT.shape[1] == self.mdp.max_tokens
        self.node_BT, self.token_BT, self.rewards = rows.node_BT, rows.token_BT, torch.from_numpy(rows.reward_BT)
        self.mask, self.weights = torch.from_numpy(rows.mask_BT), torch.from_numpy(rows.prob_B)
        self.length = self.mask.sum(1)
        assert self.weights.sum().item() == pytest.approx(1, abs=1e-14)

    def before(self, column: int, x_N: np.ndarray) -> torch.Tensor:
        """x of the node before token `column`, on every response; 0 at and after the end."""
        if column == self.mdp.max_tokens:
            return torch.zeros_like(self.weights)
        x = torch.from_numpy(np.asarray(x_N)[self.node_BT[:, column]])
        return torch.where(self.length > column, x, 0.0)

    def batch(self, l: int) -> Batch:
        """What is known at a cut after l tokens; at l = max_tokens nothing is cut."""
        known = self.mask & (torch.arange(self.mdp.max_tokens) < l)
        values = torch.stack([self.before(t, self.critic_N) for t in range(self.mdp.max_tokens)], dim=1)
        cut = self.length > l
        return Batch(
            rewards=torch.where(known, self.rewards, NAN),
            values=torch.where(known, values, NAN),
            mask=known,
            cut=cut,
            last=torch.where(cut, self.before(l, self.critic_N), NAN),
            gamma=self.gamma,
            lam=torch.full_like(self.weights, self.lam),
            runs=[(0, n) for n in known.sum(1).tolist()],
        )

    def whole(self) -> torch.Tensor:
        return self.batch(self.mdp.max_tokens).gae()

    def given(self, node: int, token: int, x: torch.Tensor) -> float:
        """E[x | token is chosen at node]. x may depend on what comes before the node; then it is averaged over."""
        t = self.depth(node)
        chosen = torch.from_numpy((self.node_BT[:, t] == node) & (self.token_BT[:, t] == token))
        weights = self.weights * chosen
        return (torch.dot(weights, x) / weights.sum()).item()

    def depth(self, node: int) -> int:
        return int(self.mdp.depth_N[node])

    def pairs(self, l: int) -> list[tuple[int, int]]:
        """Every (node, token) at t < l."""
        return [(n, a) for n, a in np.argwhere(self.mdp.legal_NA).tolist() if self.depth(n) < l]

    def advantage(self, node: int, token: int) -> float:
        return self.solution.advantage_NA[node, token].item()

    def over_edges(self, x_E: np.ndarray) -> np.ndarray:
        """E[x of the next edge | node], [N]."""
        taken_E = self.policy_NA[self.mdp.node_E, self.mdp.token_E] * self.mdp.prob_E
        return np.bincount(self.mdp.node_E, taken_E * x_E, minlength=self.mdp.num_nodes)


def exact(value_N: np.ndarray) -> np.ndarray:
    return value_N


def wrong(value_N: np.ndarray) -> np.ndarray:
    """A critic that is off by up to 1 everywhere."""
    return value_N + np.random.default_rng(1000).uniform(-1, 1, len(value_N))


def test_the_mdp_is_what_it_says():
    mdp, policy_NA, _ = tree(0, max_tokens=2, gamma=0.5)
    rows = mdp.trajectories(policy_NA)
    responses = [tuple(token_T[mask_T].tolist()) for token_T, mask_T in zip(rows.token_BT, rows.mask_BT, strict=True)]
    assert sorted(responses) == [(0,), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]

    def reward(text, token):
        return random.Random(f"reward 0 {text} {token}").uniform(-1, 1)

    p, *q = policy_NA.tolist()
    later = {a: sum(q[a - 1][b] * reward((a,), b) for b in range(3)) for a in (1, 2)}
    by_hand = p[0] * reward((), 0) + sum(p[a] * (reward((), a) + 0.5 * later[a]) for a in (1, 2))
    assert mdp.solve(policy_NA).mean_return == pytest.approx(by_hand, abs=1e-15)
    at_the_end = tree(0, max_tokens=2, rewards_at="the end").mdp
    assert ((at_the_end.reward_E == 0) == (at_the_end.next_E != ENDED)).all()


@on_token_mdps
def test_gae_with_the_exact_critic_is_unbiased(instance, lam):
    e = Enumeration(instance, lam)
    advantages = e.whole()
    for node, token in e.pairs(e.mdp.max_tokens):
        estimate = e.given(node, token, advantages[:, e.depth(node)])
        assert estimate == pytest.approx(e.advantage(node, token), abs=1e-12)


@on_token_mdps
def test_p2_cut_gae_with_the_exact_critic_is_unbiased_for_every_cut(instance, lam):
    e = Enumeration(instance, lam)
    for l in range(1, e.mdp.max_tokens + 1):
        advantages = e.batch(l).egae("critic")
        for node, token in e.pairs(l):
            estimate = e.given(node, token, advantages[:, e.depth(node)])
            assert estimate == pytest.approx(e.advantage(node, token), abs=1e-12), (l, node, token)


@on_token_mdps
def test_p2_the_bias_of_egae_is_the_surprise_of_ending_at_the_cut(instance, lam):
    """E[A - B | s_t, a_t] = (gamma lam)^{n-1} E[(1-gamma) V + p_end (gamma V - R_end) - E[r 1(T>l)]], all at s_{l-1}."""
    e = Enumeration(instance, lam)
    gamma, whole, largest = e.gamma, e.whole(), 0.0
    ends_E = e.mdp.next_E == ENDED
    p_end_N = e.over_edges(ends_E)
    r_end_N = e.over_edges(ends_E * e.mdp.reward_E) / np.where(p_end_N > 0, p_end_N, 1.0)
    v_N, r_live_N = e.solution.value_N, e.over_edges(~ends_E * e.mdp.reward_E)
    bracket_N = (1 - gamma) * v_N + p_end_N * (gamma * v_N - r_end_N) - r_live_N
    for l in range(2, e.mdp.max_tokens + 1):
        difference, bracket = whole - e.batch(l).egae("previous"), e.before(l - 1, bracket_N)
        for node, token in e.pairs(l - 1):
            t = e.depth(node)
            bias = e.given(node, token, difference[:, t])
            expected = (gamma * lam) ** (l - t - 1) * e.given(node, token, bracket)
            assert bias == pytest.approx(expected, abs=1e-12), (l, node, token)
            largest = max(largest, abs(bias))
    assert lam == 0 or largest > 1e-2, "an MDP on which EGAE has no bias tests nothing"


@on_token_mdps
def test_p3_what_cut_gae_expects_under_any_critic(instance, lam):
    e = Enumeration(instance, lam, critic=wrong)
    gamma, error_N = e.gamma, e.critic_N - e.solution.value_N
    error_at = [e.before(column, error_N) for column in range(e.mdp.max_tokens + 1)]
    for l in range(1, e.mdp.max_tokens + 1):
        advantages = e.batch(l).egae("critic")
        for node, token in e.pairs(l):
            t = e.depth(node)
            n = l - t
            expected = e.advantage(node, token) - error_N[node]
            for k in range(1, n):
                expected += gamma**k * lam ** (k - 1) * (1 - lam) * e.given(node, token, error_at[t + k])
            expected += gamma**n * lam ** (n - 1) * e.given(node, token, error_at[l])
            assert e.given(node, token, advantages[:, t]) == pytest.approx(expected, abs=1e-12), (l, node, token)


def test_p3_an_untrained_critic_and_a_final_reward_leave_a_cut_response_without_any_signal():
    e = Enumeration(tree(5, rewards_at="the end"), 0.95, critic=np.zeros_like)
    batch = e.batch(3)
    for rule in CUT_RULES:
        assert (batch.egae(rule)[batch.cut] == 0).all()
        assert (batch.egae(rule)[~batch.cut] != 0).any()


@on_token_mdps
@pytest.mark.parametrize("critic", [exact, wrong])
def test_p4_the_cuts_share_of_the_bias_is_bounded(instance, lam, critic):
    e = Enumeration(instance, lam, critic=critic)
    gamma, v_N, live = e.gamma, e.critic_N, e.mdp.next_E != ENDED
    lip = np.abs(v_N[e.mdp.next_E] - v_N[e.mdp.node_E])[live].max()
    error = np.abs(v_N - e.solution.value_N).max()
    rest = gamma * (1 - lam) / (1 - gamma * lam) if lam < 1 else 0.0
    whole = e.whole()
    for l in range(1, e.mdp.max_tokens + 1):
        difference = whole - e.batch(l).egae("previous")
        alive = (e.length > l).double()
        for node, token in e.pairs(l):
            t = e.depth(node)
            bound = (gamma * lam) ** (l - t - 1) * gamma * e.given(node, token, alive) * (lip + lam * error * (1 + rest))
            assert abs(e.given(node, token, difference[:, t])) <= bound + 1e-12, (l, node, token)


def test_p2_prime_at_the_last_token_before_a_cut_only_endings_are_trained():
    """gamma 1, no reward before the end: r + (gamma - 1) V = 0 on every row still alive; rows that end there keep A."""
    e = Enumeration(tree(6, rewards_at="the end"), 0.9)
    whole, l = e.whole(), 3
    batch = e.batch(l)
    last_column = batch.egae("previous")[:, l - 1]
    assert batch.cut.any()
    assert (last_column[batch.cut].abs() < 1e-15).all()
    ends_there = e.length == l
    close(last_column[ends_there], whole[ends_there, l - 1], atol=1e-14)
    assert (last_column[ends_there].abs() > 1e-3).any()


# Laws that do not hold. Each would be believed by someone; the example is here to stay.


def bias_of(e: Enumeration, l: int, rule: str) -> dict[tuple[int, int], float]:
    advantages = e.batch(l).egae(rule)
    return {at: e.given(*at, advantages[:, e.depth(at[0])]) - e.advantage(*at) for at in e.pairs(l)}


def test_refuted_zero_cut_with_the_exact_critic_is_unbiased():
    """A trainer that takes a cut for an end tells the policy that living on is worth nothing."""
    e = Enumeration(tree(2, rewards_at="the end"), 0.95)
    biases = bias_of(e, 3, "zero")
    assert max(map(abs, biases.values())) > 0.2
    assert max(map(abs, bias_of(e, 3, "critic").values())) < 1e-12
    # exactly what is dropped: (gamma lam)^{n-1} gamma E[V(s_l) 1(T>l)]
    dropped = e.before(3, e.solution.value_N)
    for at, bias in biases.items():
        assert bias == pytest.approx(-(0.95 ** (3 - e.depth(at[0]) - 1)) * e.given(*at, dropped), abs=1e-12)


def test_refuted_egae_with_the_exact_critic_is_unbiased_at_the_last_token_before_the_cut():
    """P2': the choices that keep the response alive get no credit there, however good or bad they are."""
    e = Enumeration(tree(6, rewards_at="the end"), 0.9)
    biases = {at: bias for at, bias in bias_of(e, 3, "previous").items() if e.depth(at[0]) == 2}
    assert len(biases) == 4 * 3
    for (node, token), bias in biases.items():
        expected = -e.advantage(node, token) if token != END else 0.0
        assert bias == pytest.approx(expected, abs=1e-12), (node, token)
    assert max(map(abs, biases.values())) > 0.05


def test_refuted_egae_has_the_lowest_variance():
    """P5: Var C <= Var A is a law; the term that EGAE drops can be negatively correlated with the rest."""
    refuted = False
    for seed in range(8):
        e = Enumeration(tree(seed), 1.0)
        whole = e.whole()
        for l in range(1, e.mdp.max_tokens):
            estimates = {"A": whole, "B": e.batch(l).egae("previous"), "C": e.batch(l).egae("critic")}
            for at in e.pairs(l):
                t = e.depth(at[0])
                var = {k: e.given(*at, x[:, t] ** 2) - e.given(*at, x[:, t]) ** 2 for k, x in estimates.items()}
                assert var["C"] <= var["A"] + 1e-12
                refuted |= var["B"] > 1.1 * var["A"] + 1e-3
    assert refuted
