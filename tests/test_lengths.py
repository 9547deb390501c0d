"""distributions.py and lengths.py: response lengths against enumeration, moments, Monte Carlo and what was published."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sim.clock.fitted import stretch_for_mean
from sim.clock.lengths import (
    DAPO_MEANS,
    PUBLISHED,
    Constant,
    Empirical,
    Growth,
    Mixture,
    PercentileTable,
    TwoPoint,
    growing_to,
    load_lengths,
    log_normal,
    prompt_lengths,
    read_lengths,
)

LAW = settings(max_examples=60, deadline=None)
SMALL = Empirical(values=(2, 7, 7, 1, 12), cap=15)
EXAMPLES = {
    **PUBLISHED,
    "constant": Constant(value=40, cap=64),
    "two-point": TwoPoint(short=5, long_share=0.3, cap=50),
    "log-normal": log_normal(median=300, sigma=0.8, cap=4000, correlation=0.4),
    "no spread": log_normal(mean=300, sigma=0, cap=4000),
    "empirical": SMALL,
    "growing": dataclasses.replace(SMALL, growth=Growth(factors=((0, 0.5), (10, 2.0)))),
    "mixture": Mixture(
        components=(Constant(value=9, cap=9), log_normal(mean=90, p99=400, cap=1), TwoPoint(short=30, long_share=0.5, cap=600)),
        weights=(0.2, 0.5, 0.3),
        cap=600,
        correlation=0.7,
    ),
}
every_distribution = pytest.mark.parametrize("lengths", EXAMPLES.values(), ids=EXAMPLES.keys())


def moments_of(cumulative):
    """Mean and standard deviation of a whole number with P(number <= k) = cumulative[k]."""
    probability, tokens = np.diff(cumulative), np.arange(1, len(cumulative))
    mean = probability @ tokens
    return mean, math.sqrt(probability @ (tokens - mean) ** 2)


def moments(lengths, step=0):
    return moments_of(lengths.cumulative(step))


# ------------------------------------------------------------------------------------------------ what every distribution obeys


@LAW
@given(st.sampled_from(list(EXAMPLES.values())), st.floats(1e-6, 1 - 1e-6))
@example(EXAMPLES["two-point"], 0.7)
@example(EXAMPLES["empirical"], 0.4)
@example(EXAMPLES["mixture"], 0.2)
def test_below_inverts_quantile(lengths, u):
    """P(X < q(u)) <= u <= P(X <= q(u)), jumps included, q up to rounding in its last digits."""
    x = float(lengths.quantile(u))
    at_or_below = float(lengths.below(x * (1 + 1e-12))) if x < math.inf else 1.0
    assert float(lengths.below(x * (1 - 1e-12))) - 1e-6 <= u <= at_or_below + 1e-6


@LAW
@given(st.sampled_from(list(EXAMPLES.values())), st.lists(st.floats(0, 1), min_size=2, max_size=5), st.floats(0, 6000))
def test_a_higher_rank_is_never_shorter_and_lengths_lie_in_one_to_cap(lengths, ranks, step):
    tokens = lengths.tokens(np.sort(ranks), step)
    assert tokens.dtype == np.int64
    assert (np.diff(tokens) >= 0).all()
    assert tokens.min() >= 1
    assert tokens.max() <= lengths.cap


@every_distribution
@pytest.mark.parametrize("step", [0, 3, 2600])
def test_cumulative_counts_the_ranks_whose_length_is_at_most_k(lengths, step):
    """The exact table, in closed form, against the sampler's map from ranks to lengths on a fine grid of ranks."""
    ranks = (np.arange(40_000) + 0.5) / 40_000
    counted = np.cumsum(np.bincount(lengths.tokens(ranks, step), minlength=lengths.cap + 1)) / len(ranks)
    cumulative = lengths.cumulative(step)
    assert cumulative.shape == (lengths.cap + 1,)
    assert (np.diff(cumulative) >= 0).all()
    np.testing.assert_allclose(cumulative, counted, atol=1.01 / len(ranks))


