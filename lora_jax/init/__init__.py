"""Initialisers: they make the factors of a new adapter, and its base."""

from lora_jax.init._corda import corda as corda
from lora_jax.init._data import DataInitializer as DataInitializer
from lora_jax.init._eva import eva as eva
from lora_jax.init._eva import eva_ranks as eva_ranks
from lora_jax.init._gaussian import gaussian as gaussian
from lora_jax.init._input_moments import input_moments as input_moments
from lora_jax.init._kaiming import kaiming as kaiming
from lora_jax.init._loftq import QuantizingInitializer as QuantizingInitializer
from lora_jax.init._loftq import loftq as loftq
from lora_jax.init._lora_ga import lora_ga as lora_ga
from lora_jax.init._mica import mica as mica
from lora_jax.init._moments import InputMoments as InputMoments
from lora_jax.init._olora import olora as olora
from lora_jax.init._orthogonal import orthogonal as orthogonal
from lora_jax.init._pissa import pissa as pissa
from lora_jax.init._protocol import Frozen as Frozen
from lora_jax.init._protocol import Initializer as Initializer
from lora_jax.init._registry import initializer as initializer
