"""`python -m benchmarks`; see benchmarks/README.md."""

import sys

if __name__ == "__main__":  # processes that a benchmark spawns import this file, too, and need no more of it
    from benchmarks.runner import main

    sys.exit(main())
