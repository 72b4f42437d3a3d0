"""`python3 -m hpc` is `hpc`."""

from hpc.login.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
