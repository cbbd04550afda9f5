"""Where gguf is not installed, what writes files with it is left alone."""

import importlib.util

collect_ignore = [] if importlib.util.find_spec("gguf") else ["adapted.py", "files.py"]
