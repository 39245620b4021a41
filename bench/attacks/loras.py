"""Attacks with LoRA files whose headers are long: cheap to send, expensive to read."""

import base64
import itertools
import struct
from collections.abc import Callable

from bench.attacks.attacker import Attack, Round, Target

#: A function that makes a file from the bytes and the number of entries that its header shall have.
Maker = Callable[[int, int], bytes]

#: Bytes of a header that is nearly as long as the format allows: its limit is 100 MB.
LONG_HEADER = 95_000_000
#: Bytes of headers for several LoRAs in one request: as files by URL, and as data URIs that just fit in a body.
SHORT_HEADER, IN_A_BODY = 7_000_000, 3_800_000
#: The most LoRAs that one request may name.
LORAS_PER_REQUEST = 8
#: The number of requests in progress at a time.
_AT_A_TIME = 4
_TENSOR = b'"x.lora_A.weight":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}'
_SETTINGS = {"outbound_allow": "127.0.0.1"}


def file_with_metadata(num_bytes: int, num_entries: int) -> bytes:
    """Make a LoRA of one tensor, with a header of `num_bytes` that has `num_entries` entries of metadata."""
    filler = "v" * (num_bytes // num_entries - len('"k0000000":"",'))
    entries = ",".join(f'"k{number:07}":"{filler}"' for number in range(num_entries))
    return _file(b'{"__metadata__":{' + entries.encode() + b"}," + _TENSOR + b"}", bytes(16))


def file_with_tensors(num_bytes: int, num_tensors: int) -> bytes:
    """Make a file with a header of `num_bytes` that lists `num_tensors` empty tensors."""
    entry = '":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    filler = "x" * (num_bytes // num_tensors - len(f'"0000000.lora_A{entry},'))
    return _file(("{" + ",".join(f'"{n:07}{filler}.lora_A{entry}' for n in range(num_tensors)) + "}").encode(), b"")


def _file(header: bytes, tensors: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + tensors


def _repeat(target: Target, *paths: str) -> Round:
    fields = {"prompt": "", "loras": [{"path": path} for path in paths]}
    content = target.post("/queue/bench/lora", fields)
    return lambda: target.flood(itertools.repeat(content), _AT_A_TIME)


def _metadata(target: Target) -> Round:
    return _repeat(target, target.host_file("a.safetensors", file_with_metadata(LONG_HEADER, 1_000_000)))


def _tensors(target: Target) -> Round:
    return _repeat(target, target.host_file("a.safetensors", file_with_tensors(LONG_HEADER, 1_000_000)))


def _eight_loras(target: Target) -> Round:
    url = target.host_file("a.safetensors", file_with_metadata(SHORT_HEADER, 100_000))
    return _repeat(target, *[url] * LORAS_PER_REQUEST)


def _data_uris(target: Target) -> Round:
    content = base64.b64encode(file_with_metadata(IN_A_BODY, 50_000)).decode()
    return _repeat(target, *[f"data:application/octet-stream;base64,{content}"] * LORAS_PER_REQUEST)


ATTACKS = (
    Attack("lora-metadata", "LoRAs of 95 MB by URL, a million entries of metadata", _metadata, _SETTINGS),
    Attack("lora-tensors", "LoRAs of 95 MB by URL, a million tensors", _tensors, _SETTINGS),
    Attack("lora-eight", "a LoRA with a header of 7 MB by URL, eight times", _eight_loras, _SETTINGS),
    Attack("lora-data", "eight LoRAs as data URIs, as large as a body may be", _data_uris, _SETTINGS),
)
