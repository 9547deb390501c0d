"""docs/findings.md against its sources: every number, word, command and link; Holm by hand; the early-decision benchmark."""

from __future__ import annotations

import csv
import json
import math
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import bare_numbers
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from benchmarks import ablations, early_decision, equal_tokens, exact_numbers, findings, headline, studies, studies_told
from benchmarks.common import RESULTS
from benchmarks.early_decision import METHODS, World
from sim.__main__ import COMMANDS
from sim.command import parse as parse_options
from sim.lab import instances
from sim.lab.estimators import named
from sim.lab.examination import BiasConfig
from sim.lab.learning import write_csv
from tppo_ref.runs.comparison import holm
from tppo_ref.runs.config import Config
from tppo_ref.runs.parsing import parse

ROOT = Path(__file__).parents[1]
PAGE = findings.PAGE.read_text()
MARKS = list(findings.MARK.finditer(PAGE))
ANSWERS = dict(re.findall(r"^### (\d+)\. (.*?)(?=^### |^## )", PAGE, flags=re.MULTILINE | re.DOTALL))
COMMANDS_OF_PAGE = [line.strip() for line in re.findall(r"^ {4}(python .*)$", PAGE, flags=re.MULTILINE)]
COMMANDS_OF_PAGE += re.findall(r"`(python -m [^`]+)`", PAGE)


# ------------------------------------------------------------------------------------------------------- numbers and sources


def test_every_number_and_word_of_the_page_is_what_its_source_says():
    """All exact ones are computed anew."""
    assert len(MARKS) > 80
    stale = [pair for pair in zip(PAGE.splitlines(), findings.rewrite(PAGE).splitlines(), strict=False) if pair[0] != pair[1]]
    assert not stale, f"run: python -m benchmarks.findings\n{stale}"
    assert findings.rewrite(PAGE) == PAGE
    assert "?<!--" not in PAGE


def test_every_mark_is_read_and_every_source_is_used():
    assert PAGE.count("<!-- ") == len(MARKS) + 2 * len(findings.BLOCKS)
    assert {"exact", "text", "runs", "ratio", "early", "headline"} <= {mark["source"] for mark in MARKS}
    assert set(re.findall(r"<!-- begin (\w+) -->", PAGE)) == set(findings.BLOCKS)


SETTINGS = {"0", "0.005", "0.1", "0.3", "0.95", "1", "2", "2.5", "3", "4", "5", "6", "8", "9", "10", "12", "16", "32", "40", "63", "64", "95", "128",
            "256", "320", "0.70", "1,024", "2,048", "8,192", "30,720"}  # fmt: skip


def test_what_stands_without_a_mark_is_a_setting():
    noise = (r"`[^`]*`", r"^ {4}.*$", r"\]\([^)]*\)", r"^### \d+\.", r"\b[PVs]_?\d\b|δ_0|\b0[2-5]\b|[63]e-4|\b32B|\b8k")
    assert bare_numbers(PAGE, noise) <= SETTINGS, "a number without a mark"


def test_settings_that_the_page_names_are_those_of_the_code():
    config = Config()
    assert equal_tokens.BUDGET == 30_720
    assert ablations.PPO_LR == {"policy.lr": 6e-4}
    assert (config.policy.lr, config.rollout.window, config.rollout.max_response_tokens) == (3e-4, 64, 320)
    assert (config.advantage.cut_value, config.advantage.tail, config.advantage.tail_tokens, config.value.update) == (
        "previous",
        "exclude",
        8,
        "independent",
    )
    assert (early_decision.TARGET, early_decision.LENGTH - 1, early_decision.WINDOW) == (0.70, 63, 8)
    assert exact_numbers.NUM_RANDOM == 40
    of_random = [mark["key"] for mark in findings.MARK.finditer(PAGE) if mark["key"].startswith("random")]
    assert of_random
    assert all("anywhere" in key for key in of_random), "on the forty random MDPs responses begin anywhere in a window"
    assert {r["critic"] for r in findings.table("bound_in_practice")} == {"1024"}
    assert {exact_numbers.estimator(name).lam for name in ("egae", "cut-gae", "egae-defer4", "gae")} == {0.95}
    assert ablations.ARMS["cold-critic-warmup"].fields["value.warmup_steps"] == 10
    assert ablations.ARMS["value-batch-64"].fields["value.batch_responses"] == 64


