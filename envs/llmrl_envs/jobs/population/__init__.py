"""Many fine-tuning jobs of one model in one batched pass: stacked weights, one optimizer, every job its own."""
