"""The handover of an unfinished training to another machine, by the parts in the repository."""

import torch
from safetensors.torch import save_file, save_model

from models.demo.recipe import autoencoder, checkpoint, flow, judge, networks, pool, reading, tokens
from models.demo.recipe.plan import Plan
from models.demo.recipe.published import AHEAD, PROGRESS

#: The steps whose checkpoints are handed over, and the files of these.
FILES = {"autoencoder": autoencoder.FILE, "judge": judge.FILE, "reading": reading.FILE, "flow": flow.FILE}


def write(plan: Plan) -> None:
    """Write the autoencoder and the average weights of the flow to AHEAD in bf16, the judge, and the progress so far.

    The state of the optimizers is not handed over. Raises FileNotFoundError if a step has no checkpoint yet.
    """
    saved = {step: checkpoint.load(file) for step, file in FILES.items()}
    for step, found in saved.items():
        if found is None:
            raise FileNotFoundError(FILES[step])
    AHEAD.mkdir(parents=True, exist_ok=True)
    painter = networks.Painter(plan)
    painter.load_state_dict(saved["flow"]["average"], strict=False)
    vae = autoencoder.build()
    vae.load_state_dict(saved["autoencoder"]["vae"])
    parts = {name: getattr(painter, name) for name in ("transformer", "text_encoder", "text_encoder_2")}
    for name, part in {"vae": vae, **parts}.items():
        save_model(part.to(torch.bfloat16), str(AHEAD / f"{name}.safetensors"))
    save_file(saved["judge"]["network"], AHEAD / judge.JUDGE)
    scaling, shift = pool.statistics()
    iterations = {step: found["iteration"] for step, found in saved.items()}
    latents = {"scaling_factor": scaling, "shift_factor": shift}
    tokens.write_json(PROGRESS, {"scale": plan.scale, "iterations": iterations, "latents": latents})
    checkpoint.log(f"handover: {iterations}")
