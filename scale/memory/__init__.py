"""What a run needs of every device, phase by phase, without one: the dry run."""
