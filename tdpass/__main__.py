"""`python -m tdpass`."""

from __future__ import annotations

import sys

from tdpass.cli import main

if __name__ == "__main__":
    sys.exit(main())
