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

from bench.peer_servers.null import Wish, paint

app = FastAPI()

FOLDER = Path(tempfile.mkdtemp())
lock = threading.Lock()
rows = sqlite3.connect(FOLDER / "rows.sqlite3", isolation_level=None, check_same_thread=False)
rows.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; CREATE TABLE requests (name, wish, answer)")


# Not async, as with a model that works: FastAPI calls it on a thread.
@app.post("/generate")
def generate(wish: Wish) -> dict[str, Any]:
    """Paint it."""
    return paint(wish)


@app.post("/kept")
def kept(wish: Wish) -> dict[str, Any]:
    """The same and a picture, each step on the disk before the next: what it takes to lose nothing, by hand."""
    name = uuid.uuid4().hex
    with lock:
        rows.execute("INSERT INTO requests VALUES (?, ?, NULL)", (name, wish.model_dump_json()))
    content = io.BytesIO()
    size = (wish.image_size.width, wish.image_size.height)
    Image.new("RGB", size, (wish.seed % 256, 128, 64)).save(content, "JPEG", quality=95)
    _save(f"{name}.jpg", content.getvalue())
    answer = paint(wish)
    with lock:
        rows.execute("UPDATE requests SET answer = ? WHERE name = ?", (str(answer), name))
    return answer


def _save(name: str, content: bytes) -> None:
    aside = FOLDER / f"{name}.part"
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(FOLDER / name)
    folder = os.open(FOLDER, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
