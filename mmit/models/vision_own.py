"""Vision encoders of a user's own: `module:name` of a function that builds an `Encoder`.

In: a spec. Out: the builder, called as those of open_clip, timm and transformers are; its encoder is tried on a grey
picture. Refuses features of another shape than the encoder states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mmit.errors import MmitError, ModelError
from mmit.models.vision_encoder import Encoder, Reader, Reading
from mmit.plugins import own_function

TAKES = ("weights", "layer", "select", "image_size", "normalize")


def own_builder(spec: str) -> Callable[..., Encoder]:
    """Import a function (name, *, weights, layer, select, image_size, normalize) -> Encoder.

    Raises ConfigError: it cannot be imported or called so. What is returned raises ModelError where the function fails
    or its encoder is none.
    """
    gives = "mmit.models.vision_encoder.Encoder"
    function = own_function(spec, positional=("name",), keywords=TAKES, gives=gives, where="model.vision.kind")

    def build(name: Any, reading: Reading) -> Encoder:
        where = f"vision encoder {spec}"
        try:
            encoder = function(name, **{option: getattr(reading, option) for option in TAKES})
        except MmitError:
            raise
        except Exception as error:
            remedy = f"it is called with a name and {', '.join(TAKES)}"
            raise ModelError(f"raised {type(error).__name__}: {error}", where=where, remedy=remedy) from error
        if not isinstance(encoder, Encoder) or not isinstance(encoder.reader, Reader):
            problem = f"returned a {type(encoder).__name__}"
            raise ModelError(problem, where=where, remedy=f"return a {gives} whose reader is a Reader")
        _try(encoder, where)
        return encoder

    return build


@torch.no_grad()
def _try(encoder: Encoder, where: str) -> None:
    if encoder.native is not None:  # whose units come with grids: `VisionTower` checks these
        return
    reader = encoder.reader
    weight = next(reader.parameters(), torch.empty(0))
    dtype = torch.uint8 if reader.own_constants else weight.dtype
    try:
        out = reader.eval()(torch.zeros(1, 3, *encoder.image_size, dtype=dtype, device=weight.device))
    except MmitError:
        raise
    except Exception as error:
        problem = f"its reader raised {type(error).__name__}: {error}"
        remedy = f"it is called with pixels (B, 3, {encoder.image_size[0]}, {encoder.image_size[1]})"
        raise ModelError(problem, where=where, remedy=remedy) from error
    expected = (1, encoder.prefix + encoder.grid[0] * encoder.grid[1], encoder.dim)
    if tuple(getattr(out, "shape", ())) != expected:
        problem = f"gives features {tuple(getattr(out, 'shape', ())) or type(out).__name__}, and states {expected}"
        raise ModelError(problem, where=where, remedy="state prefix, grid and dim of what the reader gives")
