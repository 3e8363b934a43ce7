"""What is being fine-tuned: tasks, data, models and the session that trains."""
