"""One training step after the other: rows, value targets, updates, and the ledger of what became of every token."""
