-- The queue's tables. Times are seconds since 1970; a row that makes no sense is refused.

CREATE TABLE jobs (
    sequence        INTEGER PRIMARY KEY AUTOINCREMENT,
    request_id      TEXT NOT NULL UNIQUE,
    endpoint        TEXT NOT NULL,
    owner           TEXT NOT NULL,
    mode            TEXT NOT NULL CHECK (mode IN ('queue', 'run', 'stream', 'realtime')),
    priority        TEXT NOT NULL CHECK (priority IN ('normal', 'low')),
    input           TEXT NOT NULL,
    base_url        TEXT NOT NULL,
    webhook_url     TEXT,
    idempotency_key TEXT,
    body_hash       TEXT NOT NULL,
    start_deadline  REAL,
    is_kept         INTEGER NOT NULL CHECK (is_kept IN (0, 1)),
    file_lifetime   REAL,
    is_private      INTEGER NOT NULL CHECK (is_private IN (0, 1)),
    state           TEXT NOT NULL CHECK (state IN ('IN_QUEUE', 'IN_PROGRESS', 'COMPLETED')),
    attempt         INTEGER NOT NULL DEFAULT 0 CHECK (attempt >= 0),
    -- How often the process had to end because of it.
    strikes         INTEGER NOT NULL DEFAULT 0 CHECK (strikes >= 0),
    is_cancelled    INTEGER NOT NULL DEFAULT 0 CHECK (is_cancelled IN (0, 1)),
    submitted_at    REAL NOT NULL,
    started_at      REAL,
    finished_at     REAL,
    fetched_at      REAL,
    status          INTEGER,
    output          TEXT,
    -- Bytes of an answer that holds its pictures itself; 0 for those that only name them.
    output_size     INTEGER NOT NULL DEFAULT 0 CHECK (output_size >= 0),
    error           TEXT,
    error_type      TEXT,
    inference_time  REAL,
    acceleration    TEXT,
    logs            TEXT,
    CHECK ((state = 'COMPLETED') = (finished_at IS NOT NULL)),
    CHECK ((state = 'COMPLETED') = (status IS NOT NULL)),
    CHECK ((state = 'COMPLETED') = (output IS NOT NULL)),
    CHECK (state <> 'IN_PROGRESS' OR (attempt > 0 AND started_at IS NOT NULL)),
    CHECK (fetched_at IS NULL OR state = 'COMPLETED'),
    CHECK (NOT is_cancelled OR state <> 'IN_QUEUE'),
    -- A cancelled job has no picture to show.
    CHECK (NOT (is_cancelled AND status = 200))
) STRICT;

CREATE INDEX jobs_queued ON jobs (priority = 'low', sequence) WHERE state = 'IN_QUEUE';
CREATE INDEX jobs_deadline ON jobs (start_deadline) WHERE state = 'IN_QUEUE' AND start_deadline IS NOT NULL;
CREATE INDEX jobs_running ON jobs (sequence) WHERE state = 'IN_PROGRESS';
CREATE INDEX jobs_finished ON jobs (finished_at) WHERE state = 'COMPLETED';
CREATE INDEX jobs_large ON jobs (finished_at, output_size) WHERE output_size > 0;
CREATE UNIQUE INDEX jobs_idempotency ON jobs (owner, endpoint, idempotency_key) WHERE idempotency_key IS NOT NULL;

-- A file without a request is one that its owner uploaded.
CREATE TABLE files (
    name         TEXT PRIMARY KEY,
    request_id   TEXT REFERENCES jobs (request_id) ON DELETE CASCADE,
    owner        TEXT NOT NULL,
    size         INTEGER NOT NULL CHECK (size >= 0),
    content_type TEXT NOT NULL,
    file_name    TEXT,
    is_private   INTEGER NOT NULL CHECK (is_private IN (0, 1)),
    created_at   REAL NOT NULL,
    expires_at   REAL
) STRICT, WITHOUT ROWID;

CREATE INDEX files_of_job ON files (request_id) WHERE request_id IS NOT NULL;
CREATE INDEX files_uploaded ON files (owner, size) WHERE request_id IS NULL;
CREATE INDEX files_age ON files (created_at);
CREATE INDEX files_expiry ON files (expires_at) WHERE expires_at IS NOT NULL;

-- Uploads under way; their parts lie in a folder of the upload's own.
CREATE TABLE uploads (
    upload_id    TEXT PRIMARY KEY,
    name         TEXT NOT NULL UNIQUE,
    owner        TEXT NOT NULL,
    content_type TEXT NOT NULL,
    file_name    TEXT NOT NULL,
    is_private   INTEGER NOT NULL CHECK (is_private IN (0, 1)),
    lifetime     REAL,
    created_at   REAL NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE deliveries (
    request_id   TEXT PRIMARY KEY REFERENCES jobs (request_id) ON DELETE CASCADE,
    url          TEXT NOT NULL,
    attempt      INTEGER NOT NULL DEFAULT 0 CHECK (attempt >= 0),
    due_at       REAL,
    delivered_at REAL,
    error        TEXT,
    -- Done means delivered or given up; only what is not done is due.
    CHECK (delivered_at IS NULL OR due_at IS NULL)
) STRICT, WITHOUT ROWID;

CREATE INDEX deliveries_due ON deliveries (due_at) WHERE due_at IS NOT NULL;

CREATE TABLE signing_keys (
    key_id     TEXT PRIMARY KEY,
    private    BLOB NOT NULL CHECK (length(private) = 32),
    created_at REAL NOT NULL
) STRICT, WITHOUT ROWID;

-- Random bytes made once for this data folder.
CREATE TABLE secrets (
    name  TEXT PRIMARY KEY,
    value BLOB NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE keys (
    hash       TEXT PRIMARY KEY CHECK (length(hash) = 64),
    owner      TEXT NOT NULL,
    created_at REAL NOT NULL
) STRICT, WITHOUT ROWID;

PRAGMA user_version = 2;
