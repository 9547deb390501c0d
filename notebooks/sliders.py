"""A picture that a reader can move: sliders in a running kernel, the picture at their start values anywhere else."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
from typing import Any

import matplotlib.pyplot as plt
from IPython.display import display


def with_sliders(draw: Callable[..., Any], **ranges: Mapping[str, Any]) -> None:
    """`draw(name=value, ...)` makes a figure; `ranges` has value, min, max and step of a slider, or value and options of a menu."""
    figure, buffer = draw(), io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight")
    plt.close(figure)
    output = {"image/png": base64.b64encode(buffer.getvalue()).decode(), "text/plain": "the picture at the sliders' start values"}
    try:
        import ipywidgets
    except ImportError:
        pass
    else:

        def redraw(**at: Any) -> None:
            draw(**at)
            plt.show()

        def control(given: Mapping[str, Any]) -> Any:
            if "options" in given:
                return ipywidgets.Dropdown(**given)
            return {float: ipywidgets.FloatSlider, int: ipywidgets.IntSlider}[type(given["step"])](**given, continuous_update=False)

        panel = ipywidgets.interactive(redraw, **{name: control(given) for name, given in ranges.items()})
        panel.update()
        output |= {kind: x for kind, x in panel._repr_mimebundle_().items() if kind != "text/plain"}
    display(output, raw=True)
