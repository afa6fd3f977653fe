"""Files that hosts import by path. A folder of their own: ms-swift puts it on sys.path, where patches/trl.py would hide TRL."""
