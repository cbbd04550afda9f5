"""AdamW as the studies on text use it: warm-up, a fall to 0, and gradients that are clipped."""

import optax

GREATEST_GRADIENT = 1.0


def warmed_up(greatest: float, *, warmup: float, steps: int) -> optax.Schedule:
    """Returns the learning rate of each step, which rises from 0 and falls to 0.

    Args:
      greatest: the greatest learning rate.
      warmup: the share of steps in which it rises.
      steps: how many steps there are.
    """
    rising = min(max(1, round(warmup * steps)), steps - 1) if warmup else 0
    return optax.warmup_cosine_decay_schedule(0.0 if rising else greatest, greatest, rising, steps)


def clipped_adamw(rates: optax.Schedule, *, weight_decay: float) -> optax.GradientTransformation:
    """Returns AdamW with these learning rates, and gradients clipped to `GREATEST_GRADIENT`."""
    return optax.chain(
        optax.clip_by_global_norm(GREATEST_GRADIENT),
        optax.adamw(rates, weight_decay=weight_decay),
    )
