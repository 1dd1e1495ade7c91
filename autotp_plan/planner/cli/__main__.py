"""`python -m autotp_plan.planner.cli`: the command without its script."""

from autotp_plan.planner.cli.main import main

main()
