"""The `autotp-plan` command: one file per group of commands, and the only place of the planner that prints or exits.

Not here: any decision. A command parses its options, calls the library, and reports.
"""