def test_sentences_that_no_mark_can_hold():
    """What the prose says of numbers that cannot change with new seeds of the text tasks."""
    for name, length in (("calm-chain", 12), ("thinking", 10)):
        assert round(float(exact_numbers.world(name).solution.visits_N.sum())) == length
    for seed in range(0, 40, 8):  # "the exact critic has no error (P2)", "1"
        assert exact_numbers.gradient(f"random-{seed} cut-gae 4 anywhere").relative < 1e-12
    assert exact_numbers.gradient("early-0 gae 64 exact").length == pytest.approx(1, abs=1e-12)
    for rule in ("cut-gae 9", "cut-gae 8", "egae 8"):
        assert exact_numbers.gradient(f"cliff {rule}").relative < 1e-12
    assert exact_numbers.gradient("cliff egae 9").relative == pytest.approx(1, abs=1e-12)
    assert exact_numbers.gradient("cliff egae 9 anywhere").relative == pytest.approx(1 / 9, abs=1e-12)
    assert exact_numbers.gradient("early-0 egae 8 exact anywhere").length == pytest.approx(7 / 8, abs=1e-12)
    assert findings.headline("chain ppo-dual speed-up", "value") < 1
    assert (
        next(
            r for r in findings.table("headline-chain/summary") if r["method"] == "ppo-dual" and r["quantity"] == "time to target"
        )["reached"]
        == "4"
    )
    assert findings.throughput("lengths", "constant:8192", "gain") < 1  # "with equal lengths it loses"
    wins = exact_numbers.exact("random cut-gae:egae 4 anywhere noise:0.3", "wins")
    assert isinstance(wins, int)
    assert stats.binomtest(wins, 40).pvalue > 0.3  # "a draw"
    for key in ("thinking {} 8", "random {} 4 anywhere"):
        tail = {"exclude": "exclude4", "defer": "defer4"} if "thinking" in key else {"exclude": "exclude2", "defer": "defer2"}
        column = "relative" if "thinking" in key else "median"
        defer, none, exclude = (
            exact_numbers.exact(key.format(rule), column) for rule in (f"egae-{tail['defer']}", "egae", f"egae-{tail['exclude']}")
        )
        assert defer < none < exclude


def test_the_critics_batch_is_what_the_page_says():
    assert findings.batches("7 zero area", "verdict") == "worse"  # "it depends on what the critic knows"
    assert findings.batches("7 warm area", "verdict") == "better"
    for start in ("zero", "warm"):
        assert findings.batches(f"6 {start} setback", "verdict") == "equal"  # "no sign of instability"
        assert abs(findings.batches(f"6 {start} area", "difference")[0]) < 0.005  # "a small effect"
    assert findings.batches("7 zero area", "n") == 64


@pytest.mark.parametrize("window", [16, 64])
def test_the_bound_on_text_is_what_the_page_says(window):
    step, mean, lip, gap = (
        abs(findings.bound(f"all 1024 {window} mean", name)) for name in ("step_size", "step_mean", "lip", "gap_mean")
    )
    size, live = (findings.bound(f"all 1024 {window} mean", name) for name in ("gap_size", "live_size"))
    assert step == pytest.approx(live, rel=0.1)  # "no more than over any token"
    assert mean < step / 10  # "holds nearly on average, and on no single row"
    assert lip > 5 * step  # "an upper limit far from what happens"
    assert gap < size / 10
    assert size > step  # "larger than the step's"


