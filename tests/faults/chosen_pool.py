"""``python -m workers`` with an engine of the tests; what the arbiter starts in the fault tests.

``POOL_ENGINE`` names another one than the usual, there or ("module:function") elsewhere; ``POOL_WORKERS`` says
how many model workers share the CPU.
"""

import os
import sys

import msgspec

from config.settings import Settings
from workers.__main__ import main
from workers.config import WorkerConfig
from workers.pool import plan

_configs = plan.worker_configs


def _several(settings: Settings) -> list[WorkerConfig]:
    """As many workers for the CPU as asked for; the product has one."""
    (only,) = _configs(settings)
    return [msgspec.structs.replace(only, index=index) for index in range(int(os.environ.get("POOL_WORKERS", "1")))]


if __name__ == "__main__":
    plan.worker_configs = _several
    engine = os.environ.get("POOL_ENGINE", "run")
    sys.exit(main(engine=engine if ":" in engine else f"tests.workers.pool.scripted_engine:{engine}"))
