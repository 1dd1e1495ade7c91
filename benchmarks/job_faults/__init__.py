"""Faults of disks, processes and people, over saving and loading of jobs: nothing may be lost, silent, or hang.

`files.c` is preloaded by every rank and disturbs its file calls; `calls.py` drives it. `ranks.py` starts ranks and
gives them orders, which `rank.py` carries out. `disk.py` builds what a disk may hold after a power loss, `damage.py`
changes what is on it. `trials.py` has one function for each kind of fault, `judge.py` says what came of it.
"""
