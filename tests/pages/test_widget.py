"""The widget of docs/widget/ in a real browser: its formulas against the library's and the laboratory's, and its controls by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import serve
from selenium import webdriver

from sim.lab import instances
from sim.lab.bias import conditional_moments
from sim.lab.bounds import cut_bound
from sim.lab.critics import critic
from sim.lab.estimators import Estimator
from sim.lab.rollouts import Rollouts
from sim.lab.unrolled import ENDED
from tppo_ref.method.advantages import egae, gae
from tppo_ref.method.masks import policy_token_mask, value_token_mask

WIDGET = Path(__file__).resolve().parents[2] / "docs" / "widget"
LAWS = (WIDGET / "laws.js").read_text()
RULES = ("previous", "critic", "zero", "none")
TOLERANCE = 1e-9


@pytest.fixture(name="page")
def _page(browser: Any) -> Any:
    """The widget at its start values, 1,000 pixels wide, light."""
    show(browser, 1000, 900)
    return browser


def show(driver: Any, width: int, height: int, *, dark: bool = False) -> None:
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    driver.get((WIDGET / "index.html").as_uri())


def ask(driver: Any, cases: list[Any], function: str, source: str = LAWS) -> list[Any]:
    """`function`, JavaScript that takes one case and may use `laws`, of every case."""
    script = f"{source}; const f = {function}; return JSON.stringify(JSON.parse(arguments[0]).map(f));"
    return json.loads(driver.execute_script(script, json.dumps(cases)))


# ------------------------------------------------------------------------------------------------------------- advantages


def unit(rng: np.random.Generator) -> float:
    """In [0, 1], the ends included now and then."""
    return float(rng.choice([0.0, 1.0, rng.uniform(), rng.uniform(0.9, 1)], p=[0.1, 0.2, 0.3, 0.4]))


def rows(num: int = 400) -> list[dict[str, Any]]:
    rng = np.random.default_rng(16)
    return [
        {"rewards": rng.normal(size=T).tolist(), "values": rng.normal(size=T).tolist(), "gamma": unit(rng), "lam": unit(rng),
         "cutValue": str(rng.choice(RULES)), "lastValue": float(rng.normal())}
        for T in rng.integers(1, 60, size=num)
    ]  # fmt: skip


def advantages_of(case: dict[str, Any]) -> np.ndarray:
    """The library's."""
    rewards_BT, values_BT = (torch.tensor([case[name]], dtype=torch.float64) for name in ("rewards", "values"))
    run, rates = (rewards_BT, values_BT, torch.ones_like(rewards_BT, dtype=torch.bool)), {k: case[k] for k in ("gamma", "lam")}
    if case["cutValue"] == "none":
        return gae(*run, **rates)[0].numpy()
    last_B = torch.tensor([case["lastValue"]], dtype=torch.float64) if case["cutValue"] == "critic" else None
    return egae(*run, torch.tensor([True]), **rates, cut_value=case["cutValue"], last_value_B=last_B)[0].numpy()


def furthest(browser: Any, source: str = LAWS) -> float:
    cases = rows()
    found = ask(browser, cases, "c => laws.egae(c.rewards, c.values, c)", source)
    return max(float(np.abs(np.array(a) - advantages_of(c)).max()) for a, c in zip(found, cases, strict=True))


def test_advantages_are_egaes_on_400_drawn_rows(browser):
    assert furthest(browser) < TOLERANCE
    assert {case["cutValue"] for case in rows()} == set(RULES)
    assert {0.0, 1.0} <= {case["lam"] for case in rows()}


def test_who_trains_is_what_the_masks_say(browser):
    cases = [{"sampled": n, "cut": cut, "tail": tail} for n in range(1, 12) for cut in (True, False) for tail in range(12)]
    found = ask(browser, cases, "c => laws.whoTrains(c.sampled, c.cut, c.tail)")
    for case, who in zip(cases, found, strict=True):
        row_BT, cut_B = torch.ones(1, case["sampled"], dtype=torch.bool), torch.tensor([case["cut"]])
        assert who["policy"] == policy_token_mask(row_BT, torch.tensor([0]), cut_B, skip_tail=case["tail"])[0].tolist()
        assert who["value"] == value_token_mask(row_BT, ~cut_B)[0].tolist()


# ---------------------------------------------------------------------------------------------------------- bias and bound


