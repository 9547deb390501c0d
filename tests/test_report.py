"""The report of a comparison, on run folders with numbers that can be worked out by hand."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tppo_ref.method.errors import UserError
from tppo_ref.runs import comparison as numbers
from tppo_ref.runs import figures, report

SLOTS = 2
STEP_S = 10.0  # of each training step: 6 rollout, 1 forward, 1.5 policy, 1 value, 0.5 the rest
TOKENS = 100  # sampled by each training step
SEGMENTS = [  # of each step: slot, response, begin_s, stop_s, tokens, end
    (0, 0, 0.0, 2.0, 2, "END_TOKEN"), (0, 1, 2.0, 6.0, 4, "RUNNING"), (1, 2, 0.0, 6.0, 6, "LENGTH_CAP"),
]  # fmt: skip


def make_run(out: Path, method: str, seed: int, accuracies: list[float], *, step_s: float = STEP_S, trained: float = 0.9) -> Path:
    """A finished run: an evaluation, then a training step before each further one; response r of step k is 10 k + r tokens long."""
    folder = out / "runs" / f"{method}-seed{seed}"
    folder.mkdir(parents=True)
    scale = step_s / STEP_S
    records, responses, timeline = [], [], []
    for step, accuracy in enumerate(accuracies):
        clock = {"step": step, "time/train_s": step_s * step, "ledger/trained": trained * TOKENS * step}
        if step:
            phases = {"step": 10.0, "rollout": 6.0, "forward": 1.0, "policy": 1.5, "value": 1.0}
            seconds = {f"time/{name}_s": value * scale for name, value in phases.items()}
            busy = {"rollout/occupancy": 0.5 if step == 1 else 1.0, "rollout/decode_steps": 3 if step == 1 else 1}
            records.append(clock | seconds | busy | {"ledger/generated": TOKENS * step})
            responses += [(step, step_s * step, r, 0, 10 * step + r, "END_TOKEN", 1.0) for r in (0, 2)]
            at = step_s * (step - 1)
            timeline += [(step, slot, 10 * step + r, at + scale * begin, at + scale * stop, tokens, end)
                         for slot, r, begin, stop, tokens, end in SEGMENTS]  # fmt: skip
        lengths = {"eval/length_mean": 20.0 + step, "eval/length_p99": 200.0 - step}
        records.append(clock | lengths | {"eval/accuracy": accuracy})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "config.json").write_text(json.dumps({"rollout": {"slots": SLOTS}}) + "\n")
    write_rows(folder / "responses.csv", "step train_s response prompt tokens end score", responses)
    write_rows(folder / "timeline.csv", "step slot response begin_s stop_s tokens end", timeline)
    (folder / "finished").touch()
    return folder


def write_rows(path: Path, columns: str, rows: list[tuple]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns.split(), *rows])


def make_comparison(out: Path, curves: dict[str, list[list[float]]], *, first_seed: int = 0, **step_s: float) -> Path:
    """A finished comparison; `curves` are accuracies by method and seed, `step_s` seconds per step by method."""
    out.mkdir(exist_ok=True)
    num_seeds = len(next(iter(curves.values())))
    (out / "config.json").write_text(json.dumps({"run": {"seed": first_seed}, "compare": {"seeds": num_seeds}}) + "\n")
    (out / "versions.json").write_text(json.dumps({"torch": "2.13.0"}) + "\n")
    for method, seeds in curves.items():
        for k, accuracies in enumerate(seeds):
            make_run(out, method, first_seed + k, accuracies, step_s=step_s.get(method, STEP_S))
    return out


def load(out: Path, methods: list[str], seeds: range, share: float = 0.9) -> numbers.Comparison:
    return numbers.compare_runs({m: [numbers.read_run(out, m, k) for k in seeds] for m in methods}, share)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# Three seeds; PPO's mean curve is .1 .3 .5 .7 .9, its 3-point means .3 .5 .7: best .7, target at 0.9 is .63.
PPO = [[0.1, 0.3, 0.5, 0.7, 0.9], [0.1, 0.4, 0.7, 0.9, 0.9], [0.1, 0.2, 0.3, 0.5, 0.9]]
# whole 3-point means per seed:  .3 .5 .7 -> 4;  .4 .667 .833 -> 3;  .2 .333 .567 -> never
TPPO = [[0.1, 0.8, 1.0, 1.0, 1.0], [0.1, 0.3, 0.8, 0.9, 0.9], [0.1, 0.1, 0.2, 0.9, 1.0]]
# .633 -> 2;  .4 .667 -> 3;  .133 .4 .7 -> 4


@pytest.fixture
def three(tmp_path: Path) -> Path:
    return make_comparison(tmp_path / "out", {"ppo": PPO, "tppo": TPPO}, tppo=4.0)


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same comparison with its report, for tests that only read it."""
    out = make_comparison(tmp_path_factory.mktemp("reported") / "out", {"ppo": PPO, "tppo": TPPO}, tppo=4.0)
    report.write_report(out, methods=["ppo", "tppo"], target_share=0.9)
    return out


