"""The laboratory: token MDPs with exact answers, and what truncation costs on them."""
