"""`python -m caa_lens` is the command `caa-lens`."""

from caa_lens.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