def test_target_and_crossings_are_those_worked_out_by_hand(three: Path) -> None:
    comparison = load(three, ["ppo", "tppo"], range(3))
    assert comparison.target == pytest.approx(0.63)
    assert comparison.void == ""
    assert comparison.crossings["ppo"] == [(40.0, 360.0), (30.0, 270.0), (math.inf, math.inf)]
    assert comparison.crossings["tppo"] == [(8.0, 180.0), (12.0, 270.0), (16.0, 360.0)]
    assert figures.headline(comparison) == (
        "T-PPO reaches 0.63 in 11.5 s (geometric mean of 3 seeds), PPO in 40.0 s (median, 2 of 3 seeds arrive)"
    )


def test_the_first_line_names_its_statistic_once_where_every_seed_arrives(tmp_path: Path) -> None:
    out = make_comparison(tmp_path / "out", {"ppo": [PPO[0], PPO[1]], "tppo": [TPPO[0], TPPO[1]]}, tppo=4.0)
    comparison = load(out, ["ppo", "tppo"], range(2), share=0.8)
    assert comparison.crossings["ppo"] == [(40.0, 360.0), (30.0, 270.0)]
    assert comparison.crossings["tppo"] == [(8.0, 180.0), (12.0, 270.0)]
    assert comparison.typical_crossing("ppo") == ("geometric mean", pytest.approx((math.sqrt(1200), math.sqrt(360 * 270))))
    assert figures.headline(comparison) == "T-PPO reaches 0.61 in 9.8 s, PPO in 34.6 s (geometric mean of 2 seeds)"


def test_crossing_at_exactly_the_target_counts_and_nothing_is_interpolated(tmp_path: Path) -> None:
    out = make_comparison(tmp_path / "out", {"ppo": [[0.1, 0.7, 0.7, 0.7, 0.7]]})
    run = numbers.read_run(out, "ppo", 0)
    assert numbers.crossing(run, 0.7) == (30.0, 270.0)  # (.7 + .7 + .7) / 3 is below .7 by a bit in floating point
    assert numbers.crossing(run, 0.5000001) == (30.0, 270.0)
    assert numbers.crossing(run, 0.4) == (20.0, 180.0)
    assert numbers.crossing(run, 0.01) == (20.0, 180.0)  # not before there are three points
    assert numbers.crossing(run, 0.71) == (math.inf, math.inf)


T_2 = 4.302652729911275  # Student's t at 0.975 with 2 degrees of freedom


