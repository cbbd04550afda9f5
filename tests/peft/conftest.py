"""Where PEFT is not installed, what imports it is left alone, also by the search for examples."""

import importlib.util

collect_ignore = [] if importlib.util.find_spec("peft") else ["make_adapters.py", "torch_models.py"]
