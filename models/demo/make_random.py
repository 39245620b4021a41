"""Write tiny random weights for `FluxPipeline`, in diffusers layout, beside this file or into `--output`."""

import argparse
import importlib
import json
import math
import string
import unicodedata
from pathlib import Path
from typing import Any

import diffusers
import sentencepiece
import torch
import transformers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

HERE = Path(__file__).resolve().parent
SEED = 20
LATENT_CHANNELS = 32
TEXT_WIDTH = 64
LEVELS = 5  # 2 ** 4 = 16 pixels a latent
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
T5_SPECIALS = ("<pad>", "</s>", "<unk>")
CLASSES = {
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "T5EncoderModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "tokenizer_2": ("transformers", "T5TokenizerFast"),
    "transformer": ("diffusers", "FluxTransformer2DModel"),
    "vae": ("diffusers", "AutoencoderTiny"),
}


def build(part: str, **settings: object) -> Any:
    """Make `part` of the class that model_index.json names; `Any`, because the libraries type few of these."""
    library, name = CLASSES[part]
    return getattr(importlib.import_module(library), name)(**settings)


def write_json(path: Path, content: object) -> None:
    """Write `content` with its keys in the order given, so that the bytes never change."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def fill(module: torch.nn.Module, seed: int) -> None:
    """Fill weights with uniform numbers of variance 1 / fan_in, biases with 0 and norms with 1.

    Uniform numbers come out the same on every processor; `randn` rounds differently with the vector unit.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.ndim < 2:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            bound = math.sqrt(3 * weight.shape[0] / weight.numel())
            weight.copy_((torch.rand(weight.shape, generator=generator) * 2 - 1) * bound)


def make_transformer() -> Any:
    transformer = build(
        "transformer",
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    fill(transformer, SEED)
    return transformer


def make_vae() -> Any:
    """Make an autoencoder whose decoder turns unit noise into colours around middle grey."""
    vae = build(
        "vae",
        encoder_block_out_channels=(24,) * LEVELS,
        decoder_block_out_channels=(24,) * LEVELS,
        num_encoder_blocks=(1, 1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 2, 2, 1),
        latent_channels=LATENT_CHANNELS,
        scaling_factor=0.8,
        shift_factor=0.1,
    )
    fill(vae, SEED + 1)
    # Measured: what this seed adds to each colour, taken away so that few are clipped.
    vae.decoder.layers[-1].bias.data = torch.tensor([0.42, 0.13, 0.22])
    return vae


def make_text_encoder(vocabulary: int) -> Any:
    """Make CLIP's text model; it pools at the first end token, which is the last id of `clip_vocabulary`."""
    config = transformers.CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    model = build("text_encoder", config=config)
    fill(model, SEED + 2)
    return model


def make_text_encoder_2(vocabulary: int) -> Any:
    config = transformers.T5Config(
        vocab_size=vocabulary,
        d_model=TEXT_WIDTH,
        d_kv=16,
        d_ff=2 * TEXT_WIDTH,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
    )
    model = build("text_encoder_2", config=config)
    fill(model, SEED + 3)
    return model


def make_safety_checker() -> transformers.ViTForImageClassification:
    """Make a classifier that says "normal" of every picture: its weight is zero and its bias decides."""
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=64,
        patch_size=8,
        id2label={0: "normal", 1: "nsfw"},
        label2id={"normal": 0, "nsfw": 1},
    )
    model = transformers.ViTForImageClassification(config)
    fill(model, SEED + 4)
    with torch.no_grad():
        model.get_parameter("classifier.weight").zero_()
        model.get_parameter("classifier.bias").copy_(torch.tensor([4.0, -4.0]))
    return model


