"""ReMax: REINFORCE with the greedy completion as baseline."""
