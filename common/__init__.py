"""The core of all algorithms. Import it before torch: it prepares the environment."""

from common.signals import leave_while_importing

leave_while_importing()  # before what follows, which takes a tenth of a second

from common.environment import prepare_environment  # noqa: E402
from common.mistakes import explain_mistakes  # noqa: E402
from common.moved import explain_old_imports  # noqa: E402

prepare_environment()
explain_old_imports()
explain_mistakes()