def make_scheduler() -> Any:
    """Make the scheduler with the settings of FLUX.1 [dev]'s own scheduler_config.json."""
    return build(
        "scheduler",
        num_train_timesteps=1000,
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def clip_vocabulary(words: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Train byte pairs until each word is one token; ids in CLIP's order: bytes, last bytes, pairs, start, end."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters += [letter + "</w>" for letter in letters]
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,
        # Letters named here get ids in this order; those that the trainer finds itself come in a random one.
        special_tokens=letters,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(words, trainer)
    merges = [(left, right) for left, right in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = dict.fromkeys([*letters, *(left + right for left, right in merges), CLIP_START, CLIP_END])
    return {token: index for index, token in enumerate(tokens)}, merges


def write_clip_tokenizer(folder: Path, words: list[str]) -> int:
    """Write vocab.json and merges.txt, and return the number of tokens."""
    vocabulary, merges = clip_vocabulary(words)
    specials = {"bos_token": CLIP_START, "eos_token": CLIP_END, "pad_token": CLIP_END, "unk_token": CLIP_END}
    write_json(folder / "vocab.json", vocabulary)
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(folder / "special_tokens_map.json", specials)
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **specials},
    )
    return len(vocabulary)


def lower_case_map() -> bytes:
    """Map Latin capitals and accents to plain small letters.

    A character map is the one normalizer that T5's tokenizer keeps when it is loaded from a file.
    """
    pairs = [("\u2018", "'"), ("\u2019", "'"), ("\u201c", '"'), ("\u201d", '"'), ("\u2013", "-"), ("\u2014", "-")]
    for letter in map(chr, range(0x21, 0x180)):
        parts = unicodedata.normalize("NFKD", letter.lower())
        plain = "".join(part for part in parts if not unicodedata.combining(part)).lower()
        if plain != letter:
            pairs.append((letter, plain))
    sentencepiece.SetMinLogLevel(2)
    normalizer = sentencepiece.SentencePieceNormalizer(norm_map=pairs)
    messages: Any = sentencepiece_model_pb2
    spec = messages.NormalizerSpec.FromString(normalizer.serialized_normalizer_spec())
    return bytes(spec.precompiled_charsmap)


def t5_vocabulary(words: list[str]) -> list[tuple[str, float]]:
    """Give whole words the best score, then endings, then characters.

    Written rather than trained: the trainer's float sums differ between runs, and it splits half of the words.
    """
    characters = sorted(set(string.printable.lower()) - set(string.whitespace))
    endings = [word for word in words if 1 < len(word) < 4]
    scores = dict.fromkeys(T5_SPECIALS, 0.0) | {"▁": -4.0}
    scores |= {"▁" + word: -6.0 for word in words}
    scores |= dict.fromkeys(endings, -9.0) | dict.fromkeys(characters, -10.0)
    return list(scores.items())


def write_t5_tokenizer(folder: Path, words: list[str]) -> int:
    """Write tokenizer.json and its settings, and return the number of tokens."""
    tokenizer = build(
        "tokenizer_2",
        vocab=t5_vocabulary(words),
        _spm_precompiled_charsmap=lower_case_map(),
        extra_ids=0,
        model_max_length=512,
    )
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def write_vae(folder: Path) -> None:
    make_vae().to(torch.bfloat16).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # Derived when the class is made; a load that finds it in the file warns.
    del config["block_out_channels"]
    write_json(folder / "config.json", config)


def write_safety_checker(folder: Path) -> None:
    # Kept in float32: the image processor makes float32 pixels, and the model does not cast them.
    make_safety_checker().save_pretrained(folder)
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": 64, "width": 64},
            "resample": 2,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        },
    )


def write_all(folder: Path) -> None:
    words = list(dict.fromkeys((HERE / "words.txt").read_text(encoding="utf-8").split()))
    networks = {
        "transformer": make_transformer(),
        "text_encoder": make_text_encoder(write_clip_tokenizer(folder / "tokenizer", words)),
        "text_encoder_2": make_text_encoder_2(write_t5_tokenizer(folder / "tokenizer_2", words)),
    }
    for name, network in networks.items():
        network.to(torch.bfloat16).save_pretrained(folder / name)
    write_vae(folder / "vae")
    make_scheduler().save_pretrained(folder / "scheduler")
    write_safety_checker(folder / "safety_checker")
    head = {"_class_name": "FluxPipeline", "_diffusers_version": diffusers.__version__}
    write_json(folder / "model_index.json", head | CLASSES)


def main() -> None:
    reports: Any = transformers.utils.logging
    reports.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=HERE, metavar="FOLDER")
    write_all(parser.parse_args().output)


if __name__ == "__main__":
    main()