@every_distribution
def test_samples_follow_the_distribution_whatever_the_correlation(lengths):
    """Kolmogorov-Smirnov at p = 1e-4; one answer of each group, since answers to one prompt depend on each other."""
    sampled = lengths.sample(np.random.default_rng(7), 4000, 3)
    assert sampled.dtype == np.int64
    assert sampled.shape == (4000, 3)
    seen = np.cumsum(np.bincount(sampled[:, 2], minlength=lengths.cap + 1)) / 4000
    assert np.abs(seen - lengths.cumulative()).max() < 2.23 / math.sqrt(4000)


@every_distribution
def test_mean_share_at_the_cap_and_percentiles_are_those_of_the_samples(lengths):
    sampled = lengths.sample(np.random.default_rng(11), 40_000)[:, 0]
    mean, sd = moments(lengths)
    assert lengths.mean_tokens() == pytest.approx(mean)
    assert abs(sampled.mean() - mean) <= 4.5 * sd / math.sqrt(len(sampled)) + 1e-9
    share = lengths.capped_share()
    assert abs((sampled == lengths.cap).mean() - share) <= 4.5 * math.sqrt(share * (1 - share) / len(sampled)) + 1e-9
    for percent, tokens in lengths.percentiles().items():
        assert (sampled < tokens).mean() - 0.012 <= percent / 100 <= (sampled <= tokens).mean() + 0.012


