"""python -m benchmarks.job_faults [--count 1200] [--seconds 0] [--seed 0] [--stages 0,1,2,3] [--ranks 2,4]

Saves and loads jobs, shards and plain checkpoints of a tiny model on 2 and 4 ranks under every ZeRO stage, and makes a
fault each time: ranks killed, calls that fail, a full disk, a power loss, bytes changed, two jobs in one folder. After
each it looks whether the job goes on from exactly what was saved. It ends with status 1 where something was lost
(saved, and neither there nor named), silent (resumed from anything else) or hung.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.job_faults.campaign import run


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.job_faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--count", type=int, default=1200, help="how many faults")
    parser.add_argument("--seconds", type=float, default=0, help="stop after so long; 0 for never")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", default="0,1,2,3", help="ZeRO stages")
    parser.add_argument("--ranks", default="2,4", help="numbers of ranks")
    parser.add_argument("--kinds", default="", help="only kinds of faults whose name holds this text")
    parser.add_argument("--planted", default="", help="a weakness of planted.py, which must be found")
    parser.add_argument("--hang", type=float, default=60, help="seconds after which a rank hangs")
    options = parser.parse_args()
    started = time.monotonic()
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="autotp-faults-", dir=memory if memory.is_dir() else None) as name:
        table = run(
            Path(name),
            count=options.count,
            seconds=options.seconds,
            seed=options.seed,
            settings=[(int(n), int(z)) for z in options.stages.split(",") for n in options.ranks.split(",")],
            kinds=options.kinds,
            planted=options.planted,
            hang=options.hang,
            say=lambda text: print(text, flush=True),
        )
    print(table.text())
    print(f"{table.total} faults in {time.monotonic() - started:.0f} s, seed {options.seed}")
    sys.exit(bool(table.problems))


if __name__ == "__main__":
    main()
