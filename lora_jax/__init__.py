"""LoRA for any JAX function: pure functions over parameter pytrees."""

from lora_jax import init as init
from lora_jax._axes import InferredAxes as InferredAxes
from lora_jax._axes import WeightUse as WeightUse
from lora_jax._summary import ParameterCounts as ParameterCounts
from lora_jax._summary import count_parameters as count_parameters
from lora_jax._summary import summary as summary
from lora_jax._train import combine as combine
from lora_jax._train import labels as labels
from lora_jax._train import optimizer as optimizer
from lora_jax._train import split as split
from lora_jax._weight import FullWeight as FullWeight
from lora_jax._weight import LoRAWeight as LoRAWeight
from lora_jax._wrap import merge as merge
from lora_jax._wrap import unwrap as unwrap
from lora_jax._wrap import wrap as wrap
from lora_jax.checkpoint import CheckpointError as CheckpointError
from lora_jax.checkpoint import restore as restore
from lora_jax.checkpoint import save as save
from lora_jax.transform import MaterializationError as MaterializationError
from lora_jax.transform import MaterializationWarning as MaterializationWarning
from lora_jax.transform import Report as Report
from lora_jax.transform import TargetReport as TargetReport
from lora_jax.transform import Use as Use
from lora_jax.transform import adapt as adapt
from lora_jax.transform import explain as explain
from lora_jax.transform import infer_axes as infer_axes
