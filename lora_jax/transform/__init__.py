"""The transform: from a function of parameters to one of wrapped parameters."""

from lora_jax._axes import InferredAxes as InferredAxes
from lora_jax._axes import WeightUse as WeightUse
from lora_jax.transform._adapt import adapt as adapt
from lora_jax.transform._explain import Report as Report
from lora_jax.transform._explain import TargetReport as TargetReport
from lora_jax.transform._explain import explain as explain
from lora_jax.transform._infer import infer_axes as infer_axes
from lora_jax.transform._report import MaterializationError as MaterializationError
from lora_jax.transform._report import MaterializationWarning as MaterializationWarning
from lora_jax.transform._report import Use as Use
