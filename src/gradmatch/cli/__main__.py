"""``python -m gradmatch.cli``: the same as ``gradmatch``."""

from gradmatch.cli import main

main()
