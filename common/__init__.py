"""The core under all algorithms. Importing it prepares the environment, so it comes before torch."""

from common.environment import prepare_environment
from common.moved import explain_old_imports

prepare_environment()
explain_old_imports()
