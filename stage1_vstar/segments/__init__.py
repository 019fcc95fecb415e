"""Monte-Carlo values of the states of solutions: the offline data of Direct Advantage Policy Optimization."""
