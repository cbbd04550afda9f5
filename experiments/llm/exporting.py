"""Adapters for other programs: the command line of `llm_lora export`."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import lora_jax
from experiments.common.console import Console
from experiments.common.errors import InputError, as_input_error
from experiments.common.options import Option, parsed_as
from experiments.llm.adapter_folder import AdapterFolder
from experiments.llm.mesh import Devices
from experiments.llm.options import ModelPath
from experiments.llm.soft_prompt import LEAF, with_prompt
from experiments.llm.task import loaded_params
from experiments.models.llama import LlamaConfig, gguf_rules
from experiments.models.names import huggingface_rules
from experiments.models.pretrained import LanguageModel
from experiments.models.t5 import T5Config
from lora_jax.exchange import gguf, huggingface, peft

_DESCRIPTION = """\
Writes the adapter of a training in the format of another program:

  peft         a folder that Hugging Face PEFT, vLLM and others load beside the model
  gguf         a file that llama.cpp applies to the model's GGUF file
  huggingface  a folder with the whole model, the adapter merged, which transformers loads
"""

_EXAMPLES = """\
examples:
  python -m experiments.llm_lora export --adapter runs/llm_lora/adapter --to gguf --out my.gguf
  python -m experiments.llm_lora export --adapter runs/llm_lora/adapter --to huggingface --out my
"""

FORMATS = ("peft", "gguf", "huggingface")


@dataclass(frozen=True, kw_only=True)
class ExportingOptions:
    """What to write, and where."""

    adapter: Annotated[
        Path, Option("the folder `adapter` in the --out of a training", Path, metavar="DIR")
    ]
    to: Annotated[str, Option("the format", choices=FORMATS)]
    out: Annotated[Path, Option("the file or folder to write, which is new", Path, metavar="PATH")]
    model: ModelPath = None


def parsed_for_exporting(arguments: Sequence[str]) -> ExportingOptions:
    """Returns the options after `export`; exits, as argparse does, if one is wrong."""
    return parsed_as(
        ExportingOptions,
        arguments,
        command="llm_lora export",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )


def export(options: ExportingOptions) -> None:
    """Writes the adapter."""
    if options.out.exists():
        raise InputError(f"--out {options.out} is there already; pass a name that is new")
    folder = AdapterFolder(options.adapter)
    card = folder.read_card()
    if card.soft_prompt and options.to != "peft":
        raise InputError(
            f"--adapter {options.adapter} has a soft prompt, for which --to {options.to} has no "
            "place; pass peft"
        )
    if card.added_tokens and options.to == "gguf":
        raise InputError(
            f"--adapter {options.adapter} has tokens that the model's GGUF file has not; pass peft "
            "or huggingface"
        )
    chosen = card.model_options(options.model)
    model = card.language_model(options.model)
    console = Console.beside_output()
    params = with_prompt(loaded_params(model, chosen, Devices(), console), card.soft_prompt)
    wrapped = folder.restore(params)
    with as_input_error():
        _WRITERS[options.to](options.out, wrapped, model)
    console.note(f"Written: {options.out}")


def write_peft(path: Path, wrapped: Any, model: LanguageModel, *, overwrite: bool = False) -> None:
    """Writes a folder of PEFT; of adapters and a soft prompt two, the second beside the first."""
    config = {"base_model_name_or_path": str(model.path), "task_type": _task_type(model)}
    adapters = {name: each for name, each in wrapped.items() if name != LEAF}
    has_adapters = lora_jax.count_parameters(adapters).trainable > 0
    if has_adapters:
        names = huggingface_rules(model.config)
        peft.save(path, adapters, names=names, config=config, overwrite=overwrite)
    if LEAF in wrapped:
        folder = path.with_name(f"{path.name}_prompt") if has_adapters else path
        prompt = lora_jax.merge(wrapped[LEAF])
        peft.save_prompt(folder, prompt, config=config, overwrite=overwrite)


def _task_type(model: LanguageModel) -> str:
    return "SEQ_2_SEQ_LM" if isinstance(model.config, T5Config) else "CAUSAL_LM"


def _write_gguf(path: Path, wrapped: Any, model: LanguageModel) -> None:
    if not isinstance(model.config, LlamaConfig):
        raise InputError(
            f"--to gguf writes adapters of models that continue texts, and {model.path} is an "
            "encoder-decoder; pass peft or huggingface"
        )
    gguf.save(
        path,
        wrapped,
        names=gguf_rules(model.config),
        architecture=model.config.gguf_architecture,
    )


def write_huggingface(
    path: Path, params: Any, model: LanguageModel, *, overwrite: bool = False
) -> None:
    """Writes a folder with the whole model, adapters merged, which transformers loads."""
    with tempfile.TemporaryDirectory() as temporary:
        huggingface.save(
            path,
            params,
            names=huggingface_rules(model.config),
            config=model.huggingface_entries(),
            files=model.tokenizer().files(Path(temporary)),
            overwrite=overwrite,
        )


_WRITERS = {"peft": write_peft, "gguf": _write_gguf, "huggingface": write_huggingface}
