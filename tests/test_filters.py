"""masks.py: which token may teach whom, against the brute-force question asked of every token by itself."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tppo_ref.method.masks import num_settled, policy_token_mask, value_token_mask

LAW = settings(max_examples=50, deadline=None)


def run_mask(runs: list[tuple[int, int]], width: int) -> torch.Tensor:
    mask = torch.zeros(len(runs), width, dtype=torch.bool)
    for b, (start, stop) in enumerate(runs):
        mask[b, start:stop] = True
    return mask


def policy_trains(mask: list[bool], t: int, window_start: int, cut: bool, skip_tail: int) -> bool:
    """The definition, for one token: of the response, not before the window, not among a cut row's last `skip_tail`."""
    tokens_after_it = sum(mask[t + 1 :])
    return mask[t] and t >= window_start and not (cut and tokens_after_it < skip_tail)


@st.composite
def rows(draw) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    one = st.tuples(st.integers(0, 4), st.integers(0, 12), st.integers(0, 16), st.booleans())
    drawn = draw(st.lists(one, max_size=5))
    runs = [(start, start + length) for start, length, _, _ in drawn]
    mask = run_mask(runs, max((stop for _, stop in runs), default=0) + draw(st.integers(0, 3)))
    window_start = torch.tensor([w for _, _, w, _ in drawn], dtype=torch.int64)
    cut = torch.tensor([c for _, _, _, c in drawn], dtype=torch.bool)
    return mask, window_start, cut, draw(st.integers(0, 14))


@LAW
@given(rows())
@example((run_mask([(0, 4)], 4), torch.tensor([0]), torch.tensor([True]), 0))  # [-0:] is the whole row
@example((run_mask([(0, 4)], 6), torch.tensor([2]), torch.tensor([True]), 9))
def test_policy_token_mask_is_its_definition_token_by_token(case):
    mask, window_start, cut, skip_tail = case
    expected = [
        [policy_trains(row.tolist(), t, int(start), bool(c), skip_tail) for t in range(mask.shape[1])]
        for row, start, c in zip(mask, window_start, cut, strict=True)
    ]
    actual = policy_token_mask(mask, window_start, cut, skip_tail=skip_tail)
    assert actual.dtype == torch.bool
    assert actual.shape == mask.shape
    assert actual.tolist() == expected


def test_policy_token_mask_by_hand():
    mask = run_mask([(0, 8), (0, 8), (0, 5), (0, 5)], 10)
    window_start, cut = torch.tensor([4, 4, 0, 4]), torch.tensor([True, False, True, False])
    columns = [row.nonzero()[:, 0].tolist() for row in policy_token_mask(mask, window_start, cut, skip_tail=2)]
    assert columns == [[4, 5], [4, 5, 6, 7], [0, 1, 2], [4]]


@pytest.mark.parametrize("cut", [True, False])
def test_no_tail_means_no_token_is_skipped(cut):
    """The trap is x[-0:], which selects everything."""
    mask, args = run_mask([(0, 6)], 8), (torch.tensor([2]), torch.tensor([cut]))
    expected = [[False, False, True, True, True, True, False, False]]
    assert policy_token_mask(mask, *args, skip_tail=0).tolist() == expected
    assert policy_token_mask(mask, *args).tolist() == expected


@pytest.mark.parametrize("skip_tail", [4, 5, 6, 7, 10**6])
def test_a_tail_longer_than_the_window_or_the_run_leaves_nothing_on_cut_rows_only(skip_tail):
    mask = run_mask([(0, 6), (0, 6), (0, 0)], 8)
    trained = policy_token_mask(mask, torch.tensor([2, 2, 0]), torch.tensor([True, False, True]), skip_tail=skip_tail)
    assert trained.sum(1).tolist() == [0, 4, 0]


@LAW
@given(rows())
def test_the_tail_belongs_to_the_run_not_to_the_tensor(case):
    """Padding columns are not the last tokens: more of them change nothing."""
    mask, window_start, cut, skip_tail = case
    wider = torch.nn.functional.pad(mask, (0, 5))
    actual = policy_token_mask(wider, window_start, cut, skip_tail=skip_tail)
    narrow = policy_token_mask(mask, window_start, cut, skip_tail=skip_tail)
    assert torch.equal(actual, torch.nn.functional.pad(narrow, (0, 5)))


