"""Truncated PPO (T-PPO, arXiv 2506.15050), readable and complete on one machine.

Tensor suffixes, everywhere in this project: `B` responses, `T` response tokens (right-padded; prompts are never columns).
`values_BT[b, t]` is V before token t of response b. Counts start with `num_`; units end a name (`_s`, `_tokens`, `_bytes`).
"""

__version__ = "0.1.0"
