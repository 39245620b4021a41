"""The database schema, and the steps that migrate an older schema to it."""

import sqlite3
from pathlib import Path

SCHEMA = Path(__file__).with_name("schema.sql")
VERSION = 8
#: SQL by version: each entry migrates a database from the version before it.
_STEPS = {
    2: "ALTER TABLE jobs ADD COLUMN strikes INTEGER NOT NULL DEFAULT 0 CHECK (strikes >= 0)",
    3: "ALTER TABLE jobs ADD COLUMN inputs TEXT NOT NULL DEFAULT '{}'",
    4: """
        ALTER TABLE jobs ADD COLUMN billable_units INTEGER NOT NULL DEFAULT 0 CHECK (billable_units >= 0);
        CREATE TABLE usage (
            owner          TEXT NOT NULL,
            day            TEXT NOT NULL,
            endpoint       TEXT NOT NULL,
            requests       INTEGER NOT NULL CHECK (requests > 0),
            billable_units INTEGER NOT NULL CHECK (billable_units >= 0),
            PRIMARY KEY (owner, day, endpoint)
        ) STRICT, WITHOUT ROWID
    """,
    5: "CREATE INDEX jobs_owner ON jobs (owner, finished_at, sequence) WHERE state = 'COMPLETED' AND is_kept = 1",
    6: """
        ALTER TABLE keys ADD COLUMN name TEXT NOT NULL DEFAULT '';
        ALTER TABLE keys ADD COLUMN scope TEXT NOT NULL DEFAULT 'operator' CHECK (scope IN ('client', 'operator'));
        CREATE UNIQUE INDEX keys_name ON keys (name) WHERE name <> '';
        CREATE INDEX jobs_failed ON jobs (finished_at) WHERE status >= 500
    """,
    7: """
        DROP INDEX jobs_large;
        CREATE TABLE row_sizes (
            request_id  TEXT PRIMARY KEY REFERENCES jobs (request_id) ON DELETE CASCADE,
            owner       TEXT NOT NULL,
            num_bytes   INTEGER NOT NULL CHECK (num_bytes > 0),
            finished_at REAL NOT NULL
        ) STRICT, WITHOUT ROWID;

        CREATE INDEX row_sizes_of ON row_sizes (owner, finished_at);
        CREATE INDEX files_of ON files (owner, created_at);

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

        INSERT INTO kept
            SELECT owner, sum(max(size, 4096)), sum(request_id IS NULL), sum(max(size, 4096) * (request_id IS NULL))
            FROM files GROUP BY owner;
        INSERT INTO row_sizes
            SELECT request_id, owner, 1024 + length(CAST(input || output || coalesce(logs, '') AS BLOB)), finished_at
            FROM jobs WHERE state = 'COMPLETED'
    """,
    8: """
        ALTER TABLE jobs ADD COLUMN dtype TEXT;
        ALTER TABLE jobs ADD COLUMN weights TEXT;
        ALTER TABLE jobs ADD COLUMN memory TEXT
    """,
}


class DataDirInUse(RuntimeError):
    """A data directory that this server must not use: another server is running on it, or a newer version wrote it."""


def migrate(connection: sqlite3.Connection) -> None:
    """Create the schema, or migrate an older one, one transaction per step. Raises DataDirInUse for a newer schema."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > VERSION:
        raise DataDirInUse(
            f"the data directory was written by a newer flux-server (schema {version}; this one knows up to {VERSION});"
            " upgrade flux-server, or choose another --data-dir"
        )
    if version == 0:
        connection.executescript(f"BEGIN IMMEDIATE;\n{SCHEMA.read_text(encoding='utf-8')}\nCOMMIT;")
        return
    for step in range(version + 1, VERSION + 1):
        connection.executescript(f"BEGIN IMMEDIATE;\n{_STEPS[step]};\nPRAGMA user_version = {step};\nCOMMIT;")
