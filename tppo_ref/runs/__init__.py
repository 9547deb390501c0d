"""From a configuration to a run's folder: building, sessions, checkpoints, evaluation, comparisons, reports."""
