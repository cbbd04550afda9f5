"""Where bitsandbytes is not installed, what quantises with it is left alone."""

import importlib.util

collect_ignore = [] if importlib.util.find_spec("bitsandbytes") else ["files.py"]
