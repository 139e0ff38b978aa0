"""The console command: parsing and printing, no logic.

`main` dispatches, `command` is what commands share, `commands` holds them, one a
file.
"""