def test_a_seed_decides_the_sample_and_groups_come_before_answers():
    lengths = EXAMPLES["log-normal"]
    first, second = (lengths.sample(np.random.default_rng(3), 5, 4) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert lengths.sample(np.random.default_rng(4), 5, 4).tolist() != first.tolist()
    assert lengths.sample(np.random.default_rng(3), 0, 4).shape == (0, 4)


# ------------------------------------------------------------------------------------------------------- the longest of several


def test_expected_maximum_is_the_enumerated_one():
    """All 5^n draws of the five values, in exact arithmetic."""
    for num in (1, 2, 4):
        longest = [max(draw) for draw in itertools.product(SMALL.values, repeat=num)]
        assert SMALL.expected_maximum(num) == pytest.approx(sum(longest) / len(longest), rel=1e-12)


@pytest.mark.parametrize("name", ["dapo-32b-early", "code-14b", "math-mixture", "mixture", "log-normal"])
@pytest.mark.parametrize("num", [4, 64])
def test_expected_maximum_is_the_monte_carlo_one(name, num):
    independent = dataclasses.replace(EXAMPLES[name], correlation=0.0)
    longest = independent.sample(np.random.default_rng(5), 4000, num).max(axis=1)
    _, sd = moments_of(independent.cumulative() ** num)
    assert abs(longest.mean() - independent.expected_maximum(num)) < 4 * sd / math.sqrt(4000)


def test_expected_maximum_in_closed_form():
    two_point = TwoPoint(short=500, long_share=0.05, cap=24_576)
    all_short = 0.95**16
    assert two_point.expected_maximum(16) == pytest.approx(500 * all_short + 24_576 * (1 - all_short))
    assert Constant(value=512, cap=600).expected_maximum(10_000) == pytest.approx(512)


@LAW
@given(st.sampled_from(list(EXAMPLES.values())), st.integers(1, 500), st.integers(1, 500))
def test_the_longest_of_more_is_longer_and_of_one_is_the_mean(lengths, num, more):
    assert lengths.expected_maximum(1) == pytest.approx(lengths.mean_tokens())
    assert lengths.expected_maximum(num) <= lengths.expected_maximum(num + more) + 1e-9 <= lengths.cap + 1e-6


def test_correlated_answers_have_a_shorter_longest_one():
    """`expected_maximum` is for independent responses, and says so: within groups the longest is shorter."""
    lengths = EXAMPLES["log-normal"]
    of_groups = lengths.sample(np.random.default_rng(1), 4000, 16).max(axis=1)
    assert of_groups.mean() + 4 * of_groups.std() / math.sqrt(4000) < lengths.expected_maximum(16)


# -------------------------------------------------------------------------------------------------------- groups and growth


@pytest.mark.parametrize("rho", [0.0, 0.05, 0.5, 0.92])
def test_rho_is_the_correlation_of_log_lengths_of_a_log_normal(rho):
    num = 40_000
    lengths = log_normal(median=20_000, sigma=0.7, cap=10_000_000, correlation=rho)
    pairs = np.log(lengths.sample(np.random.default_rng(2), num, 2))
    assert abs(np.corrcoef(pairs.T)[0, 1] - rho) < 4.5 * (1 - rho**2) / math.sqrt(num) + 1e-4
    strangers = np.corrcoef(pairs[:-1, 0], pairs[1:, 1])[0, 1]
    assert abs(strangers) < 4.5 / math.sqrt(num)


def test_rho_is_not_the_correlation_of_the_lengths_themselves():
    """A law that has to be refuted: for a log-normal that correlation is (exp(rho sigma^2) - 1) / (exp(sigma^2) - 1) < rho."""
    lengths = log_normal(median=20_000, sigma=0.7, cap=10_000_000, correlation=0.5)
    seen = np.corrcoef(lengths.sample(np.random.default_rng(2), 100_000, 2).T)[0, 1]
    assert seen == pytest.approx(math.expm1(0.5 * 0.49) / math.expm1(0.49), abs=0.02)
    assert seen < 0.47


def test_growth_is_linear_between_its_steps_and_flat_outside():
    growth = Growth(factors=((100, 1.0), (200, 3.0), (400, 2.0)))
    assert [growth.factor(step) for step in (0, 100, 150, 200, 300, 400, 9999)] == [1, 1, 2, 3, 2.5, 2, 2]
    grown = Constant(value=40, cap=100, growth=growth)
    assert [grown.sample(np.random.default_rng(0), 1, step=step).item() for step in (0, 150, 200)] == [40, 80, 100]
    assert [grown.mean_tokens(step) for step in (0, 150, 200)] == [40, 80, 100]


@pytest.mark.parametrize("factors", [(), ((0, 1), (0, 2)), ((5, 1), (2, 1)), ((0, 0),), ((0, math.nan),)])
def test_growth_that_makes_no_sense_is_refused(factors):
    with pytest.raises(ValueError, match="growth: got"):
        Growth(factors=factors)


# ------------------------------------------------------------------------------------------------------------ published ones

TABLES = {  # name: percentiles, mean, share at the cap; the published table once more
    "dapo-32b-early": ({50: 466, 75: 695, 90: 1039, 95: 1418, 99: 2710}, 581, 0.0),
    "code-14b": ({50: 9900, 75: 14290, 90: 16000, 95: 16000, 99: 16000}, 9382, 0.15),
    "math-14b": ({50: 661, 75: 1129, 90: 2566, 95: 4101, 99: 16000}, None, 0.01),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_published_table_comes_back(name):
    percentiles, mean, capped = TABLES[name]
    lengths = PUBLISHED[name]
    assert lengths.percentiles(list(percentiles)) == percentiles
    assert lengths.capped_share() == pytest.approx(capped, abs=1e-4)
    if mean is not None:
        assert lengths.mean_tokens() == pytest.approx(mean, abs=0.5)
        assert lengths.lower_stretch == pytest.approx(
            stretch_for_mean(lengths.percentiles_upward, cap=lengths.cap, mean=mean), abs=1e-3
        )


def test_the_longest_of_the_4608_dapo_responses_is_where_it_was_seen():
    """10,112 is the median of the longest of 4,608, by construction, up to the rank's approximation."""
    lengths = PUBLISHED["dapo-32b-early"]
    assert lengths.cumulative()[10_112] ** 4608 == pytest.approx(0.5, abs=0.01)


def test_a_log_normal_cannot_have_the_published_tail():
    """From the quartiles its 99th percentile would be 1,849 tokens, not 2,710."""
    body = log_normal(median=466, sigma=math.log(695 / 466) / 0.67449, cap=20_480)
    assert body.percentiles([75, 99]) == {75: 695, 99: pytest.approx(1849, abs=3)}


def test_the_mixture_has_the_published_moments():
    mixture = PUBLISHED["math-mixture"]
    weights, means = np.array([0.359, 0.074, 0.373, 0.194]), np.array([4959, 12720, 9175, 17655])
    assert [round(component.median * math.exp(component.sigma**2 / 2)) for component in mixture.components] == means.tolist()
    uncapped = dataclasses.replace(mixture, cap=300_000)
    mean, sd = moments(uncapped)
    assert mean == pytest.approx(weights @ means, rel=1e-4)  # 9,569; the paper's 9,575 is 0.06 % above its own components
    assert sd == pytest.approx(5943, rel=1e-3)
    assert moments(mixture) == (pytest.approx(9545, abs=1), pytest.approx(5831, abs=1))
    assert mixture.capped_share() == pytest.approx(0.005, abs=2e-4)


def test_the_dapo_run_follows_the_published_curve():
    lengths = PUBLISHED["dapo-32b"]
    for step, mean in DAPO_MEANS.items():
        assert lengths.mean_tokens(step) == pytest.approx(mean, rel=1e-3)
    solved = growing_to(PUBLISHED["dapo-32b-early"], DAPO_MEANS)
    np.testing.assert_allclose(lengths.growth.factors, solved.growth.factors, rtol=1e-3)


def test_every_published_distribution_says_what_was_published_and_what_was_not():
    for name, lengths in PUBLISHED.items():
        assert lengths.name == name
        assert "[V" in lengths.source
        assert "[I]" in lengths.source


# --------------------------------------------------------------------------------------------------------- parameters and forms


@LAW
@given(st.floats(50, 5000), st.floats(1.05, 14.9))
@example(900.0, 14.96)
def test_a_log_normal_has_the_mean_and_the_percentile_that_were_asked_for(mean, ratio):
    made = log_normal(mean=mean, p99=mean * ratio, cap=100)
    assert made.median * math.exp(made.sigma**2 / 2) == pytest.approx(mean)
    assert float(made.quantile(0.99)) == pytest.approx(mean * ratio)
    again = log_normal(median=made.median, p99=mean * ratio, cap=100)
    assert again.sigma == pytest.approx(made.sigma)


def test_short_forms():
    assert load_lengths("constant:512").mean_tokens() == 512
    assert load_lengths("constant:512").cap == 512
    two_point = load_lengths("twopoint:short=500,share=0.05")
    assert (two_point.cap, two_point.mean_tokens()) == (24_576, pytest.approx(0.95 * 500 + 0.05 * 24_576))
    made = load_lengths("lognormal:mean=900,p99=8000,cap=30000,rho=0.3")
    assert (made.cap, made.correlation, made.percentiles([99])) == (30_000, 0.3, {99: 8000})
    assert load_lengths("lognormal:median=900,sigma=1", cap=1000).cap == 1000
    assert load_lengths("code-14b", cap=8192, correlation=0.1).mean_tokens() < 8192
    assert load_lengths("code-14b", correlation=0.1).correlation == 0.1
    assert load_lengths("code-14b").correlation == 0.92


def test_prompt_lengths_are_a_number_a_spec_or_a_distribution():
    assert prompt_lengths(300).sample(np.random.default_rng(0), 2, 2).tolist() == [[300, 300], [300, 300]]
    assert prompt_lengths("constant:7").mean_tokens() == 7
    assert prompt_lengths(SMALL) is SMALL
    with pytest.raises(ValueError, match="value: got -3"):
        prompt_lengths(-3)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("dapo-32b-erly", "did you mean dapo-32b-early"),
        ("uniform:1,2", "lengths: got 'uniform:1,2'; expected one of dapo-32b-early"),
        ("constnt:5", "did you mean constant:"),
        ("constant:", "without tokens"),
        ("constant:five", "expected a number for tokens, got 'five'"),
        ("constant:0", "value: got 0.0; expected a positive finite"),
        ("constant:nan", "value: got nan; expected a positive finite"),
        ("constant:50,cap=10", "value: got 50.0; expected at most the cap of 10; raise the cap"),
        ("constant:50,cap=0", "cap: got 0; expected a whole number"),
        ("constant:50,cap=99.5", "cap: got 99.5; expected a whole number"),
        ("constant:50,cap=1e300", "cap: got 1"),
        ("constant:50,rho=1", r"correlation: got 1.0; expected a number in \[0, 1\)"),
        ("twopoint:short=500", "without share"),
        ("twopoint:short=500,share=1.5", "long_share: got 1.5"),
        ("twopoint:short=500,short=3,share=.1", "each once"),
        ("lognormal:mean=900", "one of mean and median, and one of p99 and sigma"),
        ("lognormal:mean=900,median=800,sigma=1", "one of mean and median"),
        ("lognormal:mean=900,p99=80000", "p99: got 80000, 88.89 times the centre; expected 1 to 14.97 times"),
        ("lognormal:mean=-1,sigma=1", "mean: got -1.0; expected a positive"),
        ("lognormal:mean=10,sigma=-1", "sigma: got -1.0"),
        ("lognormal:mean=10,tail=3", "expected mean, median, p99, sigma, cap or rho"),
        ("nowhere.jsonl", "nowhere.jsonl: no such file"),
    ],
)
def test_a_bad_spec_is_one_line_that_names_it(spec, message):
    with pytest.raises(ValueError, match=message) as raised:
        load_lengths(spec)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Empirical(values=(), cap=5), "values: got none"),
        (lambda: Empirical(values=(3, 9), cap=5), "values: got 9; expected at most the cap of 5"),
        (lambda: Empirical(values=(3, 0), cap=5), "values: got 0; expected a positive"),
        (lambda: Constant(value=3, cap=True), "cap: got True"),
        (lambda: Constant(value=3, cap=5, correlation=-0.1), "correlation: got -0.1"),
        (lambda: Mixture(components=(SMALL,), weights=(0.9,), cap=5), "sum to 1"),
        (lambda: Mixture(components=(SMALL, SMALL), weights=(1.0,), cap=5), "expected 2 positive numbers"),
        (lambda: PercentileTable(percentiles_upward=((0.5, 9), (0.9, 7)), cap=50), "that rise from"),
        (lambda: PercentileTable(percentiles_upward=((0.6, 5), (0.9, 7)), cap=50), "that rise from"),
        (lambda: stretch_for_mean(((0.5, 100), (0.9, 200)), cap=500, mean=400), "mean: got 400; expected one within reach"),
        (lambda: growing_to(SMALL, {0: 15}), "mean at step 0: got 15; expected at least 1 and less than the cap, 15"),
        (lambda: SMALL.expected_maximum(0), "num: got 0"),
    ],
)
def test_bad_parameters_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# ------------------------------------------------------------------------------------------------------------------ files

