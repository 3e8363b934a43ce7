"""The language between a fine-tuning job and a policy, spoken in training and in real jobs alike."""
