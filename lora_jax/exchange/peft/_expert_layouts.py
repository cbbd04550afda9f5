"""On which side of a parameter PEFT's versions put which factor.

PEFT adapts a parameter as such (`target_parameters`) by a change B · A of each of its matrices, as
it is stored: A multiplies its last axis or the one before, B the other. Which of them has changed:

- of a parameter of one matrix, A always multiplies the last axis;
- of a stack of experts, up to 0.18 A multiplies the axis before;
- in 0.19.0 so it does, but where the module says `is_transposed`, that its experts are stored
  (experts, in, out), there it multiplies the last axis;
- from 0.19.1 on it is the reverse of that, so that A always multiplies the inputs.

No file says which of these it is, but the shapes do where inputs and outputs differ in number, and
otherwise the version of PEFT, which configs name from 0.18.0 on. PEFT itself does not look at
either, and computes with the square experts of an earlier version the wrong way round.

Source: peft.tuners.lora.layer.ParamWrapper, `update_layer` and `get_delta_weight`, of 0.17.0,
0.18.1, 0.19.0, 0.19.1 and 0.21.2.
"""

import dataclasses
import re

from lora_jax.exchange.peft._layout import Layout, Shape

# The first version that reads the layout which is written here.
WRITTEN_AS = "0.19.1"

_Release = tuple[int, int, int]


def written_layout(layout: Layout) -> Layout:
    """Returns the layout that PEFT reads today."""
    return _with_A_at(layout, is_last=_reads_last_axis(layout, (0, 19, 1)))


def file_layout(layout: Layout, A_shape: Shape, version: str | None) -> Layout | None:
    """Returns the layout of a file that a version of PEFT wrote; None where that can't be told."""
    if layout.kind != "parameter":
        return layout
    if layout.inputs != layout.outputs:
        return dataclasses.replace(layout, swapped=A_shape[-1:] == (layout.outputs,))
    # Those without a version are of PEFT up to 0.17, or of another program that writes as it does.
    possible = _releases(version)
    layouts = {
        _with_A_at(layout, is_last=_reads_last_axis(layout, release)) for release in possible
    }
    return layouts.pop() if len(layouts) == 1 else None


def is_written_as_now(version: str | None) -> bool:
    """Says whether a version of PEFT writes as is done here."""
    return all(release >= (0, 19, 1) for release in _releases(version))


def _with_A_at(layout: Layout, *, is_last: bool) -> Layout:
    if layout.kind != "parameter":
        return layout
    return dataclasses.replace(layout, swapped=is_last == layout.transposed)


def _reads_last_axis(layout: Layout, release: _Release) -> bool:
    if layout.experts == 1:
        return True
    if release >= (0, 19, 1):
        return not layout.transposed
    return layout.transposed and release == (0, 19, 0)


def _releases(version: str | None) -> tuple[_Release, ...]:
    """Returns the releases that a version may write like."""
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version or "")
    if found is None:
        return (0, 17, 0), (0, 19, 1)
    major, minor, patch = (int(number or 0) for number in found.groups())
    release = (major, minor, patch)
    is_between = (0, 18, 0) < release <= (0, 19, 1) and "dev" in (version or "")
    return ((0, 18, 0), (0, 19, 0), (0, 19, 1)) if is_between else (release,)
