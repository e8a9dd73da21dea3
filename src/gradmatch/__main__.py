"""``python -m gradmatch``: the command line without its script on the path."""

from gradmatch.cli import main

if __name__ == "__main__":
    main()
