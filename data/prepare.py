"""Videos and captions to shards that training reads: `python data/prepare.py VIDEOS CAPTIONS OUT`."""

from __future__ import annotations

import sys

from longreel.data.command_line import run_command
from longreel.data.prepare_config import PrepareConfig
from longreel.data.prepare_run import prepare

if __name__ == "__main__":
    sys.exit(run_command(prepare, PrepareConfig, sys.argv[1:]))