def as_nodes(mdp: Any, policy_NA: np.ndarray) -> list[dict[str, Any]]:
    """A token MDP of the laboratory in the widget's form."""
    nodes: list[dict[str, Any]] = [{"depth": int(d), "tokens": [None] * mdp.num_tokens} for d in mdp.depth_N]
    for n, a, prob, reward, to in zip(mdp.node_E, mdp.token_E, mdp.prob_E, mdp.reward_E, mdp.next_E, strict=True):
        token = nodes[n]["tokens"][a] or {"prob": float(policy_NA[n, a]), "outcomes": []}
        token["outcomes"].append({"prob": float(prob), "reward": float(reward), "next": None if to == ENDED else int(to)})
        nodes[n]["tokens"][a] = token
    return nodes


def at_random(num: int) -> Iterator[tuple[Rollouts, np.ndarray, int, float]]:
    """Random MDPs, any reward on the way, each with a critic that is wrong at random, a cut and a lambda."""
    rng = np.random.default_rng(4)
    for seed in range(num):
        mdp, policy_NA, _ = instances.random(
            seed=seed, outcomes=1 + seed % 2, max_tokens=5, gamma=unit(rng), every_token=bool(seed % 3)
        )
        rollouts = Rollouts(mdp, policy_NA)
        wrong_N = rollouts.solution.value_N + rng.normal(scale=rng.choice([0, 0.3, 1.0]), size=mdp.num_nodes)
        yield rollouts, wrong_N, int(rng.integers(1, mdp.max_tokens)), unit(rng)


EXACT = """c => { const s = laws.solve(c.nodes, c.gamma);
  return {value: s.value, visits: s.visits, advantage: s.advantage, mean: laws.expected(c.nodes, c.critic, c), bound: laws.bound(c.nodes, c.critic, c)}; }"""


def furthest_in_expectation(browser: Any, num: int, source: str = LAWS) -> dict[str, float]:
    """Largest difference between the page's numbers and the laboratory's, by name."""
    worlds = [(*world, rule) for world in at_random(num) for rule in RULES]
    cases = [{"nodes": as_nodes(r.mdp, r.policy_NA), "critic": c.tolist(), "cut": cut, "gamma": r.mdp.gamma, "lam": lam, "cutValue": rule}
             for r, c, cut, lam, rule in worlds]  # fmt: skip
    largest = dict.fromkeys(("value", "visits", "advantage", "mean", "bound"), 0.0)
    for (rollouts, critic_N, cut, lam, rule), found in zip(worlds, ask(browser, cases, EXACT, source), strict=True):
        moments = conditional_moments(rollouts, critic_N, Estimator(cut_value=rule, lam=lam), cut)
        solution, bound = rollouts.solution, np.zeros_like(moments.mean_NA)
        if rule != "none":
            bound = cut_bound(rollouts, critic_N, cut, lam=lam, cut_value=rule)
        before = (rollouts.mdp.depth_N < cut)[:, None] & rollouts.mdp.legal_NA
        theirs = {
            "value": solution.value_N,
            "visits": solution.visits_N,
            "advantage": solution.advantage_NA,
            "mean": moments.mean_NA,
            "bound": bound,
        }
        for name, expected in theirs.items():
            mine = np.array(found[name], dtype=float)
            chosen = before if name in ("mean", "bound") else rollouts.mdp.legal_NA if name == "advantage" else slice(None)
            largest[name] = max(largest[name], float(np.abs(mine - expected)[chosen].max()))
    return largest


def test_bias_bound_and_truth_are_sims_on_60_random_mdps_under_every_rule(browser):
    found = furthest_in_expectation(browser, 60)
    assert all(difference < TOLERANCE for difference in found.values()), found


@pytest.mark.parametrize(("right", "wrong"), [
    ("previous, critic: own", "previous: own, critic: own"), ("gamma * lam * next;", "lam * next;"), ("own, zero: 0", "own, zero: previous"),
])  # fmt: skip
def test_a_slip_in_the_advantages_is_noticed(browser, right, wrong):
    assert LAWS.count(right) == 1
    assert furthest(browser, LAWS.replace(right, wrong)) > 1e-3


