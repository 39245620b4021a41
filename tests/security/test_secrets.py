"""Planted secrets: after many requests, a search of answers, logs and the database must not find them."""

import os
from pathlib import Path

import httpx
import pytest

from tests.support.server_process import TEST_MODELS, free_port, serving, wait_until_completed

#: Secrets by the way they reach the server. No output may ever contain them.
KEY, OPERATOR, HUB, WEBHOOK = (
    "planted-key-1f3a",
    "planted-operator-9c2e",
    "hf_planted7d41",
    "whsec_cGxhbnRlZC1zZWNyZXQtZm9yLXdlYmhvb2tzIQ==",
)
PROMPT = "planted-prompt-55b0"


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_planted_secrets_are_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_format: str) -> None:
    monkeypatch.setenv("HF_TOKEN", HUB)
    settings = {"keys": f"{KEY},other", "operator_keys": OPERATOR, "webhook_secret": WEBHOOK, "log_level": "debug"}
    texts: list[str] = []
    with serving(
        tmp_path,
        TEST_MODELS,
        log_format=log_format,
        tls_port=str(free_port()),
        outbound_allow="127.0.0.0/8",
        **settings,
    ) as server:
        with httpx.Client(base_url=server.ready().url, timeout=60, trust_env=False) as client:
            mine, boss = ({"authorization": f"Key {key}"} for key in (KEY, OPERATOR))
            answers = [
                client.post("/test/null", json={"prompt": PROMPT}, headers=mine),
                client.post("/test/raises", json={"prompt": PROMPT}, headers=mine),
                client.post("/test/null", json={"prompt": 5}, headers=mine),
                client.post("/test/null", content=b"{", headers=mine),
                client.post("/test/null", json={"prompt": "x"}, headers={"authorization": f"Basic {KEY}"}),
                client.post("/test/null", json={"prompt": "x"}, headers={"authorization": f"Key {KEY}x"}),
                client.get("/status.json", headers=boss),
                client.get("/metrics", headers=boss),
                client.get("/openapi.json"),
                client.get("/playground.json"),
                client.get("/health/ready"),
            ]
            hook = {"fal_webhook": "http://127.0.0.1:8099/hook"}
            queued = client.post("/queue/test/null", params=hook, json={"prompt": PROMPT}, headers=mine).json()
            client.headers.update(mine)
            wait_until_completed(client, queued["status_url"])
            texts = [f"{answer.headers} {answer.text}" for answer in answers]
        # The first answer repeats the prompt of the client, as it should.
        del texts[0]
        assert server.stop() == 0
        server.reader.join()
    database = b"".join(path.read_bytes() for path in tmp_path.glob("queue.sqlite3*"))
    for secret in (KEY, OPERATOR, HUB, WEBHOOK):
        assert secret not in server.output
        assert secret.encode() not in database
        assert not any(secret in text for text in texts)
    assert PROMPT not in server.output
    # The prompt is meant to be stored. Finding it shows that the search works.
    assert PROMPT.encode() in database
    assert os.environ["HF_TOKEN"] == HUB
