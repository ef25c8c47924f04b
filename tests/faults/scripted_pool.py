"""``python -m workers`` with the scripted engine; what the arbiter starts in the fault tests."""

import os
import sys

from workers.__main__ import main

if __name__ == "__main__":
    sys.exit(main(engine="tests.workers.pool.scripted_engine:" + os.environ.get("SCRIPTED_ENGINE", "run")))
