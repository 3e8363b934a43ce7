"""Published ways to set the learning rate, run through the same session as everything else."""
