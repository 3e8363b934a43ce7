"""Jobs on noisy quadratics: closed-form training, the jobs' distribution, episodes, and the best schedule."""
