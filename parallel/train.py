"""Train a video DiT: `python parallel/train.py --demo`, or under torchrun on as many ranks as there are."""

from __future__ import annotations

import sys

from longreel.parallel.auto_policy import with_policy
from longreel.parallel.launch import run_script
from longreel.parallel.presets import with_preset
from longreel.parallel.run_config import TrainConfig
from longreel.parallel.trainer import train

if __name__ == "__main__":
    sys.exit(run_script(train, TrainConfig, sys.argv[1:], expand=with_preset, prepare=with_policy))
