"""`python -m pyprune` is the `pyprune` command."""

from pyprune.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
