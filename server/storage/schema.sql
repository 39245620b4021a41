-- All tables of the server. Times are seconds since 1970. The constraints refuse inconsistent rows.

CREATE TABLE jobs (
    sequence        INTEGER PRIMARY KEY AUTOINCREMENT,
    request_id      TEXT NOT NULL UNIQUE,
    endpoint        TEXT NOT NULL,
    owner           TEXT NOT NULL,
    mode            TEXT NOT NULL CHECK (mode IN ('queue', 'run', 'stream', 'realtime')),
    priority        TEXT NOT NULL CHECK (priority IN ('normal', 'low')),
    input           TEXT NOT NULL,
    -- The files that the input refers to, by the path of the field: {"image_url": "<SHA-256>.png"}.
    inputs          TEXT NOT NULL DEFAULT '{}',
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
    -- How often the process crashed while it ran this job.
    strikes         INTEGER NOT NULL DEFAULT 0 CHECK (strikes >= 0),
    is_cancelled    INTEGER NOT NULL DEFAULT 0 CHECK (is_cancelled IN (0, 1)),
    submitted_at    REAL NOT NULL,
    started_at      REAL,
    finished_at     REAL,
    fetched_at      REAL,
    status          INTEGER,
    output          TEXT,
    -- Bytes of a large response, which is taken to hold inline images; 0 for a small response.
    output_size     INTEGER NOT NULL DEFAULT 0 CHECK (output_size >= 0),
    error           TEXT,
    error_type      TEXT,
    inference_time  REAL,
    billable_units  INTEGER NOT NULL DEFAULT 0 CHECK (billable_units >= 0),
    -- What the images depend on besides the input and the model; see Provenance in server/queue/jobs.py.
    acceleration    TEXT,
    dtype           TEXT,
    weights         TEXT,
    memory          TEXT,
    logs            TEXT,
    CHECK ((state = 'COMPLETED') = (finished_at IS NOT NULL)),
    CHECK ((state = 'COMPLETED') = (status IS NOT NULL)),
    CHECK ((state = 'COMPLETED') = (output IS NOT NULL)),
    CHECK (state <> 'IN_PROGRESS' OR (attempt > 0 AND started_at IS NOT NULL)),
    CHECK (fetched_at IS NULL OR state = 'COMPLETED'),
    CHECK (NOT is_cancelled OR state <> 'IN_QUEUE'),
    -- A cancelled job has no result.
    CHECK (NOT (is_cancelled AND status = 200))
) STRICT;

CREATE INDEX jobs_queued ON jobs (priority = 'low', sequence) WHERE state = 'IN_QUEUE';
CREATE INDEX jobs_deadline ON jobs (start_deadline) WHERE state = 'IN_QUEUE' AND start_deadline IS NOT NULL;
CREATE INDEX jobs_running ON jobs (sequence) WHERE state = 'IN_PROGRESS';
CREATE INDEX jobs_finished ON jobs (finished_at) WHERE state = 'COMPLETED';
CREATE INDEX jobs_owner ON jobs (owner, finished_at, sequence) WHERE state = 'COMPLETED' AND is_kept = 1;
CREATE INDEX jobs_failed ON jobs (finished_at) WHERE status >= 500;
CREATE UNIQUE INDEX jobs_idempotency ON jobs (owner, endpoint, idempotency_key) WHERE idempotency_key IS NOT NULL;

-- Usage per owner, day (UTC) and endpoint. These rows outlive the requests.
CREATE TABLE usage (
    owner          TEXT NOT NULL,
    day            TEXT NOT NULL,
    endpoint       TEXT NOT NULL,
    requests       INTEGER NOT NULL CHECK (requests > 0),
    billable_units INTEGER NOT NULL CHECK (billable_units >= 0),
    PRIMARY KEY (owner, day, endpoint)
) STRICT, WITHOUT ROWID;

-- A file without a request is an upload.
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

-- Bytes that each finished row of `jobs` counts as. They have their own table, because a row of `jobs` may hold images
-- and is then slow to read.
CREATE TABLE row_sizes (
    request_id  TEXT PRIMARY KEY REFERENCES jobs (request_id) ON DELETE CASCADE,
    owner       TEXT NOT NULL,
    num_bytes   INTEGER NOT NULL CHECK (num_bytes > 0),
    finished_at REAL NOT NULL
) STRICT, WITHOUT ROWID;

