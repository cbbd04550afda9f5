"""Checkpoints: adapters to use, and runs to resume; never the frozen base.

`save` and `restore` are for finished adapters, `TrainingCheckpoints` is for the run that trains
them. Orbax is imported on first use.
"""

from lora_jax._folders import CheckpointError as CheckpointError
from lora_jax.checkpoint._adapters import restore as restore
from lora_jax.checkpoint._adapters import save as save
from lora_jax.checkpoint._fingerprints import BaseMismatchWarning as BaseMismatchWarning
from lora_jax.checkpoint._state import TrainingState as TrainingState
from lora_jax.checkpoint._training import TrainingCheckpoints as TrainingCheckpoints
