"""The exact laboratory and the cluster clock: docs/sim.md."""
