"""The paper and nothing else, in torch and integers: records, advantages, masks, losses, slots. Read it from top to bottom."""
