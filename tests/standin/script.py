"""Any script on the stand-in: ``run python -m standin.script bench/train.py --device cuda``."""

import os
import runpy
import sys

from standin import driver
from standin.operators import Operators

if __name__ == "__main__":
    driver.execute()
    del sys.argv[0]
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    with Operators():
        runpy.run_path(sys.argv[0], run_name="__main__")
