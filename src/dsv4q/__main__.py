"""`python -m dsv4q` is the same as the `dsv4q` command."""

from __future__ import annotations

from dsv4q.cli import main

if __name__ == "__main__":
    main()
