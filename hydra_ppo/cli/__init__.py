"""What a person types: commands, flags, the dry run, the doctor, export, and whether a run may go on.

From outside: `main` (exit codes, `Command`), `parser` (`Parser`, `check_folder`), `flags` (`parse`), `loading` (tokenizer,
model and rows, as settings say), `commands` and `features` (what a command does, for the quickstart and the comparisons),
`saved` (settings of a run), `opened` and `pairs` (a run and pairs that are only read).

Never: maths, training loops, anything that a Python user would want without a command line.
"""
