"""The tables of the ledger, and how they are made; what is read and written in them is ``disk.book``."""

import secrets
import sqlite3

VERSION = 3
"""Of the tables; a ledger with another one is made anew from the folders."""

SCHEMA = """
CREATE TABLE meta(key TEXT PRIMARY KEY, value) WITHOUT ROWID;
INSERT INTO meta VALUES ('epoch', '{epoch}'), ('seq', 1), ('horizon', 0), ('clock', 0);
CREATE TABLE artifacts(
    name TEXT PRIMARY KEY,
    model TEXT, source TEXT, version TEXT, single TEXT, size INTEGER, fetched REAL, fetch_seconds REAL, bytes INTEGER,
    digest TEXT,
    state INTEGER, owner TEXT, used REAL, uses INTEGER, by TEXT, seq INTEGER
) WITHOUT ROWID;
CREATE INDEX changes ON artifacts(seq) WHERE seq IS NOT NULL;
CREATE INDEX moving ON artifacts(owner) WHERE owner IS NOT NULL;
CREATE TABLE holds(
    id TEXT PRIMARY KEY, owner TEXT, source TEXT, model TEXT,
    reserved INTEGER, charged INTEGER, wanted INTEGER, asked REAL
) WITHOUT ROWID;
CREATE TABLE requests(
    source TEXT, model TEXT, n REAL, first REAL, last REAL, seq INTEGER, PRIMARY KEY (source, model)
) WITHOUT ROWID;
CREATE INDEX asked ON requests(seq);
CREATE TABLE processes(owner TEXT PRIMARY KEY, settings TEXT) WITHOUT ROWID;
CREATE TABLE memory(owner TEXT PRIMARY KEY, scope TEXT, account TEXT) WITHOUT ROWID;
"""


def create(connection: sqlite3.Connection) -> None:
    """Make the tables of a new ledger, inside a transaction."""
    for statement in SCHEMA.format(epoch=secrets.token_hex(8)).split(";"):
        if statement.strip():
            connection.execute(statement)