def trained_over_windows(edges: list[int], ended: bool, tail: int, defer: bool) -> tuple[torch.Tensor, int]:
    """How often each token of a response is trained, window by window, and how many tokens are held back at the end."""
    length = edges[-1]
    times, begin = torch.zeros(1, length, dtype=torch.int64), 0
    for stop in edges:
        cut = not (ended and stop == length)
        mask = run_mask([(0, stop)], length)
        begin_B, cut_B = torch.tensor([begin]), torch.tensor([cut])
        times += policy_token_mask(mask, begin_B, cut_B, skip_tail=tail).long()
        begin = num_settled(torch.tensor([stop]), begin_B, cut_B, skip_tail=tail, tail="defer" if defer else "exclude").item()
    return times[0], length - begin


WINDOWS = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(lambda sizes: [*itertools.accumulate(sizes)])


def test_num_settled_by_hand():
    """Rows of 9 tokens, the first 6 seen before; a tail of 2, and one that is longer than the window."""
    length, start, cut = torch.tensor([9, 9]), torch.tensor([6, 6]), torch.tensor([True, False])
    assert num_settled(length, start, cut, skip_tail=2, tail="exclude").tolist() == [9, 9]
    assert num_settled(length, start, cut, skip_tail=2, tail="defer").tolist() == [7, 9]
    assert num_settled(length, start, cut, skip_tail=5, tail="defer").tolist() == [6, 9]
    assert num_settled(length, start, cut, skip_tail=0, tail="defer").tolist() == [9, 9]


@LAW
@given(rows(), st.sampled_from(["exclude", "defer"]))
def test_f1_what_is_settled_is_trained_or_lost_and_only_a_deferred_tail_waits(case, tail):
    """Rows that begin at column 0, as responses do: trained + lost = settled now - settled before."""
    mask, window_start, cut, skip_tail = case
    length = mask.sum(1)
    mask, window_start = torch.arange(mask.shape[1]) < length[:, None], torch.minimum(window_start, length)
    trained = policy_token_mask(mask, window_start, cut, skip_tail=skip_tail).sum(1)
    settled = num_settled(length, window_start, cut, skip_tail=skip_tail, tail=tail)
    lost = settled - window_start - trained
    skipped = length - window_start - trained
    assert (lost == (skipped if tail == "exclude" else 0)).all()
    assert (settled == length)[~cut].all()


@LAW
@given(WINDOWS, st.booleans(), st.integers(0, 8))
@example([4, 8, 12], True, 3)
def test_f1_deferral_trains_every_token_once_and_holds_back_the_tail_of_a_running_response(edges, ended, tail):
    """`num_settled` puts the next window_start_B before the window: it picks up the tokens that the window before deferred."""
    times, held = trained_over_windows(edges, ended, tail, defer=True)
    assert held == (0 if ended else min(tail, edges[-1]))
    assert times.tolist() == [1] * (edges[-1] - held) + [0] * held


@LAW
@given(WINDOWS, st.booleans(), st.integers(0, 8))
def test_f1_exclusion_loses_the_tail_of_every_cut_window_for_good(edges, ended, tail):
    times, _ = trained_over_windows(edges, ended, tail, defer=False)
    assert times.max() <= 1
    sizes = [stop - begin for begin, stop in zip([0, *edges[:-1]], edges, strict=True)]
    cut_windows = sizes[:-1] if ended else sizes
    assert (times == 0).sum() == sum(min(tail, size) for size in cut_windows)


@LAW
@given(rows())
def test_f3_padding_reaches_neither_loss(case):
    mask, window_start, cut, skip_tail = case
    assert not (policy_token_mask(mask, window_start, cut, skip_tail=skip_tail) & ~mask).any()
    assert not (value_token_mask(mask, ~cut) & ~mask).any()


@LAW
@given(rows())
def test_f2_the_critic_sees_every_token_of_ended_responses_and_none_of_running_ones(case):
    mask, _, cut, _ = case
    actual = value_token_mask(mask, ~cut)
    assert actual.dtype == torch.bool
    assert actual.tolist() == [[bool(token) and not c for token in row] for row, c in zip(mask, cut.tolist(), strict=True)]


