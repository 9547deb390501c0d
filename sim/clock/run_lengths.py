"""Response lengths of a run of one's own, from its folder, and what can be said against a sample of lengths.

of_run("runs/mine")        Empirical: the newest responses of responses.csv that are no chosen ones
doubts(lengths)            a line for each reason not to trust them
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

from sim.clock.distributions import Empirical, Lengths

NEWEST = 8192  # responses that are looked at: lengths grow while a model trains
ENOUGH = 1000  # responses below which the longest hundredth is ten or fewer


def of_run(folder: Path, cap: int | None = None) -> Empirical:
    """The newest lengths of `folder`/responses.csv, where a run of tppo_ref or scale/ writes each response as it ends.

    What runs at the end of the file is not in it, and is long more often than not: responses drawn after the first of those are
    left out, the short ones too. `cap` in tokens; None: the run's own. ValueError for a folder without responses.
    """
    path = folder / "responses.csv"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            tokens = {int(row["response"]): int(row["tokens"]) for row in csv.DictReader(file)}
    except OSError:
        raise ValueError(f"lengths: got {folder}; expected a run's folder with a responses.csv") from None
    except (KeyError, ValueError, TypeError):
        raise ValueError(f"{path}: expected columns response and tokens, whole numbers; is it a run's?") from None
    order = sorted(tokens)
    settled = next((place for place, number in enumerate(order) if number != order[0] + place), len(order))
    values = [tokens[number] for number in order[:settled]][-NEWEST:]
    if not values:
        raise ValueError(f"{path}: got no response; expected one or more")
    own = _cap_of(folder) or max(values)
    if max(values) > (cap or own):
        raise ValueError(f"{path}: got a length of {max(values)}; expected at most the cap of {cap or own}; raise cap")
    at_cap = sum(value >= own for value in values) if cap and cap > own else 0
    return Empirical(values=tuple(values), cap=cap or own, num_clipped=at_cap, name=folder.name, source=str(path))


def _cap_of(folder: Path) -> int | None:
    """The longest response that the run allowed; None where its config does not say."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return int(config.get("algo", config)["rollout"]["max_response_tokens"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def doubts(lengths: Lengths) -> list[str]:
    """Why a plan on these lengths may be wrong."""
    if not isinstance(lengths, Empirical):
        return [f"lengths are {lengths.name or 'made up'}, not your run's: give --lengths your run's folder once there is one"]
    found, values = [], lengths.values
    if len(values) < ENOUGH:
        found.append(f"{len(values):,} lengths are few: their longest hundredth is {max(1, len(values) // 100)} responses, and it "
                     f"decides how long a step waits; {ENOUGH:,} are enough")  # fmt: skip
    if len(set(values)) == 1:
        found.append(
            f"all {len(values):,} lengths are {values[0]:,}: without a tail nothing waits, and no method has anything to win"
        )
    if lengths.num_clipped:
        found.append(f"{100 * lengths.num_clipped / len(values):.2g} % of the lengths were ended by a cap below {lengths.cap:,}: "
                     "how long they would have become is not in them")  # fmt: skip
    elif (at_longest := values.count(max(values)) / len(values)) > 0.005 and len(set(values)) > 1 and max(values) < lengths.cap:
        found.append(f"{100 * at_longest:.2g} % of the lengths are the longest, {max(values):,}, as if a cap below {lengths.cap:,} "
                     "had ended them")  # fmt: skip
    return found
