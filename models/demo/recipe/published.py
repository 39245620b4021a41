"""The weights in this repository, from which training continues as far as they fit."""

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from models.demo.recipe import checkpoint
from models.loading.specs import DEMO

#: The directory of parts that are trained further than those of the pipeline; the next training starts from them.
AHEAD = Path(__file__).resolve().parent / "ahead"
#: The weights with one row per token, by part of the pipeline, and the part with their tokenizer.
_ROWS = {
    "text_encoder": ("embeddings.token_embedding.weight", "tokenizer", transformers.CLIPTokenizer),
    "text_encoder_2": ("shared.weight", "tokenizer_2", transformers.T5TokenizerFast),
}


@torch.no_grad()
def load_into(network: Any, part: str, tokenizer: Any = None) -> None:
    """Copy the weights of a part of the pipeline into `network` where name and shape agree; leave the others.

    The rows of a text encoder's tokens are copied by the token's name, because `tokenizer` may have more tokens.
    """
    ahead = AHEAD / f"{part}.safetensors"
    (file,) = [ahead] if ahead.is_file() else (DEMO / part).glob("*.safetensors")
    saved = load_file(file)
    if part in _ROWS:
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
