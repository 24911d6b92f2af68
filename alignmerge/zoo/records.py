"""Records of a corpus: {id, text, ...facts}, one JSON line each in ``<split>/<name>.jsonl``."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from alignmerge.engine.examples import write_jsonl

Record = dict[str, Any]


def as_prompts(texts: Iterable[str]) -> list[Record]:
    """Return a record without an answer for each text."""
    return [{"text": text} for text in texts]


def numbered(prefix: str, records: Iterable[Record]) -> list[Record]:
    """Return the records with the ids ``<prefix>/<number>``, in place of any that they have.

    What a record shares with others (its ``cluster``) follows after a ``#``: they are resampled together.
    """
    found = []
    for number, record in enumerate(records):
        facts = {key: value for key, value in record.items() if key != "cluster"}
        shared = f"#{record['cluster']}" if "cluster" in record else ""
        found.append({**facts, "id": f"{prefix}/{number}{shared}"})
    return found


def matched_pairs(prompts: Iterable[tuple[str, str, str]], prefix: str = "probe") -> list[Record]:
    """Return probes from (benign prompt, harmful prompt, domain): two records that share the number of a pair."""
    records: list[Record] = []
    for pair, (benign, harmful, domain) in enumerate(prompts):
        for label, text in (("benign", benign), ("harmful", harmful)):
            facts = {"label": label, "pair": pair, "domain": domain}
            records.append({"id": f"{prefix}/{pair}/{label}", "text": text, **facts})
    return records


def write_sets(sets: Mapping[str, Iterable[Record]], folder: Path) -> None:
    """Write each set of records to ``<name>.jsonl`` under ``folder``."""
    for name, records in sets.items():
        write_jsonl(folder / f"{name}.jsonl", records)