def test_the_statistics_and_ratios_of_the_table(reported: Path) -> None:
    """A mean, and a geometric mean where all seeds arrive, have a t interval; a median has its range, and is called that."""
    rows = {(r["method"], r["quantity"], r["statistic"]): r for r in read_csv(reported / "summary.csv")}

    def estimate(*key: str) -> tuple[float, ...]:
        return tuple(float(rows[key][name]) for name in ("value", "low", "high"))

    assert estimate("ppo", "time to target", "median") == (40, 30, math.inf)
    assert rows["ppo", "time to target", "median"]["reached"] == "2"
    assert rows["ppo", "time to target", "median"]["interval"] == "range"
    logs = np.log([8, 12, 16])
    ends = np.mean(logs) + np.array([0, -1, 1]) * T_2 * np.std(logs, ddof=1) / math.sqrt(3)
    assert estimate("tppo", "time to target", "geometric mean") == pytest.approx(np.exp(ends))
    assert rows["tppo", "time to target", "geometric mean"]["interval"] == "95 % t of logarithms"
    assert rows["tppo", "time to target", "geometric mean"]["reached"] == "3"
    assert estimate("tppo", "tokens to target", "geometric mean") == pytest.approx(22.5 * np.exp(ends))  # 90 tokens in 4 s
    assert estimate("tppo", "speed-up", "median") == (5, 2.5, math.inf)  # 40/8, 30/12, only PPO never
    assert rows["tppo", "speed-up", "median"]["reached"] == "2"
    assert float(rows["tppo", "speed-up", "seed 1"]["value"]) == 2.5
    ratio = rows["tppo", "throughput ratio", "geometric mean"]  # 10 s against 4 s a step in every seed: no interval
    assert (float(ratio["value"]), ratio["low"], ratio["interval"]) == (pytest.approx(2.5), "nan", "")
    assert float(rows["ppo", "throughput", "mean"]["value"]) == pytest.approx(10.0)
    assert float(rows["ppo", "accuracy, final", "seed 2"]["value"]) == pytest.approx((0.3 + 0.5 + 0.9) / 3)
    assert float(rows["tppo", "accuracy, best", "seed 0"]["value"]) == pytest.approx(1.0)
    assert float(rows["ppo", "occupancy", "mean"]["value"]) == pytest.approx((0.5 * 3 + 3) / 6)  # weighted by decode steps
    clock = [float(rows["tppo", f"clock, {name}", "mean"]["value"]) for name in ("rollout", "forward", "policy", "value", "other")]
    assert clock == pytest.approx([0.6, 0.1, 0.15, 0.1, 0.05])
    assert float(rows["ppo", "length, end, p99", "mean"]["value"]) == pytest.approx(197.0)
    assert float(rows["ppo", "trained tokens", "mean"]["value"]) == pytest.approx(0.9)
    text = (reported / "summary.md").read_text()
    assert "| median 40.0 s, range 30.0 s to never, 2 of 3 seeds |" in text
    assert f"| 11.5 s [{math.exp(ends[1]):.1f} s, {math.exp(ends[2]):.1f} s], 3 of 3 seeds" in text
    assert "| median 5.00x, range 2.50x to infinite, both arrive in 2 of 3 seeds |" in text
    assert "| 0.100 " in text  # the start, the same in every seed
    assert "bootstrap" not in text
    assert "Valid: PPO improved in every seed" in text
    assert "here 0.630." in text


def test_mean_interval_is_students(tmp_path: Path) -> None:
    half = T_2 / math.sqrt(3)
    assert numbers.mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2, 2 - half, 2 + half))
    assert math.isnan(numbers.mean_interval([1.0]).low)


def test_geometric_means_have_students_interval_of_the_logarithms() -> None:
    half = T_2 * math.log(2) / math.sqrt(3)
    assert numbers.geometric([1.0, 2.0, 4.0]) == pytest.approx((2, 2 * math.exp(-half), 2 * math.exp(half)))
    assert math.isnan(numbers.geometric([3.0]).high)


@pytest.mark.parametrize("value", [20.0, 13.7, 1e-3, 0.1, 123_456.0])
@pytest.mark.parametrize("num", [1, 2, 5])
def test_the_geometric_mean_of_one_value_is_that_value_and_has_no_interval(value: float, num: int) -> None:
    mean, low, high = numbers.geometric(iter([np.float64(value)] * num))
    assert mean == value
    assert math.isnan(low)
    assert math.isnan(high)


def test_a_seed_that_needs_no_token_has_arrived() -> None:
    """A mean logarithm there is none: the median of both. A speed-up of 0 says that the other never arrives."""
    row, *_ = report.quantity_rows("tppo", "trained tokens to target", "tokens", {0: 0.0, 1: 20.0})
    assert (row["statistic"], row["value"], row["reached"]) == ("median", 10.0, 2)
    assert report.table_cell(row, 2) == "median 10, range 0 to 20, 2 of 2 seeds"
    row, *_ = report.quantity_rows("tppo", "trained tokens to target", "tokens", {0: 0.0, 1: math.inf})
    assert row["reached"] == 1
    row, *_ = report.quantity_rows("tppo", "speed-up", "x", {0: 0.0, 1: 2.0})
    assert row["reached"] == 1


