"""A job that somebody else runs, steered: what is measured in it, what may be done to it, and how it is undone."""
