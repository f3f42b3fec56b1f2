"""`shnet data people`."""

import sys

from data_prep.people.write import main

if __name__ == "__main__":
    sys.exit(main())
