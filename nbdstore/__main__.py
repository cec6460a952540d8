"""``python -m nbdstore``: the command line."""

from nbdstore.cli import main

if __name__ == "__main__":
    main()
