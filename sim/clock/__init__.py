"""The clock: what windows bring in seconds, on clusters that nobody has at hand."""
