"""Trains the policy whose weights come with the repository, and writes them again: `python -m common.embedded`."""

from common.embedded.policy import TINY_POLICIES, build_policy, recipe, train_policy
from common.embedded.shipped import FILE, means, write_shipped

if __name__ == "__main__":
    settings = TINY_POLICIES["tiny"]
    policy = build_policy(settings)
    losses = train_policy(policy, settings)
    write_shipped(policy.state_dict(), recipe(settings), losses)
    first, *_, last = means(losses)
    print(f"{FILE}: {FILE.stat().st_size} bytes; mean loss of the first batches {first}, of the last {last}")