@pytest.mark.parametrize(("right", "wrong", "name"), [
    ("o.next === null || isCut ? 0", "o.next === null ? 0", "mean"), ("cut - nodes[n].depth - 1", "cut - nodes[n].depth", "bound"),
    ("previous: largestStep", "previous: largestValue", "bound"), ("(gamma * (1 - lam)) / (1 - gamma * lam)", "(1 - lam) / (1 - gamma * lam)", "bound"),
])  # fmt: skip
def test_a_slip_in_the_exact_numbers_is_noticed(browser, right, wrong, name):
    assert LAWS.count(right) == 1
    assert furthest_in_expectation(browser, 12, LAWS.replace(right, wrong))[name] > 1e-3


@pytest.mark.parametrize(("name", "build"), [
    ("cliff", lambda gamma: instances.decision(length=24, at=12, p_good=0.7, gamma=gamma)),
    ("calm chain", lambda gamma: instances.calm_chain(length=24, gamma=gamma)),
    ("thinking", lambda gamma: instances.thinking(length=24, gamma=gamma)),
])  # fmt: skip
def test_the_three_worlds_and_the_kinds_of_error_are_sims(browser, name, build):
    cases = [{"name": name, "gamma": gamma, "size": size} for gamma in (1.0, 0.9) for size in (-0.4, 0.0, 0.25)]
    found = ask(
        browser,
        cases,
        """c => { const nodes = laws.WORLDS[c.name](), s = laws.solve(nodes, c.gamma);
      return {...s, depth: nodes.map(n => n.depth), ...Object.fromEntries(Object.entries(laws.ERRORS).map(([k, f]) => [k, f(nodes, s.value, c.size)]))}; }""",
    )
    for case, page in zip(cases, found, strict=True):
        mdp, policy_NA, _ = build(case["gamma"])
        solution = mdp.solve(policy_NA)
        theirs = {"depth": mdp.depth_N, "value": solution.value_N, "visits": solution.visits_N,
                  "drift": critic(f"drift:{case['size']}", mdp, solution), "shrunk": critic(f"shrunk:{1 - case['size']}", mdp, solution),
                  "rough": solution.value_N + case["size"] * (-1.0) ** mdp.depth_N}  # fmt: skip
        for what, numbers in theirs.items():
            np.testing.assert_allclose(page[what], numbers, rtol=0, atol=TOLERANCE, err_msg=what)


# ------------------------------------------------------------------------------------------------------------ the page itself


def table(page: Any) -> list[list[str]]:
    """The numbers that the page shows."""
    script = "return [...document.querySelectorAll('#numbers tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    return page.execute_script(script)


def press(page: Any, name: str, *keys: str) -> None:
    """Keys as a reader without a mouse would press them."""
    element = page.find_element("css selector", name)
    page.execute_script("arguments[0].focus()", element)
    for key in keys:
        page.switch_to.active_element.send_keys(key)


LEFT, RIGHT, DOWN, HOME, TAB = "\ue012", "\ue014", "\ue015", "\ue011", "\ue004"


def number(text: str) -> float:
    return float(text.replace("−", "-"))


def test_what_the_table_shows_is_what_sim_says_at_the_start_and_after_keys(page):
    """The cliff, cut behind the deciding token; then the critic's own word, an earlier cut and a critic that drifts, by keyboard."""

    def shown(cut: int, rule: str, size: float) -> None:
        rollouts = Rollouts(*instances.decision(length=24, at=12, p_good=0.7)[:2])
        critic_N = critic(f"drift:{size}", rollouts.mdp, rollouts.solution)
        mean_NA, whole_NA = (
            conditional_moments(rollouts, critic_N, Estimator(cut_value=r, lam=0.95), cut).mean_NA for r in (rule, "none")
        )
        bound_NA = cut_bound(rollouts, critic_N, cut, lam=0.95, cut_value=rule)
        for t, row in enumerate(table(page)[:cut]):  # up to the deciding token there is one node a depth
            n = int(np.flatnonzero(rollouts.mdp.depth_N == t)[0])
            assert number(row[5]) == pytest.approx(abs(mean_NA - whole_NA)[n, 0], abs=5.1e-4)
            assert number(row[6]) == pytest.approx(bound_NA[n, 0], abs=5.1e-4)
        assert table(page)[cut][3] == "", "beyond the cut nobody is told anything"

    shown(13, "previous", 0.0)
    press(page, "[value=previous]", DOWN)
    press(page, "#cut", *[LEFT] * 4)
    press(page, "#size", *[RIGHT] * 4)
    shown(9, "critic", 0.2)
    assert "Cut after 9 tokens" in page.find_element("css selector", "#said").text


