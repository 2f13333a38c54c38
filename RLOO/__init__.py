"""RLOO: REINFORCE leave-one-out."""
