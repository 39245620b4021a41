"""LoRAs and other adapters that do not fit the model: the answer is a client error that names the field."""

import base64
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx
import numpy
import pytest
from safetensors.numpy import save

from models.loading.specs import DEMO
from models.schema import EXAMPLE_IMAGE
from tests.support.server_process import serving, wait_until_completed
from tests.support.tiny_kinds import control_net_for, ip_adapter_for
from tests.unit.inputs.test_loras import data_uri

ENDPOINT, GENERAL = "fal-ai/flux-lora", "fal-ai/flux-general"
GREY = data_uri((DEMO / "lora" / "grey.safetensors").read_bytes())


@pytest.fixture(scope="module")
def demo_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Open a client of a server with the demo weights."""
    with (
        serving(tmp_path_factory.mktemp("data"), f"{ENDPOINT}=demo", f"{GENERAL}=demo") as server,
        httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False) as client,
    ):
        yield client


def lora(
    *layers: str, inner: int = 8, outer: int = 8, kind: Sequence[str] = ("lora_A", "lora_B"), alpha: int = 0
) -> bytes:
    """Make weights of rank 2 for layers of this size. The alpha of each layer has `alpha` numbers; 0 means no alpha."""
    pairs: dict[str, Any] = {}
    for layer in layers:
        pairs[f"{layer}.{kind[0]}.weight"] = numpy.ones((2, inner), "float32")
        pairs[f"{layer}.{kind[1]}.weight"] = numpy.ones((outer, 2), "float32")
        pairs |= {f"{layer}.alpha": numpy.ones(alpha, "float32")} if alpha else {}
    return save(pairs)


QUERY = "transformer.transformer_blocks.0.attn.to_q"
KOHYA = ("lora_down", "lora_up")
MISFITS = {
    "no part of the model": lora("x"),
    "another model": lora("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"),
    "another model, with kohya's names": lora("lora_unet_input_blocks_1_1_proj_in", kind=KOHYA),
    "the second text encoder alone": lora("text_encoder_2.encoder.block.0.layer.0.SelfAttention.q"),
    "layers that do not exist": lora("transformer.blocks.0.attn.to_q"),
    "layers of the text encoder that do not exist": lora("text_encoder.layers.0.q"),
    "layers of other sizes": lora(QUERY),
    "the right input alone": lora(QUERY, inner=192),
    "an alpha of several numbers": lora(QUERY, inner=192, outer=192, alpha=3),
    "names of a named adapter": lora(QUERY, inner=192, outer=192, kind=("lora_A.default", "lora_B.default")),
    "layers of the text encoder of other sizes": lora("text_encoder.text_model.encoder.layers.0.self_attn.q_proj"),
}


def body(*paths: str) -> dict[str, Any]:
    size = {"width": 64, "height": 64}
    loras = [{"path": path} for path in paths]
    return {"prompt": "a fish", "image_size": size, "num_inference_steps": 1, "seed": 1, "loras": loras}


Answer = tuple[int, httpx.Headers, dict[str, Any]]


def by_run(client: httpx.Client, request: dict[str, Any]) -> Answer:
    answer = client.post(f"/{ENDPOINT}", json=request)
    return answer.status_code, answer.headers, answer.json()


def by_queue(client: httpx.Client, request: dict[str, Any]) -> Answer:
    reply = client.post(f"/queue/{ENDPOINT}", json=request).raise_for_status().json()
    wait_until_completed(client, reply["status_url"])
    answer = client.get(reply["response_url"])
    return answer.status_code, answer.headers, answer.json()


def by_stream(client: httpx.Client, request: dict[str, Any]) -> Answer:
    """Return the last event as the answer. The server then breaks off the stream, so that clients see a failure."""
    events = list[dict[str, Any]]()
    with (
        client.stream("POST", f"/{ENDPOINT}/stream", json=request) as answer,
        pytest.raises(httpx.RemoteProtocolError, match="incomplete"),
    ):
        for line in answer.iter_lines():
            events += [json.loads(line.removeprefix("data: "))] if line.startswith("data: ") else []
    return answer.status_code, answer.headers, events[-1]


@pytest.mark.parametrize("name", MISFITS)
@pytest.mark.parametrize("route", [by_run, by_queue, by_stream])
def test_the_error_names_the_field_and_is_not_retryable(
    demo_client: httpx.Client, route: Callable[[httpx.Client, dict[str, Any]], Answer], name: str
) -> None:
    status, headers, answer = route(demo_client, body(GREY, data_uri(MISFITS[name])))
    # A stream sends status 200 before the error is known.
    assert status == (200 if route is by_stream else 422), answer
    (entry,) = answer["detail"]
    assert (entry["loc"], entry["type"]) == (["body", "loras", 1, "path"], "value_error")
    assert entry["msg"].startswith("These LoRA weights do not fit this model: ")
    assert answer["message"] == f"body.loras.1.path: {entry['msg']}"
    assert "error_type" not in answer
    assert not {"x-fal-retryable", "x-fal-needs-retry", "x-fal-error-type"} & set(headers)


#: Adapters of other kinds that do not fit, in fields of `fal-ai/flux-general`, and what the error says.
OTHER_MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "controlnets": (
        {"path": data_uri(control_net_for(DEMO, 1, joint_attention_dim=24)), "image_url": EXAMPLE_IMAGE},
        "This control net does not fit this model: ",
    ),
    "controlnet_unions": (
        {
            "path": data_uri(control_net_for(DEMO, 1, joint_attention_dim=24, num_mode=10)),
            "controls": [{"control_image_url": EXAMPLE_IMAGE, "control_mode": "canny"}],
        },
        "This control net does not fit this model: ",
    ),
    "control_loras": (
        {"path": GREY, "control_image_url": EXAMPLE_IMAGE},
        "These LoRA weights do not fit this model: ",
    ),
    # It would fit, but the demo has no CLIP that reads its image.
    "ip_adapters": (
        {"path": data_uri(ip_adapter_for(DEMO, 1)), "ip_adapter_image_url": EXAMPLE_IMAGE},
        "IP adapters cannot be used",
    ),
}


@pytest.mark.parametrize("name", OTHER_MISFITS)
def test_the_error_names_the_field_of_any_other_adapter(demo_client: httpx.Client, name: str) -> None:
    adapter, message = OTHER_MISFITS[name]
    request = {"prompt": "a fish", "image_size": {"width": 64, "height": 64}, "num_inference_steps": 1}
    answer = demo_client.post(f"/{GENERAL}", json={**request, name: [adapter]})
    assert answer.status_code == 422, answer.text
    (entry,) = answer.json()["detail"]
    assert (entry["loc"], entry["type"]) == (["body", name, 0, "path"], "value_error")
    assert message in entry["msg"]
    assert demo_client.post(f"/{GENERAL}", json=request).status_code == 200


@pytest.mark.parametrize("is_stream", [False, True])
def test_openais_error_names_the_field(demo_client: httpx.Client, is_stream: bool) -> None:
    """Report an error that is known only after the request was accepted as one that is known before."""
    request = {**body(data_uri(MISFITS["no part of the model"])), "model": ENDPOINT, "stream": is_stream}
    with demo_client.stream("POST", "/v1/images/generations", json=request) as answer:
        lines = answer.iter_lines()
        text = next(line.removeprefix("data: ") for line in lines if line.startswith(("data: ", "{")))
    assert answer.status_code == (200 if is_stream else 400)
    error = json.loads(text)["error"]
    assert (error["type"], error["param"], error["code"]) == (
        "invalid_request_error",
        "loras.0.path",
        "value_error",
    )
    assert error["message"].startswith("loras.0.path: These LoRA weights do not fit this model: ")


@pytest.mark.parametrize("route", [by_run, by_queue, by_stream])
def test_other_requests_run_afterwards(
    demo_client: httpx.Client, route: Callable[[httpx.Client, dict[str, Any]], Answer]
) -> None:
    expected = generate(demo_client, body(GREY))
    assert route(demo_client, body(data_uri(MISFITS["no part of the model"])))[2]["detail"][0]["loc"][2] == 0
    assert generate(demo_client, body(GREY)) == expected


def generate(client: httpx.Client, request: dict[str, Any]) -> bytes:
    """Run a request; return the bytes of its image, which has no metadata that varies with time."""
    answer = client.post(f"/{ENDPOINT}", json={**request, "sync_mode": True, "output_format": "png"})
    return base64.b64decode(answer.raise_for_status().json()["images"][0]["url"].partition(",")[2])