def test_seeds_that_do_not_all_arrive_have_a_median_and_a_range() -> None:
    """However many there are: an interval of a mean would be of those that arrive alone."""
    assert numbers.typical([4.0, 1.0, 2.0]) == ("geometric mean", numbers.geometric([4.0, 1.0, 2.0]))
    assert numbers.typical([1.0, 2.0, 3.0, math.inf, math.inf]) == ("median", (3.0, 1.0, math.inf))
    assert numbers.typical([1.0, 2.0, math.inf, math.inf, math.inf]) == ("median", (math.inf, 1.0, math.inf))
    assert numbers.typical([0.0, 1.2, 1.3, 1.4]) == ("median", (1.25, 0.0, 1.4))  # a speed-up of 0: the other never arrives
    statistic, alone = numbers.typical([math.inf])
    assert statistic == "median"
    assert math.isnan(alone.low)


def test_an_interval_needs_seeds_that_differ() -> None:
    """Five runs of one base model begin with one accuracy: 0.4 [0.4, 0.4] at 95 % would be made of nothing."""
    same, *_ = report.quantity_rows("ppo", "accuracy, start", "accuracy", dict.fromkeys(range(5), 0.4))
    assert (same["value"], same["interval"]) == (pytest.approx(0.4), "")
    assert math.isnan(same["low"])
    other, *seeds = report.quantity_rows("ppo", "accuracy, start", "accuracy", {3: 0.4, 4: 0.5})
    assert other["interval"] == "95 % t"
    assert [(row["statistic"], row["value"]) for row in seeds] == [("seed 3", 0.4), ("seed 4", 0.5)]


def test_speed_up_of_seeds_that_never_arrive_is_against_the_claim() -> None:
    assert numbers.speed_up(40.0, 10.0) == 4.0
    assert numbers.speed_up(40.0, math.inf) == 0.0
    assert numbers.speed_up(math.inf, math.inf) == 0.0
    assert numbers.speed_up(math.inf, 10.0) == math.inf


def test_void_when_the_first_method_did_not_improve_in_a_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flat = [0.5, 0.4, 0.5, 0.5, 0.5]  # final is the start, no more
    out = make_comparison(tmp_path / "out", {"ppo": [PPO[0], flat, flat], "tppo": TPPO}, first_seed=7)
    report.write_report(out, methods=["ppo", "tppo"], target_share=0.9)
    text = (out / "summary.md").read_text()
    assert text in capsys.readouterr().out
    assert "**Void: PPO did not improve in seeds 8, 9." in text
    assert "Valid" not in text
    assert text.startswith("# Comparison void: PPO did not improve in seeds 8, 9\n")
    swapped = load(out, ["tppo", "ppo"], range(7, 10))  # only the first method has to
    assert swapped.void == ""


def test_void_when_the_target_is_below_the_start(tmp_path: Path) -> None:
    out = make_comparison(tmp_path / "out", {"ppo": [[0.50, 0.51, 0.51, 0.52]]})
    assert load(out, ["ppo"], range(1), share=0.95).void == "the target 0.488 is not above PPO's accuracy at the start, 0.500"
    assert load(out, ["ppo"], range(1), share=1.0).void == ""


def test_a_method_that_never_reaches_the_target_is_told(tmp_path: Path) -> None:
    low = [[0.1, 0.1, 0.1, 0.1, 0.1]] * 3
    out = make_comparison(tmp_path / "out", {"ppo": [PPO[0]] * 3, "tppo": low})
    report.write_report(out, methods=["ppo", "tppo"], target_share=0.9)
    text = (out / "summary.md").read_text()
    assert text.startswith("# PPO reaches 0.63 in 40.0 s (geometric mean of 3 seeds), T-PPO in 0 of 3 seeds\n")
    assert "| never, 0 of 3 seeds " in text
    assert "| 0.00x, both arrive in 0 of 3 seeds " in text


