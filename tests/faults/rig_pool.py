"""``python -m workers`` with the real engine behind `tests.faults.rig_engine`; what the rig's arbiter starts.

``RIG_ENGINE`` names another engine ("module:function"), ``RIG_WORKERS`` how many model workers share the CPU.
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
    count = int(os.environ.get("RIG_WORKERS", "1"))
    return [msgspec.structs.replace(only, index=index) for index in range(count)]


if __name__ == "__main__":
    plan.worker_configs = _several
    sys.exit(main(engine=os.environ.get("RIG_ENGINE", "tests.faults.rig_engine:run")))
