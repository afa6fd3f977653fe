"""Files that hosts import by path. A folder of their own: ms-swift puts it on sys.path, where patches/trl.py would hide TRL.

From outside: their paths, which the patch of the host prints (`python -m hydra_ppo.patches.swift`).

Never: more than a call of `apply`, or a name that a host or another package has.
"""
