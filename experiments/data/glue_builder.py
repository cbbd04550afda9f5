"""GLUE's SST-2 as TensorFlow Datasets has it, prepared and read without TensorFlow.

TFDS's own builder needs TensorFlow to unpack the archive. The builder here overrides just that
part, so it writes the same data set, `glue/sst2/2.0.0`. Importing this module takes a second.
"""

import functools
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.text.glue import Glue

from experiments.common.console import Console
from experiments.data.dataset import TextDataset, Texts
from experiments.data.prepared import (
    builder_in,
    examples,
    is_prepared,
    prepare_from_network,
)

NAME = "glue/sst2"


class SST2(Glue, skip_registration=True):  # type: ignore[call-arg]
    """TFDS's GLUE, with an archive that Python unpacks."""

    name = Glue.name
    VERSION = Glue.VERSION
    url_infos = Glue.url_infos

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> Any:
        archive = Path(dl_manager.download(self.builder_config.data_url))
        folder = archive.with_name(f"{archive.name}.unpacked")
        with zipfile.ZipFile(archive) as file:
            file.extractall(folder)
        return {
            split: self._generate_examples(
                folder / self.builder_config.data_dir / f"{name}.tsv", name
            )
            for split, name in (("train", "train"), ("validation", "dev"), ("test", "test"))
        }


def sst2(data_dir: Path, console: Console) -> TextDataset:
    """Returns SST-2; its test set is GLUE's validation set, whose labels are public.

    Raises:
      OSError: it is neither prepared in this folder nor can it be downloaded.
    """
    builder = builder_in(functools.partial(SST2, config="sst2"), data_dir)
    if not is_prepared(builder):
        prepare_from_network(builder, builder.builder_config.data_url, console)
    return TextDataset(NAME, _texts(builder, "train"), _texts(builder, "validation"))


def _texts(builder: SST2, split: str) -> Texts:
    sentences, labels = [], []
    for example in examples(builder, split):
        sentences.append(example["sentence"].decode("utf-8").strip())
        labels.append(int(example["label"]))
    classes = tuple(builder.builder_config.label_classes)
    return Texts(tuple(sentences), np.array(labels, np.int32), classes)
