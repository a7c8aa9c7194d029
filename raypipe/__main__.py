"""``raypipe`` and ``python -m raypipe``: the command line, and Ctrl-C while it is still being imported."""

from __future__ import annotations

import sys


def main() -> int:
    """Run one command; returns its exit code."""
    try:
        from raypipe.cli import main as command_line

        return command_line()
    except KeyboardInterrupt:  # later ones are cli's, which knows what there is to resume
        print("raypipe: interrupted before it began; give the same command again", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
