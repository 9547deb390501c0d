"""What became of every token, and the metrics of a step that come from counting.

Conservation: at every step, over all ranks,

    generated = trained + excluded (tail, value warm-up) + pending (deferred, or trained when the response or its group ends)

docs/algorithm.md, "Conservation". The books are held on the records: `Response.num_settled` is the first column that the policy has
yet to see.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tppo_ref.loop.parallel import Parallel, per
from tppo_ref.loop.rows import Rows
from tppo_ref.method.records import End, Response, WindowSlice
from tppo_ref.rollout.batcher import Batcher
from tppo_ref.rollout.turns import num_observed

OUTCOMES = ("trained", "excluded_tail", "excluded_warmup")


class Ledger:
    """This rank's books over a run.

    tokens       response tokens by what became of them (OUTCOMES)
    verdicts     responses by the status of their verification
    valued       ended responses that an independent value batch has taken; the others are held back
    observed     tokens of environments' answers, which are no response tokens: none of them is among `tokens`
    updates_at   by version of the policy's weights, its optimiser steps until then
    """

    def __init__(self, parallel: Parallel):
        self.parallel = parallel
        self.tokens: Counter[str] = Counter()
        self.verdicts: Counter[str] = Counter()
        self.valued = self.observed = 0
        self.updates_at: dict[int, int] = {0: 0}

    def enter_scores(self, slices: Sequence[WindowSlice], scores: Mapping[int, tuple[float, str]]) -> None:
        """Write each ended response's score into its record, and count the verdict."""
        for response in (s.response for s in slices if s.response.ended):
            response.score, status = scores[response.id]
            self.verdicts[status] += 1

    def settle(
        self, rows: Rows, batcher: Batcher, *, warming_up: bool, sampled_with: int, held: Sequence[Response] = (),
        again: Sequence[Response] = (),
    ) -> dict[str, float]:  # fmt: skip
        """Enter a step's rows, and return the ledger/ and policy/ metrics of what was trained, how old it was, what was fed.

        warming_up     whether the value model was trained alone: then all of the rows' tokens are excluded
        sampled_with   version of the policy that sampled this step's window; ages count from it
        held           responses that have ended and wait for their group
        again          responses that the next step trains on again
        AssertionError where a token is lost or counted twice.
        """
        age_sum, age_max, lag_sum = self._enter(rows, warming_up=warming_up, sampled_with=sampled_with)
        num_trained = 0.0 if warming_up else float(rows.train_BT.sum())
        num_reused = 0.0 if warming_up else float(rows.train_BT[rows.reused_B].sum())
        in_flight = list(batcher.in_flight.values())
        waiting = (*in_flight, *held)
        total = self._sum(
            {f"ledger/{name}": self.tokens[name] for name in OUTCOMES}
            | {
                "ledger/generated": batcher.num_generated_tokens,
                "ledger/pending": sum(len(r) - r.num_settled for r in waiting),
                "ledger/in_flight": len(in_flight),
                "policy/tokens": num_trained,
                "policy/reused_tokens": num_reused,
                "policy/prefix_tokens": rows.num_fed_again,
                "policy/staleness": float(age_sum),
                "policy/lag_updates": float(lag_sum),
            }
        )
        for name in ("policy/staleness", "policy/lag_updates"):
            total[name] = per(total[name], total["policy/tokens"])
        accounted = sum(total[f"ledger/{name}"] for name in (*OUTCOMES, "pending"))
        generated = total["ledger/generated"]
        assert generated == accounted, f"{generated} tokens generated, {accounted} accounted for"
        first_version = min((r.versions[0] for r in (*waiting, *again)), default=sampled_with)
        oldest, minus_first = self.parallel.max([age_max, -first_version])  # over all ranks: ended responses move between them
        self.updates_at = {version: n for version, n in self.updates_at.items() if version >= -minus_first}
        return total | {"policy/staleness_max": oldest if total["policy/tokens"] else math.nan}

    def _enter(self, rows: Rows, *, warming_up: bool, sampled_with: int) -> tuple[int, int, int]:
        """Moves each row's `num_settled`, but for a reused row, which was settled when it was new. Of the trained tokens: sum and
        maximum of their ages in versions, and the sum of their ages in updates of the policy."""
        age_sum, age_max, lag_sum, now = 0, 0, 0, self.updates_at[sampled_with]
        trained_B, settled_B = rows.train_BT.sum(1).tolist(), rows.settled_B.tolist()
        reused_B = rows.reused_B.tolist()
        for response, trained, settled, reused in zip(rows.responses, trained_B, settled_B, reused_B, strict=True):
            versions = response.versions[response.num_settled : response.num_settled + trained]
            if versions and not warming_up:
                age_sum += sampled_with * trained - sum(versions)
                age_max = max(age_max, sampled_with - min(versions))
                lag_sum += sum((now - self.updates_at[v]) * n for v, n in Counter(versions).items())
            if reused:
                continue
            if warming_up:
                self.tokens["excluded_warmup"] += len(response) - response.num_settled
                response.num_settled = len(response)
            else:
                self.tokens["trained"] += trained
                self.tokens["excluded_tail"] += settled - response.num_settled - trained
                response.num_settled = settled
        return age_sum, age_max, lag_sum

    def window_metrics(self, slices: Sequence[WindowSlice], batcher: Batcher, rollout_s: float) -> dict[str, float]:
        """The rollout/, response/ and verify/ metrics of one window, over all ranks."""
        ended = [s.response for s in slices if s.response.ended]
        self.observed += sum(num_observed(s.response.observations, s.stop) - num_observed(s.response.observations, s.begin)
                             for s in slices)  # fmt: skip
        total = self._sum({
            "rows": len(slices), "ended": len(ended), "capped": sum(r.end is End.LENGTH_CAP for r in ended),
            "length": sum(map(len, ended)), "score": sum(r.score or 0.0 for r in ended),
            "right": sum((r.score or 0.0) > 0 for r in ended), "tokens": sum(s.stop - s.begin for s in slices),
            "observed": self.observed, "turns": sum(1 + len(r.observations) for r in ended),
            "cut_tokens": sum(s.stop - s.begin for s in slices if not s.response.ended),
            "slot_steps": batcher.slot_steps, "timeout": self.verdicts["timeout"],
            "error": self.verdicts["error"] + self.verdicts["bad_score"],
        })  # fmt: skip
        longest, steps, rollout_s = self.parallel.max([max(map(len, ended), default=0), batcher.num_steps, rollout_s])
        occupancy = total["tokens"] / max(total["slot_steps"], 1)
        length, score, right, capped, turns = (
            per(total[name], total["ended"]) for name in ("length", "score", "right", "capped", "turns")
        )
        return {
            "rollout/decode_steps": steps, "rollout/tokens": total["tokens"], "rollout/tokens_per_s": total["tokens"] / rollout_s,
            "rollout/occupancy": occupancy, "rollout/idle_s": (1 - occupancy) * rollout_s, "response/rows": total["rows"],
            "response/ended": total["ended"], "response/cut_share": (total["rows"] - total["ended"]) / max(total["rows"], 1),
            "response/cut_token_share": total["cut_tokens"] / max(total["tokens"], 1),
            "response/capped_share": capped, "response/length_mean": length,
            "response/length_max": longest if total["ended"] else math.nan, "response/turns_mean": turns,
            "response/score_mean": score, "response/accuracy": right,
            "verify/timeouts": total["timeout"], "verify/errors": total["error"], "ledger/observed": total["observed"],
        }  # fmt: skip

    def _sum(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Named numbers of this rank -> their sums over all ranks."""
        return dict(zip(numbers, self.parallel.sum(numbers.values()), strict=True))

    def state_dict(self) -> dict[str, Any]:
        books = {"tokens": dict(self.tokens), "verdicts": dict(self.verdicts), "valued": self.valued, "observed": self.observed}
        return books | {"updates_at": list(self.updates_at.items())}

    def load_state_dict(self, states: Sequence[Mapping[str, Any]], books: Sequence[Mapping[str, Any]]) -> None:
        """What ranks saved. books: of `states` those whose counts this rank takes over: its own, all ranks', or none."""
        self.updates_at = {version: n for state in states for version, n in state["updates_at"]}
        self.tokens, self.verdicts, self.valued, self.observed = Counter(), Counter(), 0, 0
        for state in books:
            self.valued += state["valued"]
            self.observed += state["observed"]
            self.tokens.update(state["tokens"])
            self.verdicts.update(state["verdicts"])