CREATE INDEX row_sizes_of ON row_sizes (owner, finished_at);
CREATE INDEX files_of ON files (owner, created_at);

-- Storage used by each owner: finished rows and files, and the uploads among the files. A file counts as at least one
-- disk block of 4096 bytes.
CREATE TABLE kept (
    owner        TEXT PRIMARY KEY,
    num_bytes    INTEGER NOT NULL CHECK (num_bytes >= 0),
    num_uploads  INTEGER NOT NULL CHECK (num_uploads >= 0),
    upload_bytes INTEGER NOT NULL CHECK (upload_bytes >= 0)
) STRICT, WITHOUT ROWID;

CREATE TRIGGER files_kept AFTER INSERT ON files BEGIN
    INSERT INTO kept VALUES (
        NEW.owner, max(NEW.size, 4096), NEW.request_id IS NULL, max(NEW.size, 4096) * (NEW.request_id IS NULL)
    ) ON CONFLICT DO UPDATE SET
        num_bytes = num_bytes + excluded.num_bytes,
        num_uploads = num_uploads + excluded.num_uploads,
        upload_bytes = upload_bytes + excluded.upload_bytes;
END;

CREATE TRIGGER files_gone AFTER DELETE ON files BEGIN
    UPDATE kept SET
        num_bytes = num_bytes - max(OLD.size, 4096),
        num_uploads = num_uploads - (OLD.request_id IS NULL),
        upload_bytes = upload_bytes - max(OLD.size, 4096) * (OLD.request_id IS NULL)
    WHERE owner = OLD.owner;
    DELETE FROM kept WHERE owner = OLD.owner AND num_bytes = 0;
END;

CREATE TRIGGER rows_kept AFTER INSERT ON row_sizes BEGIN
    INSERT INTO kept VALUES (NEW.owner, NEW.num_bytes, 0, 0)
    ON CONFLICT DO UPDATE SET num_bytes = num_bytes + excluded.num_bytes;
END;

CREATE TRIGGER rows_gone AFTER DELETE ON row_sizes BEGIN
    UPDATE kept SET num_bytes = num_bytes - OLD.num_bytes WHERE owner = OLD.owner;
    DELETE FROM kept WHERE owner = OLD.owner AND num_bytes = 0;
END;

-- Unfinished uploads. Each one has a directory for its parts.
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

-- Webhooks of finished requests.
CREATE TABLE deliveries (
    request_id   TEXT PRIMARY KEY REFERENCES jobs (request_id) ON DELETE CASCADE,
    url          TEXT NOT NULL,
    attempt      INTEGER NOT NULL DEFAULT 0 CHECK (attempt >= 0),
    due_at       REAL,
    delivered_at REAL,
    error        TEXT,
    -- A finished delivery, whether delivered or given up, has no due time.
    CHECK (delivered_at IS NULL OR due_at IS NULL)
) STRICT, WITHOUT ROWID;

CREATE INDEX deliveries_due ON deliveries (due_at) WHERE due_at IS NOT NULL;

CREATE TABLE signing_keys (
    key_id     TEXT PRIMARY KEY,
    private    BLOB NOT NULL CHECK (length(private) = 32),
    created_at REAL NOT NULL
) STRICT, WITHOUT ROWID;

-- Random bytes, made once for this data directory.
CREATE TABLE secrets (
    name  TEXT PRIMARY KEY,
    value BLOB NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE keys (
    hash       TEXT PRIMARY KEY CHECK (length(hash) = 64),
    owner      TEXT NOT NULL,
    created_at REAL NOT NULL,
    -- The automatic key, which the server itself creates when it needs a key and has none, has no name.
    name       TEXT NOT NULL DEFAULT '',
    scope      TEXT NOT NULL DEFAULT 'operator' CHECK (scope IN ('client', 'operator'))
) STRICT, WITHOUT ROWID;

CREATE UNIQUE INDEX keys_name ON keys (name) WHERE name <> '';

PRAGMA user_version = 8;
