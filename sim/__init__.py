"""The exact laboratory (sim/lab) and the cluster clock (sim/clock): docs/sim.md.

Importing this package registers the laboratory's token MDPs with Gymnasium, single and vector, and does nothing else:

    gymnasium.make("TokenMDP/Cliff-v0", length=12)          gymnasium.make_vec("TokenMDP/Cliff-v0", num_envs=64)

The environments themselves (sim/lab/envs.py) are imported when one is made.
"""

import gymnasium

ENV_IDS = {
    name: f"TokenMDP/{name.title().replace('-', '')}-v0"
    for name in ("calm-chain", "cliff", "early-decision", "late-decision", "noisy-reward", "thinking", "random")
}
"""Instance name (sim.lab.instances.INSTANCES) -> id of its environment."""

for _name, _id in ENV_IDS.items():
    if _id not in gymnasium.registry:  # a reloaded package finds its own entries
        gymnasium.register(
            id=_id,
            entry_point="sim.lab.envs:TokenEnv",
            vector_entry_point="sim.lab.envs:TokenVectorEnv",
            kwargs={"instance": _name},
        )
