"""The core of all algorithms. Import it before torch: it prepares the environment."""

from common.environment import prepare_environment
from common.mistakes import explain_mistakes
from common.moved import explain_old_imports
from common.signals import leave_while_importing

leave_while_importing()
prepare_environment()
explain_old_imports()
explain_mistakes()
