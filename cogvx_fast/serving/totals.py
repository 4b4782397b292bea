"""What is counted since a database was made."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError


def table(metadata: sa.MetaData) -> sa.Table:
    """The table of what was counted, by name."""
    return sa.Table(
        "totals",
        metadata,
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("value", sa.Float, nullable=False),
    )


def add(connection: sa.Connection, totals: sa.Table, name: str, amount: float = 1) -> None:
    """Count in the transaction of what is counted."""
    added = totals.update().where(totals.c.name == name).values(value=totals.c.value + amount)
    if connection.execute(added).rowcount:
        return
    try:
        with connection.begin_nested():
            connection.execute(totals.insert().values(name=name, value=amount))
    except IntegrityError:  # another was quicker
        connection.execute(added)
