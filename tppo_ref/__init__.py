"""Truncated PPO (T-PPO, arXiv 2506.15050), readable and complete on one machine.

Tensor suffixes, everywhere in this project: `B` responses, `T` response tokens (right-padded; prompts are never columns).
`values_BT[b, t]` is V before token t of response b. Counts start with `num_`; units end a name (`_s`, `_tokens`, `_bytes`).

    from tppo_ref import egae, policy_token_mask, policy_loss, SlotSchedule, Trainer

The names in `__all__` are imported when they are asked for: `import tppo_ref` imports neither torch nor transformers, and the pure
functions never import transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tppo_ref.loop.trainer import Trainer
    from tppo_ref.method.advantages import egae, gae, length_adaptive_lambda, monte_carlo_returns
    from tppo_ref.method.losses import policy_loss, value_loss
    from tppo_ref.method.masks import policy_token_mask, value_token_mask
    from tppo_ref.method.slots import SlotSchedule

__version__ = "0.1.0"

__all__ = [
    "SlotSchedule", "Trainer", "egae", "gae", "length_adaptive_lambda", "monte_carlo_returns", "policy_loss", "policy_token_mask",
    "value_loss", "value_token_mask",
]  # fmt: skip

_ROOMS = {
    "loop.trainer": ("Trainer",),
    "method.advantages": ("egae", "gae", "length_adaptive_lambda", "monte_carlo_returns"),
    "method.losses": ("policy_loss", "value_loss"),
    "method.masks": ("policy_token_mask", "value_token_mask"),
    "method.slots": ("SlotSchedule",),
}


def __getattr__(name: str) -> Any:
    for room, names in _ROOMS.items():
        if name in names:
            return getattr(importlib.import_module(f"tppo_ref.{room}"), name)
    raise AttributeError(f"module 'tppo_ref' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
