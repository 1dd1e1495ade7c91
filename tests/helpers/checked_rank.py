"""A rank in the place of `benchmarks.gpu.rank`, whose checks do what their names say. It imports nothing heavy."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path


def main() -> None:
    folder, rank = Path(sys.argv[1]), os.environ.get("RANK", "0")
    with (folder / f"found-{rank}.jsonl").open("w") as found:
        for name in json.loads((folder / "job.json").read_text())["checks"]:
            (folder / "begun").touch()
            if name == "hangs" or (name == "one rank hangs" and rank == "1"):
                time.sleep(100)
            if name == "dies" and rank == "1":
                sys.exit("it died")
            error = "it raised" if name == "raises" and rank == "1" else ""
            one = {"worst": 0.0, "planted": 1.0, "figures": {"process": os.getpid()}, "absent": "", "seconds": 0.0}
            found.write(json.dumps({"name": name, **one, "error": error}) + "\n")
            found.flush()
    time.sleep(100)


if __name__ == "__main__":
    main()
