"""See __init__.py."""

import os
import sys

from tests import golden

if sys.argv[1] == 'keep':
  golden.keep()
else:
  of = dict(write=golden.write, read=golden.read)
  of[sys.argv[1]](os.path.abspath(sys.argv[2]))
