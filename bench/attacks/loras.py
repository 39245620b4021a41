"""LoRA files whose headers are long: little to send, much to read."""

import base64
import itertools
import struct
from collections.abc import Callable

from bench.attacks.attacker import Attack, Round, Target

#: Makes a file of a header of so many bytes with so many entries.
Maker = Callable[[int, int], bytes]

#: Bytes of a header that is as long as the format allows, nearly: its own bound is 100 MB.
LONG_HEADER = 95_000_000
#: Of one that is small enough for several in a request; and of one of those as data URIs, which a body may just hold.
SHORT_HEADER, IN_A_BODY = 7_000_000, 3_800_000
#: How many LoRAs one request may name.
MANY = 8
#: How many requests are under way at a time.
_AT_A_TIME = 4
_TENSOR = b'"x.lora_A.weight":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}'
_SETTINGS = {"outbound_allow": "127.0.0.1"}


def file_with_metadata(num_bytes: int, num_entries: int) -> bytes:
    """A LoRA of one tensor whose header is so long, with so many entries of metadata."""
    filler = "v" * (num_bytes // num_entries - len('"k0000000":"",'))
    entries = ",".join(f'"k{number:07}":"{filler}"' for number in range(num_entries))
    return _file(b'{"__metadata__":{' + entries.encode() + b"}," + _TENSOR + b"}", bytes(16))


def file_with_tensors(num_bytes: int, num_tensors: int) -> bytes:
    """A file whose header is so long, with so many tensors, all of them empty."""
    about = '":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    filler = "x" * (num_bytes // num_tensors - len(f'"0000000.lora_A{about},'))
    return _file(("{" + ",".join(f'"{n:07}{filler}.lora_A{about}' for n in range(num_tensors)) + "}").encode(), b"")


def _file(header: bytes, tensors: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + tensors


def _again_and_again(target: Target, *paths: str) -> Round:
    fields = {"prompt": "", "loras": [{"path": path} for path in paths]}
    content = target.post("/queue/bench/lora", fields)
    return lambda: target.flood(itertools.repeat(content), _AT_A_TIME)


def _metadata(target: Target) -> Round:
    return _again_and_again(target, target.hosted("a.safetensors", file_with_metadata(LONG_HEADER, 1_000_000)))


def _tensors(target: Target) -> Round:
    return _again_and_again(target, target.hosted("a.safetensors", file_with_tensors(LONG_HEADER, 1_000_000)))


def _eight(target: Target) -> Round:
    address = target.hosted("a.safetensors", file_with_metadata(SHORT_HEADER, 100_000))
    return _again_and_again(target, *[address] * MANY)


def _data_uris(target: Target) -> Round:
    content = base64.b64encode(file_with_metadata(IN_A_BODY, 50_000)).decode()
    return _again_and_again(target, *[f"data:application/octet-stream;base64,{content}"] * MANY)


ATTACKS = (
    Attack("lora-metadata", "LoRAs of 95 MB by address, a million entries of metadata", _metadata, _SETTINGS),
    Attack("lora-tensors", "LoRAs of 95 MB by address, a million tensors", _tensors, _SETTINGS),
    Attack("lora-eight", "eight times a LoRA with a header of 7 MB, by address", _eight, _SETTINGS),
    Attack("lora-data", "eight LoRAs as data URIs, as large as a body may be", _data_uris, _SETTINGS),
)
