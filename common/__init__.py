"""The core under all algorithms. Importing it prepares the environment, so it comes before torch."""

from common.environment import prepare_environment

prepare_environment()