def test_early_decision_is_what_the_page_says():
    early = findings.early
    assert early("network zero 0 tokens", "verdict") == "PPO"
    assert early("network zero 0 decode_steps", "verdict") == "T-PPO"
    assert early("network zero 12 decode_steps", "verdict") == "undecided"
    assert (early("network warm 0 tokens", "verdict"), early("network warm 0 decode_steps", "verdict")) == ("undecided", "T-PPO")
    assert early("network warm 0 whole_tokens", "verdict") == "T-PPO"  # what counting whole steps would have said
    assert early("network oracle 12 tokens", "verdict") == "PPO"
    assert early("tabular zero 0 tokens", "ratio")[0] == pytest.approx(1, abs=0.03)
    for quantity in ("tokens", "decode_steps"):  # "token 12 is worse"
        assert early(f"network zero 12 {quantity}", "ratio")[0] < early(f"network zero 0 {quantity}", "ratio")[0]
    assert early("every", "n") >= 5
    assert all(row["reached"] == row["runs"] for row in findings.early_table())
    ended = exact_numbers.exact("early-0 8", "ended")
    assert ended == pytest.approx(1 - 0.95**7)  # the first token ends nothing
    zero = exact_numbers.gradient("early-0 egae 8 zero")
    assert zero.length * zero.cosine == pytest.approx(
        sum(0.05 * 0.95**k * 0.95 ** (k + 1) for k in range(7))
    )  # lambda^k, and p_end


def test_a_number_that_is_wrong_or_has_no_source_is_noticed():
    sentence = '0.0481<!-- exact "calm-chain egae 8" relative .4f -->'
    assert findings.rewrite(sentence) == sentence
    assert findings.rewrite(sentence.replace("0.0481", "0.0482")) == sentence
    for wrong in (
        '1<!-- exact "calm-chain egae 8" relatve .4f -->',
        '1<!-- text "all no-such tppo area" n s -->',
        '1<!-- nowhere "x" y s -->',
    ):
        with pytest.raises(KeyError, match="no such number"):
            findings.rewrite(wrong)


def test_numbers_are_written_as_their_format_says():
    written = findings.written
    assert written((-0.02, -0.03, 0.01), "+.2f") == "-0.02 [-0.03, +0.01]"
    assert [written(0.294, "%"), written(-0.0001, ".2f"), written(None, "s"), written("worse", "s"), written(1.5, ".2f")] == [
        "29",
        "0.00",
        "no",
        "worse",
        "1.50",
    ]
    for text in ("-0.02 [-0.03, +0.01]", "undecided", "T-PPO", "?", "1,024", "+0.3"):
        assert findings.MARK.fullmatch(f'{text}<!-- text "x y" z s -->')["value"] == text


# --------------------------------------------------------------------------------------------------------------- statistics


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == [True, False, False]  # 0.01 <= 0.05/3, 0.03 > 0.05/2: stop
    assert holm([0.04, 0.01, 0.02]) == [True, True, True]  # 0.01 <= 0.05/3, 0.02 <= 0.05/2, 0.04 <= 0.05
    assert holm([0.05, math.nan]) == [False, False]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
@settings(deadline=None, max_examples=50)
def test_holm_lies_between_bonferroni_and_no_correction(p):
    falls = holm(p)
    assert all(fall for fall, x in zip(falls, p, strict=True) if x <= 0.05 / len(p))
    assert not any(fall for fall, x in zip(falls, p, strict=True) if x > 0.05)


def test_holms_verdicts_are_a_part_of_the_plain_ones():
    rows = findings.text_rows().values()
    assert all(row["holm"] in (row["verdict"], "undecided") for row in rows)
    smallest = min(rows, key=lambda row: float(row["p"]))
    assert (smallest["holm"] != "undecided") == (float(smallest["p"]) <= 0.05 / len(rows))


def test_equal_is_no_interval_without_0_unless_it_is_one(monkeypatch):
    """Of four rows: better; equal and beside 0; equal around 0; undecided. "plain" counts intervals without 0."""
    of = [("better", 0.001, "better"), ("equal", 0.04, "undecided"), ("equal", 0.5, "undecided"), ("undecided", 0.3, "undecided")]
    rows = {str(n): {"verdict": v, "p": str(p), "holm": h, "arm": "x", "n": "5"} for n, (v, p, h) in enumerate(of)}
    monkeypatch.setattr(findings, "text_rows", lambda: rows)
    assert [findings.text("every", column) for column in ("plain", "holm", "strawman", "tests", "seeds")] == [2, 1, 0, 4, 5]


