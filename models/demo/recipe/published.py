"""The weights in this repository, from which training continues as far as they fit."""

import functools
import json
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from models.demo.recipe import checkpoint
from models.demo.recipe.plan import Plan
from models.loading.specs import DEMO

#: The parts of an unfinished training, from which the next one continues. The step `handover` writes them.
AHEAD = Path(os.environ.get("DEMO_AHEAD", Path(__file__).resolve().parent / "ahead"))
PROGRESS = AHEAD / "progress.json"
#: The weights with one row per token, by part of the pipeline, and the part with their tokenizer.
_ROWS = {
    "text_encoder": ("embeddings.token_embedding.weight", "tokenizer", transformers.CLIPTokenizer),
    "text_encoder_2": ("shared.weight", "tokenizer_2", transformers.T5TokenizerFast),
}


@torch.no_grad()
def load_into(network: Any, part: str, tokenizer: Any = None) -> None:
    """Copy the weights of a part of the pipeline into `network` where name and shape agree; leave the others.

    The part comes from AHEAD if it is there, else from the demo weights. The rows of a text encoder's tokens are copied
    by the token's name, because `tokenizer` may have more tokens than that of the demo weights.
    """
    ahead = AHEAD / f"{part}.safetensors"
    (file,) = [ahead] if ahead.is_file() else (DEMO / part).glob("*.safetensors")
    saved = load_file(file)
    if part in _ROWS and file != ahead:
        (name,) = (key for key in saved if key.endswith(_ROWS[part][0]))
        _, tokenizer_directory, kind = _ROWS[part]
        old, new = (
            kind.from_pretrained(DEMO / tokenizer_directory, local_files_only=True).get_vocab(),
            tokenizer.get_vocab(),
        )
        rows = network.state_dict()[name].clone()
        known = [token for token in new if token in old]
        rows[[new[token] for token in known]] = saved[name][[old[token] for token in known]].to(rows)
        saved[name] = rows
    own = network.state_dict()
    fitting = {key: weight for key, weight in saved.items() if key in own and own[key].shape == weight.shape}
    network.load_state_dict(fitting, strict=False)
    checkpoint.log(f"{part}: {len(fitting)} of {len(own)} weights from the repository")


@functools.cache
def _progress() -> dict[str, Any]:
    progress: dict[str, Any] = json.loads(PROGRESS.read_text(encoding="utf-8")) if PROGRESS.is_file() else {}
    return progress


def iterations(plan: Plan, step: str) -> int:
    """Return how many iterations of a step the parts in AHEAD have had; 0 if they are not for this plan."""
    if plan.is_from_scratch or _progress().get("scale") != plan.scale:
        return 0
    return int(_progress()["iterations"].get(step, 0))


def statistics(plan: Plan) -> dict[str, float] | None:
    """Return the scaling and the shift of the latents that the parts in AHEAD were trained with, if there are any."""
    found: dict[str, float] | None = _progress()["latents"] if iterations(plan, "flow") else None
    return found