VALUES = [5, 800, 12, 12]
CONTENTS = {
    "numbers.jsonl": "5\n800\n\n12.0\n12\n",
    "objects.jsonl": "".join(json.dumps({"id": 0, "length": value}) + "\n" for value in VALUES),
    "response_length.jsonl": "".join(json.dumps({"response_length": value, "reward": 1}) + "\n" for value in VALUES),
    "only_column.csv": "5\n800\n12\n12\n",
    "headed.csv": "anything\n5\n800\n12\n12\n",
    "named.csv": "id,tokens\n" + "".join(f"7,{value}\n" for value in VALUES),
    "plain.txt": "5 800\n12\t12\n",
}


@pytest.mark.parametrize("name", CONTENTS)
def test_a_file_gives_its_lengths(tmp_path, name):
    (tmp_path / name).write_text(CONTENTS[name])
    assert read_lengths(tmp_path / name) == VALUES
    lengths = load_lengths(tmp_path / name)
    assert (lengths.cap, lengths.mean_tokens(), lengths.num_clipped) == (800, pytest.approx(829 / 4), 0)
    assert set(lengths.sample(np.random.default_rng(0), 100).ravel().tolist()) == {5, 12, 800}


@pytest.mark.parametrize("dtype", [np.int64, np.uint16, np.float32])
def test_an_array_file_gives_its_lengths(tmp_path, dtype):
    np.save(tmp_path / "x.npy", np.array(VALUES, dtype=dtype))
    assert read_lengths(tmp_path / "x.npy") == VALUES


