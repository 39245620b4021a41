"""The null model behind FastAPI: `uvicorn bench.peer_servers.with_fastapi:app`."""

import io
import os
import sqlite3
import tempfile
import threading
import uuid
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from PIL import Image

from bench.peer_servers.null import GenerationRequest, respond

app = FastAPI()

DIRECTORY = Path(tempfile.mkdtemp())
lock = threading.Lock()
rows = sqlite3.connect(DIRECTORY / "rows.sqlite3", isolation_level=None, check_same_thread=False)
rows.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; CREATE TABLE requests (name, request, response)")


# Not async: as for a real model, FastAPI calls the function on a thread.
@app.post("/generate")
def generate(request: GenerationRequest) -> dict[str, Any]:
    """Return the null response."""
    return respond(request)


@app.post("/kept")
def kept(request: GenerationRequest) -> dict[str, Any]:
    """Write the request, an image and the response to the disk, one after the other, then respond."""
    name = uuid.uuid4().hex
    with lock:
        rows.execute("INSERT INTO requests VALUES (?, ?, NULL)", (name, request.model_dump_json()))
    content = io.BytesIO()
    size = (request.image_size.width, request.image_size.height)
    Image.new("RGB", size, (request.seed % 256, 128, 64)).save(content, "JPEG", quality=95)
    _save(f"{name}.jpg", content.getvalue())
    response = respond(request)
    with lock:
        rows.execute("UPDATE requests SET response = ? WHERE name = ?", (str(response), name))
    return response


def _save(name: str, content: bytes) -> None:
    temp_path = DIRECTORY / f"{name}.part"
    with temp_path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temp_path.rename(DIRECTORY / name)
    directory_fd = os.open(DIRECTORY, os.O_RDONLY)
    os.fsync(directory_fd)
    os.close(directory_fd)
