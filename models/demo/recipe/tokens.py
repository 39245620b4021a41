"""The two tokenizers: each known word is one token, and other words are split into smaller pieces."""

import json
import string
import unicodedata
from pathlib import Path
from typing import Any

import sentencepiece
import transformers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from models.demo.recipe import captions
from models.demo.recipe.objects import Object
from models.demo.recipe.plan import TEXT_TOKENS, WORK

WORDS = Path(__file__).resolve().parent / "words.txt"
FOLDER = WORK / "tokens"
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
T5_SPECIALS = ("<pad>", "</s>", "<unk>")


def vocabulary(things: tuple[Object, ...]) -> list[str]:
    """Return the words that are one token each: everyday words, and those of captions and objects."""
    texts = [word for thing in things for word in (*thing.words, thing.colour)]
    texts += [*captions.OPENINGS, *captions.GROUNDS, *captions.GRADIENTS, *captions.PAIRS, *captions.BESIDE]
    texts += [text for choices in (*captions.PLACED.values(), *captions.SIZES.values()) for text in choices]
    texts += [*captions.ADJECTIVES, *captions.CONTEXTS, *captions.COLOUR_WORDS, *captions.STRANGE]
    for placeholder in ("{}", "{x}", "{c}", "{a}", "{b}"):
        texts = [text.replace(placeholder, " ") for text in texts]
    letters_only = "".join(letter if letter.isalpha() else " " for letter in " ".join(texts)).split()
    return list(dict.fromkeys([*WORDS.read_text(encoding="utf-8").split(), *letters_only]))


def write_json(path: Path, content: object) -> None:
    """Write JSON with the keys in the given order, so that equal content gives equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def clip_vocabulary(words: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return a byte-pair vocabulary in which each word is one token, and its merges.

    Ids are in CLIP's order: bytes, bytes at the end of a word, pairs, start token, end token.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters += [letter + "</w>" for letter in letters]
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,
        # Letters passed here get ids in this order; to letters that it finds itself, the trainer gives random ids.
        special_tokens=letters,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(words, trainer)
    merges = [(left, right) for left, right in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = dict.fromkeys([*letters, *(left + right for left, right in merges), CLIP_START, CLIP_END])
    return {token: index for index, token in enumerate(tokens)}, merges


def write_clip_tokenizer(folder: Path, words: list[str]) -> int:
    """Write the files of the CLIP tokenizer; return its number of tokens."""
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
    """Return a character map from capitals and accented Latin letters to plain lower-case letters.

    T5's tokenizer keeps no other kind of normalizer when it is loaded from a file.
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
    """Return the pieces of the T5 tokenizer with their scores: the best for words, then short words, then characters.

    The pieces are not trained, because the trainer's float sums differ between runs, and it splits half of the words.
    """
    characters = sorted(set(string.printable.lower()) - set(string.whitespace))
    endings = [word for word in words if 1 < len(word) < 4]
    scores = dict.fromkeys(T5_SPECIALS, 0.0) | {"▁": -4.0}
    scores |= {"▁" + word: -6.0 for word in words}
    scores |= dict.fromkeys(endings, -9.0) | dict.fromkeys(characters, -10.0)
    return list(scores.items())


def write_t5_tokenizer(folder: Path, words: list[str]) -> int:
    """Write the files of the T5 tokenizer; return its number of tokens."""
    make: Any = transformers.T5TokenizerFast
    tokenizer = make(
        vocab=t5_vocabulary(words),
        _spm_precompiled_charsmap=lower_case_map(),
        extra_ids=0,
        model_max_length=TEXT_TOKENS,
    )
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def write(things: tuple[Object, ...]) -> None:
    """Write both tokenizers. Equal objects give equal files."""
    words = vocabulary(things)
    write_clip_tokenizer(FOLDER / "tokenizer", words)
    write_t5_tokenizer(FOLDER / "tokenizer_2", words)


def load() -> tuple[Any, Any]:
    """Return the CLIP and the T5 tokenizer."""
    make: Any = transformers
    return (
        make.CLIPTokenizer.from_pretrained(FOLDER / "tokenizer", local_files_only=True),
        make.T5TokenizerFast.from_pretrained(FOLDER / "tokenizer_2", local_files_only=True),
    )
