"""Where a policy steers a job: the house's own loop, on one process or on several."""