def test_the_committed_summary_is_that_of_the_committed_runs():
    rows, others = equal_tokens.read_whole(findings.RESULTS / "ablations.csv")
    assert not others
    fresh = ablations.summary(rows, equal_tokens.BUDGET)
    committed = findings.table("ablations_summary")
    assert [{name: str(value) for name, value in row.items()} for row in fresh] == [
        {name: row[name] for name in fresh[0]} for row in committed
    ]


# ------------------------------------------------------------------------------------------------- questions, commands, links


def test_all_ten_questions_have_an_answer():
    assert list(ANSWERS) == [str(n) for n in range(1, 11)]


@pytest.mark.parametrize("number", [str(n) for n in range(1, 11)])
def test_an_answer_is_one_bold_line_with_a_number_its_interval_a_command_and_an_objection(number):
    question, bold, commands, objection, rest = ANSWERS[number].strip().split("\n\n", 4)
    assert question.endswith("?")
    assert re.fullmatch(r"\*\*[^*\n]+\*\*", bold), "one line, all of it bold"
    assert len(findings.MARK.sub("number", bold).split()) <= 70
    assert 1 <= sum(mark["form"] != "s" for mark in findings.MARK.finditer(bold)) <= 3, (
        "a line can carry three numbers, beside counts"
    )
    assert any(re.search(r"\[[-+\d.]+, [-+\d.]+\]", mark["value"]) for mark in findings.MARK.finditer(bold)), "an interval"
    assert all(line.startswith("    python -m ") for line in commands.splitlines())
    assert set(map(str.strip, commands.splitlines())) <= set(COMMANDS_OF_PAGE)
    assert re.fullmatch(r"\*Objection:\* [^\n]+? \*(Answered in part|Granted|Granted, and open|Open)\.\* [^\n]+", objection)
    assert rest.startswith("<details markdown><summary>In full</summary>\n\n")  # blank lines: Markdown inside, here and on GitHub
    assert rest.endswith("\n\n</details>")


def test_what_it_says_of_long_runs_in_words():
    text = " ".join(PAGE.split())
    rows = {number: studies_told.study(f"long {number}", "difference") for number in (1, 2, 3)}
    assert "they end within 0.02 of each other, PPO against T-PPO" in text
    assert max(map(abs, rows[1])) < 0.02
    assert "nothing is left to see at the end" in text
    assert {studies_told.study(f"long {number}", "verdict") for number in rows} == {"undecided"}  # index.md: each undecided
    assert "with ten times the tokens, where a tenth or less had been expected" in text
    short = findings.text("all cold-critic-warmup tppo final", "difference")[0]
    assert max(map(abs, rows[3])) < abs(short) / 10


def test_what_it_says_of_rules_on_text_in_words():
    text = " ".join(PAGE.split())
    assert "So few seeds tell none from T-PPO's; even `zero`, which is worse in both factorials, is not told apart here" in text
    rows = studies_told.study_table("cut-rules")
    assert {row["verdict"] for row in rows} == {"undecided"}
    assert [studies_told.study(f"{name} 4", "verdict") for name in ("factorial", "new-tasks")] == ["worse", "worse"]
    names = re.findall(r"`([a-z-]+)` [-+][^;`]*?<!-- study \"cut-rules (\d)\" difference", PAGE)
    assert [(f"{name} - previous", int(number)) for name, number in names] == [(r["contrast"], n) for n, r in enumerate(rows, 1)]


def test_the_strawman_and_the_largest_of_the_others_are_those_that_the_answer_names():
    decided = [r for r in findings.text_rows().values() if r["holm"] != "undecided"]
    others = [r for r in decided if r["arm"] != "cold-critic-warmup" and r["metric"] == "area"]
    largest = max(others, key=lambda r: abs(float(r["mean_difference"])))
    assert (largest["task"], largest["arm"], largest["base"]) == ("fork", "window-16", "tppo")
    assert ablations.ARMS["cold-critic-warmup"].fields["value.warmup_steps"] > findings.runs("all cold-critic-warmup", "steps") / 2


