"""Speed and memory, by ratios. `common` comes first: it prepares the environment before torch is imported."""

import common  # noqa: F401
