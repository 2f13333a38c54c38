"""Speed and memory, as ratios. Imports `common` first: it prepares the environment before torch is imported."""

import common  # noqa: F401