def test_only_contrasts_of_whole_studies_count_and_undecided_is_not_decided(monkeypatch):
    verdicts = {"factorial": ["better", "undecided", "equal"], "edge": ["not yet"], "bases": ["worse"]}
    monkeypatch.setattr(studies_told, "study_table", lambda name: [{"verdict": verdict} for verdict in verdicts.get(name, [])])
    assert (studies_told.study("whole", "contrasts"), studies_told.study("whole", "decided")) == (4, 3)


def test_losing_choices_are_named_with_their_flags():
    flags = set(re.findall(r"`--([a-z_.]+ [a-z]+)`", PAGE))
    assert flags == {"advantage.cut_value critic", "advantage.tail defer"}
    for flag in flags:
        parse(Config, [f"--{flag.split()[0]}", flag.split()[1]], prog="train")


@pytest.mark.parametrize("command", sorted(set(COMMANDS_OF_PAGE)))
def test_every_command_exists_and_parses(command, capsys):
    _, dash_m, module, *words = shlex.split(command)
    assert dash_m == "-m"
    if module == "sim":
        assert words[0] in COMMANDS
        if words[0] == "bias":
            config = parse_options(BiasConfig, words[1:], command="bias", description="")
            assert {named(name) for name in config.estimators}
            instances.load(config.instance)
        else:
            assert words == ["throughput"]
        return
    package, name = module.split(".")
    assert package == "benchmarks"
    if name == "ablations":
        ablations.parse_arguments(words)
        return
    source = (ROOT / package / f"{name}.py").read_text()
    assert all(f'"{word}"' in source for word in words if word.startswith("--"))
    if name == "headline":
        assert words in ([], ["--tasks", "chain"])
    elif name in ("studies", "factorial"):
        assert command in studies.COMMANDS.values()
    else:
        assert name in ("findings", "early_decision", "cut_rules", "critic_batches", "bound_in_practice", "fair_headline")
        assert words in ([], ["--check"] if name == "findings" else [])


def test_every_link_leads_somewhere():
    for link, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", PAGE):
        target = findings.PAGE.parent / link if link else findings.PAGE
        assert target.exists(), link
        heads = (
            [
                re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-")
                for h in re.findall(r"^#+ (.*)$", target.read_text(), flags=re.MULTILINE)
            ]
            if anchor
            else []
        )
        assert not anchor or anchor in heads, anchor


def test_ratios_of_the_headline_are_geometric_means_with_t_intervals_over_its_seeds():
    with (RESULTS / "headline-chain" / "summary.csv").open(newline="") as file:
        seeds = [r for r in csv.DictReader(file) if r["statistic"].startswith("seed ")]
    need = {
        m: [float(r["value"]) for r in seeds if (r["method"], r["quantity"]) == (m, "tokens to target")] for m in ("ppo", "tppo")
    }
    mean = math.prod(b / a for a, b in zip(need["ppo"], need["tppo"], strict=True)) ** (1 / len(need["ppo"]))
    assert findings.headline("chain tppo trained tokens to target", "ratio")[0] == pytest.approx(mean)
    share = [float(r["value"]) for r in seeds if (r["method"], r["quantity"]) == ("tppo", "trained tokens")]
    generated = mean / math.prod(share) ** (1 / len(share))  # PPO trains every token that it generates
    assert findings.headline("chain tppo generated tokens to target", "ratio")[0] == pytest.approx(generated)


def test_what_the_page_says_of_four_base_models_and_of_spread_edges():
    """Equal by the plan, and just not by seeds alone; a ninth of the loss with every edge at the deciding token; 0 to fall on cliff."""
    (first, critic), text = studies_told.study_table("bases"), " ".join(PAGE.split())
    assert "happen to lie closer to each other than seeds alone let expect" in text
    assert critic["seeds_high"] - critic["seeds_low"] > critic["high"] - critic["low"]
    assert "and just not equal" in text
    assert 0.005 < critic["seeds_high"] < 0.0055
    assert "whether verdicts hang on the base model cannot be told from so few" in text
    assert first["between_high"] > abs(first["difference"])
    assert "(a ninth of the loss would be 0.04)" in text
    assert round(studies_told.study("edge 3", "difference")[0] / 9, 2) == 0.04
    assert "(on the cliff no arm falls at all)" in text
    falls = [r for r in findings.batch_table() if (r["world"], r["score"]) == ("cliff", "setback")]
    assert {(r["mean"], r["difference"]) for r in falls} == {(0, 0)}
    sides = [
        findings.batches(f"6 zero area {world}", "difference")[1:]
        for world in ("calm-chain", "cliff", "early-decision", "thinking")
    ]
    assert [(low > 0) - (high < 0) for low, high in sides] == [1, -1, -1, 0]


