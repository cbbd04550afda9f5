"""The study from its first step to its results."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

import lora_jax
from experiments.common.errors import as_input_error
from experiments.common.files import bytes_in, used_alone
from experiments.common.run import Run
from experiments.common.stores import BaseCheckpoint
from experiments.images.classifier import Judge
from experiments.images.drawing import Draftsman, Drawn, at_strength
from experiments.images.options import TARGETS, Options
from experiments.images.report import Findings, Tuned, present
from experiments.images.task import FOLDED, ImageTask, image_task
from experiments.images.training import Examination, Training, in_full
from experiments.models.bert import Encoder
from experiments.models.unet import UNet, diffusers_rules
from lora_jax.checkpoint import TrainingCheckpoints
from lora_jax.exchange import diffusers, kohya

_EVALUATIONS = 8


def run_study(options: Options, run: Run) -> None:
    """Trains the base and the adapters, draws with them, and reports."""
    options.base.check()
    with used_alone(options.output.out, "--out"):
        _Study(options, run).run()


class _Study:
    """A run of the study, and what all of its parts need."""

    def __init__(self, options: Options, run: Run) -> None:
        self._options, self._run, self._out = options, run, options.output.out
        self._console = run.console
        dataset = options.data.loaded(run.console)
        self._task: ImageTask = image_task(dataset, Encoder.read(options.model), options)
        self._dataset = dataset.name
        run.phase_ended("data")
        seed = options.base.seed
        settings = {"dataset": dataset.name, "seed": seed}
        checkpoint = BaseCheckpoint(self._out / "classifier", settings)
        self._judge = Judge(self._task, checkpoint, run.console)
        self._draftsman = Draftsman(self._task, self._judge, options.drawing, seed=seed)
        run.phase_ended("classifier")

    def run(self) -> None:
        base = self._base()
        self._run.phase_ended("base")
        before = self._drawn(base, "Drawing with the base")
        tuned = {digit: self._tuned(base, digit) for digit in self._options.base.held_out}
        combined = self._combined([each.wrapped for each in tuned.values()])
        self._run.phase_ended("combining")
        findings = Findings(
            dataset=self._dataset,
            base_parameters=lora_jax.count_parameters(base).total,
            classifier_accuracy=self._judge.accuracy,
            before=before,
            tuned=tuned,
            combined=combined,
            served_difference=self._served_difference(tuned),
        )
        present(findings, self._options, self._run)

    # --- trainings

    def _base(self) -> Any:
        """Returns the base's parameters, trained now or by an earlier run."""
        chosen, task = self._options.base, self._task
        seen = [digit for digit in range(10) if digit not in chosen.held_out]
        params = jax.jit(UNet(task.config).init)(
            jax.random.key(chosen.seed),
            jnp.zeros((1, *FOLDED)),
            jnp.zeros(1, jnp.int32),
            task.captions.empty,
        )["params"]
        training = Training(
            task,
            in_full(params),
            task.of_digits(seen),
            steps=chosen.base_steps,
            batch_size=chosen.base_batch,
            learning_rate=chosen.base_learning_rate,
            drop=chosen.without_text,
            evaluate_every=max(1, chosen.base_steps // _EVALUATIONS),
            settings={**chosen.as_json(), "dataset": self._dataset},
        )

        def show(wrapped: Any) -> None:
            if self._options.output.no_plots:
                return
            # Matplotlib takes half a second to import, which --no-plots saves.
            from experiments.images.plots import save_samples

            found = self._drawn(lora_jax.merge(wrapped), "Drawing on the way")
            save_samples(self._out / "base.png", found, f"after {training.step:,} steps")

        self._take_steps(training, "base", task.of_digits(seen), keep=show)
        return lora_jax.merge(training.wrapped)

    def _tuned(self, base: Any, digit: int) -> Tuned:
        """Returns what adapters and full fine-tuning have learned of a digit."""
        chosen, drawing = self._options.tuning, self._options.drawing
        with as_input_error():
            adapted = lora_jax.wrap(
                base,
                TARGETS,
                rank=chosen.rank,
                alpha=chosen.alpha,
                key=jax.random.key(digit),
                axes={rule.path: rule.axes for rule in diffusers_rules(base) if rule.axes},
            )
        lora = self._learned(adapted, digit, "lora", chosen.learning_rate)
        full = self._learned(in_full(base), digit, "full", chosen.full_learning_rate)
        wrapped, whole = lora.wrapped, lora_jax.merge(full.wrapped)
        strengths = {
            strength: self._drawn(
                at_strength(wrapped, strength), f"Drawing {digit} at strength {strength:g}"
            )
            for strength in drawing.strengths
        }
        merged = self._drawn(lora_jax.merge(wrapped), f"Drawing {digit}, merged")
        in_full_drawn = self._drawn(whole, f"Drawing {digit}, tuned in full")
        self._run.phase_ended("drawing")
        return Tuned(
            wrapped=wrapped,
            strengths=strengths,
            merged=merged,
            full=in_full_drawn,
            costs={"lora": lora.cost, "full": full.cost},
            bytes=self._files(wrapped, base, digit),
        )

    def _learned(self, wrapped: Any, digit: int, name: str, rate: float) -> "_Learned":
        chosen, seed = self._options.tuning, self._options.base.seed
        numbers = self._task.few_of(digit, chosen.examples, seed=seed)
        training = Training(
            self._task,
            wrapped,
            numbers,
            steps=chosen.steps,
            batch_size=chosen.batch_size,
            learning_rate=rate,
            drop=self._options.base.without_text,
            evaluate_every=chosen.steps,
            settings={
                **self._options.base.as_json(),
                **chosen.as_json(),
                "dataset": self._dataset,
                "digit": digit,
                "method": name,
            },
        )
        self._take_steps(training, f"{name}_{digit}", numbers)
        self._run.phase_ended(name)
        cost = {
            "trainable": lora_jax.count_parameters(training.wrapped).trainable,
            "seconds": sum(training.history.of("seconds")),
            "step_bytes": training.step_bytes(),
        }
        return _Learned(training.wrapped, cost)

    def _take_steps(
        self,
        training: Training,
        name: str,
        numbers: NDArray[np.intp],
        *,
        keep: Any = lambda wrapped: None,
    ) -> None:
        """Takes the steps of a training, or those that an earlier run of it has left."""
        text = json.dumps(training.settings, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        folder = self._out / "trainings" / f"{name}_{digest}"
        examine = Examination(self._task, numbers, seed=self._options.base.seed)
        self._console.rule(f"Training: {name.replace('_', ' ')}")
        with TrainingCheckpoints(folder, keep=1) as checkpoints:
            is_begun = checkpoints.latest_step is not None
            training.begin(checkpoints, resume=is_begun, console=self._console)
            training.run(examine, keep, console=self._console, checkpoints=checkpoints)

    # --- what adapters are good for

    def _drawn(self, tree: Any, description: str) -> Drawn:
        return self._draftsman.drawn(tree, self._console, description=description)

    def _combined(self, adapters: list[Any]) -> Drawn | None:
        """Returns what all adapters draw together, as one; None if there is but one."""
        if len(adapters) < 2:
            return None
        both = lora_jax.arithmetic.blend(adapters, [1.0] * len(adapters), "cat")
        return self._drawn(both, "Drawing with all adapters")

    def _served_difference(self, tuned: Mapping[int, Tuned]) -> float:
        """Returns how far pictures of one batch, each with its own adapter, are from others."""
        digits, trees = list(tuned), [each.wrapped for each in tuned.values()]
        together = self._draftsman.drawn_in_one_batch(trees, digits)
        alone = [
            self._draftsman.drawn_alone(tree, digit)
            for digit, tree in zip(digits, trees, strict=True)
        ]
        return float(np.abs(together - np.stack(alone)).max())

    def _files(self, wrapped: Any, base: Any, digit: int) -> dict[str, int]:
        """Writes the adapter in each format, and returns the sizes."""
        names = diffusers_rules(base)
        folder = self._out / f"adapter_{digit}"
        folder.mkdir(exist_ok=True)
        lora_jax.save(folder / "orbax", wrapped, overwrite=True)
        files = {
            "diffusers": folder / "pytorch_lora_weights.safetensors",
            "kohya": folder / "kohya.safetensors",
        }
        diffusers.save(files["diffusers"], wrapped, names=names, overwrite=True)
        kohya.save(files["kohya"], wrapped, names=names, overwrite=True)
        sizes = {name: file.stat().st_size for name, file in files.items()}
        return {"orbax": bytes_in(folder / "orbax"), **sizes}


@dataclasses.dataclass(frozen=True)
class _Learned:
    """A trained tree, and what its training cost."""

    wrapped: Any
    cost: Mapping[str, Any]
