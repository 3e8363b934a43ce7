"""`llmrl train`: collects experience, learns, evaluates, checkpoints, resumes."""