def test_what_question_10_says_of_five_pairs_and_many_tests():
    tests, pairs = findings.text("every", "tests"), findings.text("every", "seeds")
    assert "about seven would have with no effect at all" in PAGE
    assert round(0.05 * tests) == 7
    assert "some eleven standard errors large to pass it first" in PAGE
    assert round(stats.t.ppf(1 - 0.05 / tests / 2, pairs - 1)) == 11


def test_pre_training_takes_nearly_as_many_tokens_as_a_run():
    """What the objection to question 5 says, and that the page says how many responses it takes."""
    config = Config()
    lengths = [findings.runs(f"{task} tppo", "length_mean") for task in ("chain", "fork", "length")]
    tokens = config.value.pretrain_responses * sum(lengths) / len(lengths)
    assert 0.75 < tokens / equal_tokens.BUDGET < 1
    assert (
        f"the {config.value.pretrain_responses:,} responses that it samples are nearly as many tokens as a whole run generates"
        in PAGE
    )


def test_what_the_page_says_of_the_factorials_critics():
    """Where strong and weak differ, and that few of the sampled responses are fitted."""
    knows = {f"{task} {critic}": studies_told.critics(f"{task} {critic}", "explained")
             for task in ("chain", "fork", "maze", "brackets") for critic in ("weak", "strong")}  # fmt: skip
    assert "those of fork and brackets explain nothing" in PAGE
    assert max(knows["fork strong"], knows["brackets strong"]) < 0.005
    assert "So it speaks on one of the two tasks of each study" in PAGE
    assert {task for task in ("chain", "fork", "maze", "brackets") if knows[f"{task} strong"] > 0.05} == {"chain", "maze"}
    assert knows["chain strong"] > knows["chain weak"]
    assert knows["maze strong"] > knows["maze weak"]
    assert "with the settings that were tuned on chain" in PAGE  # headline.main reads sweep-chain.csv, whatever the task
    for task in ("chain", "fork"):
        made = json.loads((RESULTS / f"headline-{task}" / "provenance.json").read_text())
        for method, cell in headline.best_settings(RESULTS / "sweep-chain.csv").items():
            assert cell.items() <= made["settings"][method].items(), (task, method)


def test_the_readme_says_the_same_of_the_headline_and_of_equal_tokens():
    """Its numbers are marked (benchmarks.front_page); here what it says of them in words."""
    text = " ".join((findings.PAGE.parents[1] / "README.md").read_text().split())
    by_task = {task: float(findings.text(f"{task} ppo tppo area", "difference")[0]) for task in ("fork", "length", "chain")}
    assert "At equal tokens PPO is ahead on `fork` and `length`" in text
    assert min(by_task["fork"], by_task["length"]) > 0 > by_task["chain"]
    assert "and a loss where answers are long or alike" in text
    assert findings.throughput("lengths", "constant:8192", "gain") < 1
    assert findings.throughput("slots", "math-mixture, 2048", "gain") < 1


# --------------------------------------------------------------------------------------------------------- the early decision


def rows(world: World, ours, theirs, reached=1) -> list[dict]:
    pairs = [("tppo", x) for x in ours] + [("ppo-dual", x) for x in theirs]
    return [
        {
            **world._asdict(),
            "method": m,
            "seed": i,
            "tokens": x,
            "decode_steps": 2 * x,
            "whole_tokens": x,
            "whole_decode_steps": x,
            "reached": reached,
        }
        for i, (m, x) in enumerate(pairs)
    ]