def test_learning_curves_csv_holds_what_was_put_in(reported: Path) -> None:
    rows = read_csv(reported / "learning_curves.csv")
    seed = [r for r in rows if (r["method"], r["line"]) == ("tppo", "seed 1")]
    assert [float(r["train_s"]) for r in seed] == [0, 4, 8, 12, 16]
    assert [float(r["trained"]) for r in seed] == [0, 90, 180, 270, 360]
    assert [float(r["accuracy"]) for r in seed] == pytest.approx([0.1, 0.2, 0.4, 2 / 3, 2.6 / 3])
    mean = [r for r in rows if (r["method"], r["line"]) == ("ppo", "mean")]
    assert [float(r["accuracy"]) for r in mean] == pytest.approx([0.1, 0.2, 0.3, 0.5, 0.7])
    assert [(float(r["train_s"]), float(r["trained"])) for r in mean] == [(0, 0), (10, 90), (20, 180), (30, 270), (40, 360)]
    points = [0.7, 2.5 / 3, 1.7 / 3]
    half = T_2 * np.std(points, ddof=1) / math.sqrt(3)
    assert (float(mean[-1]["low"]), float(mean[-1]["high"])) == pytest.approx((0.7 - half, 0.7 + half))
    crossing = {r["method"]: [float(r[x]) for x in ("train_s", "trained", "accuracy")] for r in rows if r["line"] == "crossing"}
    middle = (8 * 12 * 16) ** (1 / 3)
    assert crossing["tppo"] == pytest.approx([middle, 22.5 * middle, 0.63])
    assert crossing["ppo"] == pytest.approx([40, 360, 0.63])  # a seed never arrives: the median


def test_timeline_csv_is_a_quarter_more_than_a_step_of_the_first_method(reported: Path) -> None:
    rows = [r for r in read_csv(reported / "timeline.csv") if r["method"] == "ppo"]
    assert {(r["seed"], r["from_s"], r["seconds"]) for r in rows} == {("0", "10.0", "12.5")}  # step 2 of 4: 10 s to 20 s
    spans = [(r["kind"], r["slot"], r["response"], float(r["begin_s"]), float(r["stop_s"]), r["end"]) for r in rows]
    assert spans == [
        ("rollout", "", "", 0.0, 6.0, ""), ("training", "", "", 6.0, 10.0, ""), ("rollout", "", "", 10.0, 12.5, ""),
        ("decoding", "0", "20", 0.0, 2.0, "END_TOKEN"), ("decoding", "0", "21", 2.0, 6.0, "RUNNING"),
        ("decoding", "1", "22", 0.0, 6.0, "LENGTH_CAP"), ("decoding", "0", "30", 10.0, 12.0, "END_TOKEN"),
        ("decoding", "0", "31", 12.0, 12.5, "RUNNING"), ("decoding", "1", "32", 10.0, 12.5, "LENGTH_CAP"),
    ]  # fmt: skip
    others = [r for r in read_csv(reported / "timeline.csv") if r["method"] == "tppo"]
    assert {r["seconds"] for r in others} == {"12.5"}


def test_busy_share_counts_decoding_time_only() -> None:
    rows = [{"kind": "rollout", "begin_s": 0.0, "stop_s": 4.0}, {"kind": "training", "begin_s": 4.0, "stop_s": 9.0},
            {"kind": "decoding", "begin_s": 0.0, "stop_s": 4.0}, {"kind": "decoding", "begin_s": 0.0, "stop_s": 1.0}]  # fmt: skip
    assert figures.busy_share(rows, slots=2) == 5 / 8


def test_lengths_csv_holds_shares_and_means_worked_out_by_hand(reported: Path) -> None:
    rows = [r for r in read_csv(reported / "lengths.csv") if r["method"] == "ppo"]

    def line(name: str) -> list[tuple[float, float]]:
        return [(float(r["x"]), float(r["y"])) for r in rows if r["line"] == name]

    assert line("first quarter") == [(10, 1.0), (12, 0.5)]  # three seeds, each with 10 and 12 tokens in step 1 of 4
    assert line("last quarter") == [(40, 1.0), (42, 0.5)]
    assert line("evaluation") == [(0, 20), (10, 21), (20, 22), (30, 23), (40, 24)]
    assert [y for _, y in line("ended responses")] == [11, 21, 31, 41]  # bins without a response are left out
    assert line("share of the generated tokens")[0][1] == pytest.approx(0.9)


def test_evaluations_of_one_step_count_once(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "ppo", 0, [0.1, 0.2, 0.6])
    last = (folder / "metrics.jsonl").read_text().splitlines()[-1]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(last + "\n")
    run = numbers.read_run(tmp_path, "ppo", 0)
    assert run.accuracy.tolist() == [0.1, 0.2, 0.6]


