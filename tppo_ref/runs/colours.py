"""One colour, line and marker per method and per estimator: figures, notebooks and pages take them from here, by name.

    axes.plot(x, y, **look("egae").line())            the same blue as T-PPO, whose estimator it is, in every figure

A colour never stands alone: looks differ in line and marker too, for readers in grey. The five that share figures (PPO, T-PPO with
EGAE, the critic's own value, 0, and the whole response) are told apart by protan, deutan and tritan readers as well, on white and
on the site's dark page. Series without a name of their own, such as worlds and tasks, take COLOURS in the order of SERIES.
"""

from __future__ import annotations

from typing import Any, NamedTuple

COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")  # Okabe and Ito's, and grey
LINES = ("--", "-", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (3, 1, 1, 1)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
SERIES = (4, 3, 6, 7, 5)
"""Of COLOURS those that neither PPO nor T-PPO nor a cut rule has, for series without a name of their own."""


class Look(NamedTuple):
    """How a method or an estimator is drawn: its colour on white and on a dark page, its line, its marker."""

    colour: str
    on_dark: str
    dashes: Any
    marker: str

    def line(self, **more: Any) -> dict[str, Any]:
        """Arguments of matplotlib's `plot`, on white."""
        own = {"color": self.colour, "linestyle": self.dashes, "marker": self.marker, "markersize": 5, "linewidth": 1.8}
        return own | {"markeredgecolor": "white"} | more

    @property
    def shades(self) -> tuple[str, str]:
        """A dark and a light one: of a timeline's neighbours in a slot, or on white and on a dark page."""
        return self.colour, self.on_dark

    def bare(self, **more: Any) -> dict[str, Any]:
        """The same without markers."""
        return {"color": self.colour, "linestyle": self.dashes} | more


T_PPO = Look("#0072B2", "#56B4E9", "-", "s")
CRITIC = Look("#009E73", "#2FC79A", "-.", "^")
ZERO = Look("#B5478C", "#E79BC8", ":", "D")
WHOLE = Look("#3C4350", "#E4E7EC", (0, (8, 2)), "X")
PARTIAL = Look("#27296D", "#C8D0FF", (0, (3, 1, 1, 1)), "P")

LOOKS: dict[str, Look] = {
    # methods, as run.method names them
    "ppo": Look("#D55E00", "#FF9A57", "--", "o"),
    "ppo-dual": Look("#7A4B00", "#FFD9A8", (0, (5, 1, 1, 1, 1, 1)), "v"),
    "geppo": Look("#7A4B00", "#FFD9A8", ":", "p"),
    "partial-is": PARTIAL,
    "tppo": T_PPO,
    "tppo-critic-cut": CRITIC,
    "tppo-zero-cut": ZERO,
    "tppo-defer": Look("#E69F00", "#F0C040", "-", "<"),
    "tppo-ewma": Look("#56B4E9", "#A9D8F5", "-.", "h"),
    "rloo": Look("#6B7A1E", "#C9D86A", "--", "P"),
    "rloo-window": Look("#6B7A1E", "#C9D86A", "-", "P"),
    "grpo": Look("#8A3B5C", "#E3A6C0", "--", "X"),
    "grpo-window": Look("#8A3B5C", "#E3A6C0", "-", "X"),
    "tppo-once": Look("#56B4E9", "#A9D8F5", (0, (6, 1, 1, 1)), "p"),
    # what stands for V(s_l) at a cut, as advantage.cut_value and the laboratory name it
    "previous": T_PPO,
    "critic": CRITIC,
    "zero": ZERO,
    "none": WHOLE,
    "monte-carlo": Look("#7F7F7F", "#9AA1AD", (0, (1, 1)), "*"),
    # estimators, as the laboratory names them
    "egae": T_PPO,
    "cut-gae": CRITIC,
    "zero-cut": ZERO,
    "gae": WHOLE,
    "partial": Look("#27296D", "#C8D0FF", "-", "H"),
    "partial-exact": Look("#27296D", "#C8D0FF", "-.", "8"),
    "egae-exclude": Look("#7A7A00", "#D6D67A", "--", ">"),
    "egae-defer": Look("#E69F00", "#F0C040", "-", "<"),
    "egae-drop": Look("#7F7F7F", "#9AA1AD", ":", "d"),
    "egae-adaptive": Look("#56B4E9", "#A9D8F5", "-.", "h"),
    "extrapolated": Look("#E69F00", "#F0C040", ":", ">"),
    "averaged": Look("#7A4B00", "#FFD9A8", "-", "v"),
    "mixture": Look("#000000", "#FFFFFF", ":", "P"),
    "shrunk-step": Look("#56B4E9", "#A9D8F5", "--", "<"),
}
OTHER = Look("#7F7F7F", "#9AA1AD", (0, (3, 1, 1, 1)), "p")


def look(name: str) -> Look:
    """The look of a method or estimator; grey for one that is not ours, such as a user's own cut rule."""
    return LOOKS.get(name, OTHER)
