"""The export of the trained networks to a directory in diffusers layout."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import torch

from models.demo.recipe import (
    autoencoder,
    checker,
    checkpoint,
    depths,
    flow,
    judge,
    lora,
    pool,
    redux,
    tokens,
    tuning,
)
from models.demo.recipe.plan import WORK, Plan
from models.loading.specs import DEPTH

FOLDER = WORK / "export"
#: The judge, which is not part of the pipeline. It is exported so that later evaluations use the same judge.
JUDGE = "judge/model.safetensors"
#: The LoRA, for trying the endpoints with LoRAs.
LORA = f"lora/{lora.FILE.name}"
CLASSES = {
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "T5EncoderModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "tokenizer_2": ("transformers", "T5TokenizerFast"),
    "transformer": ("diffusers", "FluxTransformer2DModel"),
    "vae": ("diffusers", "AutoencoderTiny"),
}


def _scheduler() -> Any:
    """Build a scheduler with the settings of FLUX.1 [dev]."""
    return diffusers.FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def _write_vae(folder: Path) -> None:
    vae = autoencoder.build(*pool.statistics())
    vae.load_state_dict(autoencoder.load("cpu").state_dict())
    vae.to(torch.bfloat16, memory_format=torch.contiguous_format).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # diffusers derives this entry on loading, and warns if the file has it.
    config.pop("block_out_channels", None)
    tokens.write_json(folder / "config.json", config)


def write(plan: Plan) -> None:
    """Write the pipeline and all that belongs to it into FOLDER, replacing what was there."""
    aside = FOLDER.with_name("export.part")
    shutil.rmtree(aside, ignore_errors=True)
    painter = flow.best(plan)
    for name in ("transformer", "text_encoder", "text_encoder_2"):
        getattr(painter, name).to(torch.bfloat16).save_pretrained(aside / name)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(tokens.FOLDER / name, aside / name)
    _write_vae(aside / "vae")
    _scheduler().save_pretrained(aside / "scheduler")
    checker.export(aside / "safety_checker")
    judge.export(aside / JUDGE)
    redux.export(aside)
    depths.export(aside / DEPTH.directory)
    tuning.export(plan, aside)
    (aside / LORA).parent.mkdir()
    shutil.copy(lora.FILE, aside / LORA)
    head = {"_class_name": "FluxPipeline", "_diffusers_version": diffusers.__version__}
    tokens.write_json(aside / "model_index.json", head | CLASSES)
    shutil.rmtree(FOLDER, ignore_errors=True)
    aside.replace(FOLDER)
    size = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    checkpoint.log(f"export: {FOLDER.name}, {size / 1e6:.1f} MB")
