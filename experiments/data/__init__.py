"""Data in memory, and the batches that training takes from it."""

from experiments.data.batches import digit_batches as digit_batches
from experiments.data.batches import epoch_batches as epoch_batches
from experiments.data.dataset import Dataset as Dataset
from experiments.data.dataset import Split as Split
from experiments.data.load import load as load
