"""python -m benchmarks.storage [--gb 1 2.5 4] [--folder DIR]

Every ratio of reading and writing weights, in one run: presplit, merge and reshard beside `cp` and `sync` (`life`), a
rank that loads beside `cat` (`load_speed`), a model on the hub beside `curl` (`remote`), quantised weights beside bf16
(`dequantize`). Each is a program of its own, one after the other; run it where nothing else runs. `--gb 16` needs 64 GB
of disk.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", nargs="+", default=["1", "2.5", "4"], help="of presplit, merge and reshard")
    parser.add_argument("--folder", type=Path, help="on the file system to measure; a temporary folder by default")
    options = parser.parse_args()
    folder = [] if options.folder is None else ["--folder", str(options.folder)]
    for name, arguments in (
        ("life", ["--tp", "4", "--gb", *options.gb, *folder]),
        ("load_speed", ["--tp", "4", "--gb", "2.5", *folder]),
        ("remote", ["--gigabytes", "2.5", *folder]),
        ("dequantize", []),
    ):
        print(f"\n== {name}", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *arguments], check=True)


if __name__ == "__main__":
    main()
