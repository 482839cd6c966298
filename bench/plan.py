"""What to run on which GPUs: `python bench/plan.py --tokens 819200 --gpus 8 --target h800`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 after one `error:` line on stderr."""
    # torch takes longer to import than most answers to compute.
    from longreel.bench.plan_answer import PlanConfig, answer, as_json
    from longreel.bench.plan_table import print_plan
    from longreel.data.command_line import parse_arguments

    command = sys.argv[1:] if arguments is None else arguments
    try:
        config = parse_arguments(PlanConfig, command, prog="python bench/plan.py")
        found = answer(config)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if config.json:
        print(json.dumps(as_json(found, config), indent=1))
    else:
        print_plan(found, config)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