def test_the_masks_are_new_tensors():
    """Writing into a mask must not reach the record that it was derived from."""
    mask, cut = run_mask([(0, 3)], 4), torch.tensor([False])
    policy_token_mask(mask, torch.tensor([0]), cut).fill_(False)
    value_token_mask(mask, ~cut).fill_(False)
    assert mask.tolist() == [[True, True, True, False]]


def refusal_of(argument: str) -> str:
    """The one dialect of messages: `name: got VALUE; expected ...`, a place in a tensor as `name[b, t]`."""
    return rf"^{argument}(\[[\d, ]+\])?: got .+; expected .+"


GOOD = {
    "response_mask_BT": run_mask([(0, 3), (1, 4)], 4),
    "window_start_B": torch.tensor([0, 2]),
    "cut_B": torch.tensor([True, False]),
    "skip_tail": 1,
}
HOLE = torch.tensor([[True, False, True, False], [False, True, True, True]])
BAD_MASKS = [
    ("response_mask_BT", torch.ones(4, dtype=torch.bool), "rank 1"),
    ("response_mask_BT", torch.ones(2, 4), "floats"),
    ("response_mask_BT", torch.ones(2, 4, dtype=torch.int64), "integers"),
    ("response_mask_BT", HOLE, "a hole in a run"),
]
BAD = [
    *BAD_MASKS,
    ("window_start_B", torch.tensor([0]), "[1] for two rows"),
    ("window_start_B", torch.tensor([[0], [2]]), "rank 2"),
    ("window_start_B", torch.tensor([0.0, 2.0]), "floats"),
    ("window_start_B", torch.tensor([False, True]), "a bool"),
    ("window_start_B", torch.tensor([0, -1]), "before the response"),
    ("cut_B", torch.tensor([True]), "[1] for two rows"),
    ("cut_B", torch.tensor([[True], [False]]), "rank 2"),
    ("cut_B", torch.tensor([1, 0]), "integers"),
    ("skip_tail", -1, "negative"),
]


def test_the_good_arguments_are_good():
    assert policy_token_mask(**GOOD).sum(1).tolist() == [2, 2]
    assert value_token_mask(GOOD["response_mask_BT"], GOOD["cut_B"]).sum(1).tolist() == [3, 0]


@pytest.mark.parametrize(("argument", "value"), [pytest.param(a, v, id=f"{a}, {what}") for a, v, what in BAD])
def test_policy_token_mask_names_a_bad_argument(argument, value):
    with pytest.raises(ValueError, match=refusal_of(argument)):
        policy_token_mask(**GOOD | {argument: value})


@pytest.mark.parametrize(
    ("argument", "value"),
    [("tail", "none"), ("tail", None), ("skip_tail", -1), ("skip_tail", True), ("cut_B", torch.tensor([1, 0])),
     ("window_start_B", torch.tensor([0.0, 2.0])), ("window_start_B", torch.tensor([0, -1]))],
)  # fmt: skip
def test_num_settled_names_a_bad_argument(argument, value):
    good = {"window_start_B": GOOD["window_start_B"], "cut_B": GOOD["cut_B"], "skip_tail": 1, "tail": "defer"}
    assert num_settled(torch.tensor([3, 4]), **good).tolist() == [2, 4]
    with pytest.raises(ValueError, match=refusal_of(argument)):
        num_settled(torch.tensor([3, 4]), **good | {argument: value})


@pytest.mark.parametrize(("argument", "value"), [pytest.param(a, v, id=f"{a}, {what}") for a, v, what in BAD_MASKS])
def test_value_token_mask_names_a_bad_mask(argument, value):
    with pytest.raises(ValueError, match=refusal_of(argument)):
        value_token_mask(value, torch.tensor([True, False]))


@pytest.mark.parametrize("ended", [torch.tensor([True]), torch.tensor([1, 0]), torch.tensor([[True], [False]])])
def test_value_token_mask_names_a_bad_ended(ended):
    with pytest.raises(ValueError, match=refusal_of("ended_B")):
        value_token_mask(GOOD["response_mask_BT"], ended)
