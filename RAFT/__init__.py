"""RAFT: reward-ranked fine-tuning."""
