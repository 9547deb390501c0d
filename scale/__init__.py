"""T-PPO on vLLM and FSDP2: tppo_ref's Trainer, batcher, filters, losses and egae, unchanged, on many GPUs. See docs/scale.md."""
