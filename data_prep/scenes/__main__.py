"""`shnet data scenes`."""

import sys

if __name__ == "__main__":  # the processes that make records import this file, too, and need no more of it
    from data_prep.scenes.write import main

    sys.exit(main())
