"""The work of a request's steps, in floating point operations, which the scheduler charges to its client."""

import math
from collections.abc import Sequence
from typing import Any

from models.flux import kontext, real_cfg
from models.flux.flops import step_flops
from models.flux.input_images import InputImages
from models.flux.prompt_cache import FLUX_TEXT_TOKENS


def step_work(engine: Any, request: Any, size: tuple[int, int], images: InputImages) -> int:
    """Return the work of one step of one image of `size`, (width, height) in pixels, without that of control nets."""
    num_text_tokens = FLUX_TEXT_TOKENS if images.prompt else engine.num_text_tokens
    if engine.redux and (images.prompt or images.after_prompt):
        num_text_tokens += engine.redux.num_image_tokens
    num_tokens = math.prod(size) // engine.multiple**2
    if images.reference:
        num_tokens += math.prod(kontext.trained_size(images.reference, engine.multiple)) // engine.multiple**2
    num_forwards = 2 if real_cfg.is_used(request) else 1
    return num_forwards * step_flops(engine.pipeline.transformer.config, num_tokens, num_text_tokens)


def work_of_control_nets(engine: Any, nets: Sequence[Any], size: tuple[int, int]) -> int:
    """Return the work of control nets in one step of one image of `size`, (width, height) in pixels."""
    num_tokens = math.prod(size) // engine.multiple**2
    configs = [{**net.config, "out_channels": net.config.in_channels} for net in nets]
    return sum(step_flops(config, num_tokens, engine.num_text_tokens) for config in configs)
