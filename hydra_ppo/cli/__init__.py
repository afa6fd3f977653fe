"""What a person types: commands, flags, the dry run, the doctor, export, and whether a run may go on.

From outside: `main` (exit codes, `Command`), `flags`, `parser` (`Parser`, `check_folder`), `loading` (tokenizer, model and
rows, as settings say), `commands` (what a command does, for the quickstart and the comparison of methods).

Never: maths, training loops, anything that a Python user would want without a command line.
"""