def test_eight_methods_and_one_seed_are_drawn_1200_px_wide(tmp_path: Path) -> None:
    methods = ["ppo", "ppo-dual", "partial-is", "tppo-critic-cut", "tppo", "tppo-zero-cut", "tppo-defer", "tppo-ewma"]
    out = make_comparison(tmp_path / "out", {m: [PPO[0]] for m in methods})
    report.write_report(out, methods=methods, target_share=0.9)
    assert {r["method"] for r in read_csv(out / "timeline.csv")} == {"ppo", "tppo-critic-cut"}
    assert "(one seed)" in (out / "summary.md").read_text()
    for name in ("learning_curves", "timeline", "lengths"):
        header = (out / f"{name}.png").read_bytes()[:24]
        assert header[:8] == b"\x89PNG\r\n\x1a\n"
        assert int.from_bytes(header[16:20], "big") == 1200


def test_one_method_alone_has_a_report(tmp_path: Path) -> None:
    out = make_comparison(tmp_path / "out", {"tppo": TPPO})
    report.write_report(out, methods=["tppo"], target_share=0.9)
    assert "speed-up" not in {r["quantity"] for r in read_csv(out / "summary.csv")}
    assert (out / "timeline.png").exists()


def test_no_timeline_is_drawn_where_none_was_written(three: Path) -> None:
    for path in three.glob("runs/*/timeline.csv"):
        path.write_text("step,slot,response,begin_s,stop_s,tokens,end\n")
    report.write_report(three, methods=["ppo", "tppo"], target_share=0.9)
    assert not (three / "timeline.png").exists()
    assert (three / "lengths.png").exists()


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        ("runs/tppo-seed1/finished", None, "tppo-seed1: got one that is not finished; expected a finished run"),
        ("runs/ppo-seed2/metrics.jsonl", None, "ppo-seed2/metrics.jsonl: got No such file or directory; expected a file"),
        ("runs/ppo-seed2/metrics.jsonl", lambda text: text[:-20], "ppo-seed2/metrics.jsonl: got a last line that is cut off"),
        ("runs/ppo-seed2/metrics.jsonl", lambda text: text + "{\n", "ppo-seed2/metrics.jsonl, line 10: got something else; expected a JSON object"),
        ("runs/ppo-seed2/metrics.jsonl", lambda text: text.replace("eval/length_p99", "x"), "got no number for eval/length_p99 in one evaluation"),
        ("runs/ppo-seed2/metrics.jsonl", lambda text: text.splitlines()[0] + "\n", "expected an evaluation before and after"),
        ("runs/ppo-seed0/responses.csv", lambda text: text[:-3], "ppo-seed0/responses.csv: got a last line that is cut off"),
        ("runs/ppo-seed0/responses.csv", lambda text: text + "9,x,1,1,1,END_TOKEN,1\n", "ppo-seed0/responses.csv, line 10: got '9,x,"),
        ("runs/ppo-seed0/responses.csv", lambda text: text + "9,1.0\n", "ppo-seed0/responses.csv, line 10: got '9,1.0'"),
        ("runs/ppo-seed0/timeline.csv", lambda text: text.replace("begin_s", "b"), "; expected a column begin_s"),
        ("runs/tppo-seed0/config.json", lambda text: "", "tppo-seed0/config.json: got nothing; expected whole lines"),
        ("config.json", None, "out/config.json: got No such file or directory"),
    ],
)  # fmt: skip
def test_a_missing_or_half_written_file_is_named(three: Path, file: str, change, told: str) -> None:
    path = three / file
    if change is None:
        path.unlink()
    else:
        path.write_text(change(path.read_text()))
    with pytest.raises(UserError) as error:
        report.write_report(three, methods=["ppo", "tppo"], target_share=0.9)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_a_seed_that_one_method_lacks_is_an_error(three: Path) -> None:
    (three / "config.json").write_text(json.dumps({"run": {"seed": 0}, "compare": {"seeds": 4}}) + "\n")
    with pytest.raises(UserError, match="ppo-seed3: got nothing; expected a finished run"):
        report.write_report(three, methods=["ppo", "tppo"], target_share=0.9)


def test_importing_the_figures_leaves_the_notebooks_backend_alone() -> None:
    code = "import sys, tppo_ref.runs.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