def test_a_field_can_be_named(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"length": 1, "n": 4}\n')
    (tmp_path / "x.csv").write_text("length,n\n1,4\n")
    assert read_lengths(tmp_path / "x.jsonl", field="n") == [4]
    assert read_lengths(tmp_path / "x.csv", field="n") == [4]
    assert read_lengths(tmp_path / "x.csv") == [1]


def test_a_cap_below_the_data_is_an_error_unless_the_user_asks_to_clip(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("5 800 600 900 12")
    with pytest.raises(ValueError, match="got a length of 900; expected at most the cap of 600; raise it, or pass clip=True"):
        load_lengths(path, cap=600)
    clipped = load_lengths(path, cap=600, clip=True)
    assert (clipped.num_clipped, pytest.approx(clipped.capped_share()), clipped.mean_tokens()) == (2, 0.6, pytest.approx(1817 / 5))
    assert load_lengths(path, cap=1000).capped_share() == 0


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.jsonl", "", "got no length; expected one or more"),
        ("x.csv", "\n\n", "got no length"),
        ("x.csv", "length\n", "got no length"),
        ("x.jsonl", "5\n-3\n", "line 2: got -3; expected a length in tokens"),
        ("x.jsonl", "5\n0\n", "line 2: got 0"),
        ("x.jsonl", "5\nNaN\n", "line 2: got nan"),
        ("x.jsonl", "5\n1e999\n", "line 2: got inf"),
        ("x.jsonl", "true\n", "line 1: got True"),
        ("x.jsonl", "2.5\n", "line 1: got 2.5"),
        ("x.jsonl", "[5]\n", r"line 1: got \[5\]"),
        ("x.jsonl", '"5 tokens"\n', "line 1: got '5 tokens'"),
        ("x.jsonl", "{5}\n", "line 1 is not JSON"),
        ("x.jsonl", '{"words": 5}\n', "line 1: got the fields 'words'; expected one of length, tokens"),
        ("x.csv", "a,b\n1,2\n", "header: got the fields 'a', 'b'; expected one of length, tokens"),
        ("x.csv", "id,length\n1,5\n2\n", "line 3: got ''"),
        ("x.txt", "5 five", "line 1: got 'five'"),
        ("x.parquet", "5", "expected one of .jsonl, .csv, .npy, .txt"),
        ("x.npy", "not an array", "is not an array of numbers"),
    ],
)
def test_a_bad_file_is_one_line_that_names_file_and_place(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        load_lengths(tmp_path / name)
    assert name in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_array_of_objects_or_of_two_dimensions_is_refused(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{"length": 5}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "square.npy", np.ones((2, 2)))
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe5")
    for name in ("objects.npy", "square.npy", "binary.txt"):
        with pytest.raises(ValueError, match=name):
            load_lengths(tmp_path / name)
    (tmp_path / "x.csv").write_text("length\n5\n")
    with pytest.raises(ValueError, match="header: got the fields 'length'; expected the field 'n'"):
        load_lengths(tmp_path / "x.csv", field="n")