def test_the_ratio_is_that_of_geometric_means_and_its_interval_is_welchs():
    middle, low, high = early_decision.ratio([100, 200, 400], [400, 800, 1600])
    assert middle == pytest.approx(4)
    spread = np.var(np.log([1, 2, 4]), ddof=1)  # of both, so that Welch's degrees of freedom are 4
    half = stats.t.ppf(0.975, 4) * math.sqrt(2 * spread / 3)
    assert (low, high) == pytest.approx((4 * math.exp(-half), 4 * math.exp(half)))
    assert all(math.isnan(x) for x in early_decision.ratio([100], [200])[1:])


def test_where_a_run_reaches_the_target_is_interpolated_between_its_last_two_steps():
    def record(mean_return, tokens):
        return SimpleNamespace(mean_return=mean_return, tokens=tokens)

    assert early_decision.at_target(record(0.6, 1000), record(0.8, 2000), "tokens") == pytest.approx(1500)
    assert early_decision.at_target(record(0.65, 1000), record(0.85, 2000), "tokens") == pytest.approx(1250)
    assert early_decision.at_target(record(0.6, 1000), record(0.69, 2000), "tokens") == 2000


def test_the_table_says_who_needs_less_and_nothing_where_a_run_never_arrives():
    world = early_decision.WORLDS[0]
    tokens, steps, *_ = early_decision.table(rows(world, [100, 101, 99], [300, 301, 299]))
    assert (tokens["verdict"], steps["verdict"], tokens["n"]) == ("T-PPO", "T-PPO", 3)
    assert tokens["ratio"] == pytest.approx(3, rel=0.01)
    assert early_decision.table(rows(world, [300, 301], [100, 101]))[0]["verdict"] == "PPO"
    lost = early_decision.table(rows(world, [100, 101], [300, 301], reached=0))[0]
    assert (lost["verdict"], lost["reached"], lost["runs"]) == ("undecided", 0, 4)
    assert math.isnan(lost["ratio"])
    assert early_decision.table(rows(world, [1], [])) == []


def test_a_stopped_command_goes_on_and_a_torn_line_is_made_again(tmp_path, monkeypatch, capsys):
    path, made = tmp_path / "early.csv", []

    def fake(world, method, seed):
        made.append((world, method, seed))
        return {**rows(world, [100 + seed], [])[0], "method": method, "seed": seed}

    monkeypatch.setattr(early_decision, "run", fake)
    assert early_decision.main(["--seeds", "1", "--out", str(path)]) == 0
    assert len(made) == len(early_decision.WORLDS) * len(METHODS)
    with path.open("a") as file:
        file.write("network,zero,0,tp")
    made.clear()
    assert early_decision.main(["--seeds", "2", "--out", str(path)]) == 0
    assert {seed for *_, seed in made} == {1}
    assert len(early_decision.read(path)) == 2 * len(early_decision.WORLDS) * len(METHODS)
    made.clear()
    early_decision.main(["--seeds", "2", "--out", str(path)])
    assert not made
    assert "n = 2" in capsys.readouterr().out


def test_a_real_run_is_the_same_twice_and_reaches_the_target(tmp_path):
    world = World("tabular", "oracle", 0)
    first = early_decision.run(world, "tppo", 0)
    assert first == early_decision.run(world, "tppo", 0)
    assert first["reached"] == 1
    assert first["whole_decode_steps"] == early_decision.WINDOW * first["steps"]
    assert first["whole_decode_steps"] - early_decision.WINDOW < first["decode_steps"] <= first["whole_decode_steps"]
    assert first["whole_tokens"] == 32 * first["whole_decode_steps"]  # every slot is busy at every decode step
    write_csv(tmp_path / "one.csv", [first])
    (read,) = early_decision.read(tmp_path / "one.csv")
    assert early_decision.key(read) == early_decision.key(first)


def test_the_committed_runs_are_whole_and_balanced():
    committed = early_decision.read(early_decision.PATH)
    keys = {early_decision.key(row) for row in committed}
    seeds = {key[-1] for key in keys}
    assert len(keys) == len(committed) == len(early_decision.WORLDS) * len(METHODS) * len(seeds)
    assert all(row["target"] == early_decision.TARGET for row in committed)
