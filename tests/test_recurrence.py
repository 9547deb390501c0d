"""recurrence.py: the five-line loop against hand arithmetic, and the blocked scan against the loop, whatever its blocks are."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tppo_ref.method import recurrence
from tppo_ref.method.checks import Runs, runs_of
from tppo_ref.method.recurrence import discounted_sum, discounted_sum_by_loop

F32, F64, NAN = torch.float32, torch.float64, float("nan")
RATES = st.sampled_from([0.0, 0.5, 0.95, 1.0]) | st.floats(0.0, 1.0)
LENGTHS = st.integers(0, 20) | st.sampled_from([31, 32, 33, 48, 97, 255, 256, 257, 769])  # chunks: 16 tokens, then 48 heads


def make_runs(spans: list[tuple[int, int]], width: int) -> Runs:
    column_T = torch.arange(width)
    first_B1, stop_B1 = torch.tensor(spans, dtype=torch.int64).view(-1, 2).T.unsqueeze(-1)
    return runs_of("mask_BT", (column_T >= first_B1) & (column_T < stop_B1))


@st.composite
def ragged_sums(draw):
    """x [B, T] with garbage outside of its runs, the runs, and one rate for all rows or one each."""
    drawn = draw(st.lists(st.tuples(st.integers(0, 20), LENGTHS), max_size=5))
    spans = [(start, start + length) for start, length in drawn]
    runs = make_runs(spans, max((stop for _, stop in spans), default=0) + draw(st.integers(0, 3)))
    x_BT = torch.randn(runs.mask_BT.shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31))), dtype=F64)
    num_rates = draw(st.sampled_from([1, len(spans)])) if spans else 1
    rates = draw(st.lists(RATES, min_size=num_rates, max_size=num_rates))
    return torch.where(runs.mask_BT, x_BT, NAN), runs, torch.tensor(rates, dtype=F64)[:, None]


def test_the_loop_by_hand():
    # a = 1/2 and 0; runs of three tokens from column 1, of two from column 0:  y_2 = 4, y_1 = 2 + 4/2 = 4, y_0 = 1 + 4/2 = 3
    x_BT = torch.tensor([[NAN, 1.0, 2.0, 4.0, 9.0], [3.0, 5.0, NAN, 7.0, 7.0]])
    runs = make_runs([(1, 4), (0, 2)], 5)
    expected = torch.tensor([[0.0, 3.0, 4.0, 4.0, 0.0], [3.0, 5.0, 0.0, 0.0, 0.0]])
    assert torch.equal(discounted_sum_by_loop(x_BT, runs, torch.tensor([[0.5], [0.0]], dtype=F64)), expected)


@settings(max_examples=150, deadline=None)
@given(ragged_sums(), st.sampled_from([F32, F64]), st.sampled_from([1, 40, 700, 400_000]))
@example((torch.zeros(0, 0, dtype=F64), make_runs([], 0), torch.ones(1, 1, dtype=F64)), F64, 1)
@example((torch.zeros(3, 0, dtype=F64), make_runs([(0, 0)] * 3, 0), torch.ones(1, 1, dtype=F64)), F32, 1)
@example((torch.ones(2, 1, dtype=F64), make_runs([(0, 1)] * 2, 1), torch.ones(2, 1, dtype=F64)), F32, 1)
def test_the_scan_is_the_loop_at_every_block_size(case, dtype, cached):
    """Blocks of one row, of a few, of all. Rounding: per term at most a power's and that of a sum over chunks and levels."""
    x_BT, runs, rate_B1 = case
    x_BT = x_BT.to(dtype)
    with mock.patch.object(recurrence, "CACHED", cached):
        y_BT = discounted_sum(x_BT, runs, rate_B1)
    assert (y_BT.dtype, y_BT.shape) == (dtype, x_BT.shape)
    assert (y_BT[~runs.mask_BT] == 0).all()
    exact_BT = discounted_sum_by_loop(x_BT.double(), runs, rate_B1)
    size_BT = discounted_sum_by_loop(x_BT.double().abs(), runs, rate_B1)  # of what was added up
    assert ((y_BT - exact_BT).abs() <= 64 * torch.finfo(dtype).eps * size_BT).all()


@settings(max_examples=50, deadline=None)
@given(ragged_sums(), st.sampled_from([1, 40, 400_000]))
def test_terms_that_are_written_block_by_block_give_the_sum_of_the_whole(case, cached):
    x_BT, runs, rate_B1 = case
    asked = torch.zeros(runs.mask_BT.shape, dtype=torch.int64)

    def terms(rows: slice, columns: slice, out_RT: torch.Tensor) -> None:
        asked[rows, columns] += 1
        out_RT.copy_(x_BT[rows, columns])

    with mock.patch.object(recurrence, "CACHED", cached):
        assert torch.equal(discounted_sum(terms, runs, rate_B1, dtype=F64), discounted_sum(x_BT, runs, rate_B1))
    assert asked.max() <= 1 if asked.numel() else True
    assert (asked[runs.mask_BT] == 1).all()


@pytest.fixture
def rounded_products():
    """The places where torch is told how to multiply float32 matrices, told to round: to TF32 on a GPU, in bfloat16 on a CPU."""
    places = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [place.fp32_precision for place in places]
    for place, rounding in zip(places, ("tf32", "bf16"), strict=True):
        place.fp32_precision = rounding
    yield places
    for place, precision in zip(places, before, strict=True):
        place.fp32_precision = precision


def test_products_are_in_full_precision_and_the_caller_gets_its_settings_back(rounded_products):
    """Most machines that run this can round in neither way, so that the settings are read; after an error within, too."""
    seen = []

    def terms(rows: slice, columns: slice, out_RT: torch.Tensor) -> None:
        seen.append([place.fp32_precision for place in rounded_products])
        out_RT.fill_(1.0)
        if len(seen) == 2:
            raise ValueError("from within")

    runs, rate_B1 = make_runs([(0, 40)], 40), torch.tensor([[0.5]], dtype=F64)
    discounted_sum(terms, runs, rate_B1, dtype=F32)
    assert [place.fp32_precision for place in rounded_products] == ["tf32", "bf16"]
    with pytest.raises(ValueError, match="from within"):
        discounted_sum(terms, runs, rate_B1, dtype=F32)
    assert [place.fp32_precision for place in rounded_products] == ["tf32", "bf16"]
    assert seen == [["ieee", "ieee"]] * 2


@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("length", [1, 16, 17, 800])
def test_what_is_not_finite_reaches_the_first_token(bad, rate, length):
    """advantages.py looks there, and only there, for terms that are not finite."""
    for column in {0, length // 2, length - 1}:
        x_BT = torch.zeros(2, length)
        x_BT[1, column] = bad
        y_BT = discounted_sum(x_BT, make_runs([(0, length)] * 2, length), torch.tensor([[rate]], dtype=F64))
        assert y_BT[:, 0].isfinite().tolist() == [True, False]


def test_the_argument_is_not_written_to():
    x_BT = torch.ones(3, 40)
    discounted_sum(x_BT, make_runs([(2, 30)] * 3, 40), torch.tensor([[0.5]], dtype=F64))
    assert torch.equal(x_BT, torch.ones(3, 40))