def test_every_control_has_a_name_and_is_reached_by_tab(page):
    page.execute_script("document.body.focus()")
    reached = []
    for _ in range(20):
        page.switch_to.active_element.send_keys(TAB)
        reached.append(
            page.execute_script(
                "const e = document.activeElement; return [e.tagName, e.id || e.name, e.labels && e.labels.length ? [...e.labels].map(l => l.textContent).join('').trim() : e.textContent]"
            )
        )
    names = [name for _, name, _ in reached]
    controls = ["cutValue", "cut", "lam", "gamma", "size", "error", "tail", "world", "right"]
    assert [name for name in names if name in controls][: len(controls)] == controls
    operable = [(tag, text) for tag, _, text in reached if tag in ("INPUT", "SELECT", "BUTTON", "SUMMARY", "A")]
    assert {tag for tag, _ in operable} >= {"INPUT", "SELECT", "BUTTON", "SUMMARY"}
    assert all(text for _, text in operable), operable


def test_dragging_on_a_picture_moves_the_cut(page):
    svg = page.find_element("css selector", "#advantages")
    actions = webdriver.ActionChains(page)
    actions.move_to_element_with_offset(svg, 0, 0).click_and_hold().move_by_offset(-120, 5).release().perform()
    box = page.execute_script("const b = arguments[0].getBoundingClientRect(); return [b.left, b.width]", svg)
    expected = round((box[1] / 2 - 120 - 34) / (box[1] - 40) * 20)
    assert page.execute_script("return document.getElementById('cut').value") == str(expected)
    assert sum(row[3] != "" for row in table(page)) == expected


def test_a_row_that_ends_at_the_edge_is_not_cut_and_trains_both_models(page):
    press(page, "#cut", *[RIGHT] * 7)
    assert [row[7:] for row in table(page)] == [["trains", "trains"]] * 20
    assert all(row[3] == row[4] for row in table(page))
    press(page, "#cut", LEFT)
    assert [row[7:] for row in table(page)[16:]] == [
        ["trains", "later: the response still runs"],
        *[["tail: left out", "later: the response still runs"]] * 2,
        ["not sampled yet"] * 2,
    ]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_is_whole_on_a_telephone_and_on_a_desk_in_both_schemes(browser, width, dark):
    show(browser, width, 844, dark=dark)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script(
        "return [...document.querySelectorAll('figure > svg')].every(s => s.clientHeight > 50 && s.querySelector('title').textContent.length > 20)"
    )
    small = "return [...document.querySelectorAll('.pictures *, .knobs *')].filter(e => e.textContent.trim() && parseFloat(getComputedStyle(e).fontSize) < 11).length"
    assert browser.execute_script(small) == 0
    ink, paper = (brightness(browser, name) for name in ("color", "backgroundColor"))
    assert (paper < 60 < 180 < ink) if dark else (ink < 60 < 180 < paper)
    assert [line for line in browser.get_log("browser") if line["level"] == "SEVERE"] == []


def brightness(driver: Any, name: str) -> float:
    text = driver.execute_script(f"return getComputedStyle(document.body).{name}")
    return float(np.mean([float(x) for x in text[4:-1].split(",")[:3]]))


def test_inside_a_page_of_the_site_its_scheme_counts(browser, tmp_path):
    """Material's way of saying it, on the body of the page around."""
    for name in ("index.html", "laws.js", "widget.js", "widget.css"):
        (tmp_path / name).write_text((WIDGET / name).read_text())
    (tmp_path / "around.html").write_text("<body data-md-color-scheme=slate><iframe src=index.html width=900 height=900></iframe>")
    for address in serve(tmp_path):
        show(browser, 1000, 900)
        browser.get(f"{address}/around.html")
        inside = "return getComputedStyle(document.querySelector('iframe').contentDocument.documentElement).getPropertyValue('--page').trim()"
        assert browser.execute_script(inside) == "#16181d"
        browser.execute_async_script("document.body.dataset.mdColorScheme = 'default'; setTimeout(arguments[0], 50)")
        assert browser.execute_script(inside) == "#ffffff"
