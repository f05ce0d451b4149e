"""The four files of a report, from one function."""

import json

from adq.quant.files import atomic_path
from adq.search.folder import StudyFolder
from adq.search.front import Front
from adq.search.report.facts import read_facts
from adq.search.report.table import front_csv

FILES = {"json": "front.json", "csv": "front.csv", "png": "front.png", "html": "report.html"}
FORMATS = tuple(FILES)


def render(folder: StudyFolder, front: Front, format: str) -> bytes:
    """The front in one of FORMATS; texts are UTF-8.

    Raises InputError when a record that the format needs is missing or damaged.
    """
    if format == "json":
        return (json.dumps(front.to_json(), indent=1, allow_nan=False) + "\n").encode()
    if format == "csv":
        return front_csv(front).encode()
    # The drawing code is loaded for whoever draws.
    if format == "png":
        from adq.search.report.charts import picture

        return picture(read_facts(folder, front))
    if format == "html":
        from adq.search.report.page import page

        return page(read_facts(folder, front)).encode()
    raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")


def write_report(folder: StudyFolder, front: Front) -> None:
    """Write front.json, front.csv, front.png and report.html into the study's folder."""
    for format, name in FILES.items():
        content = render(folder, front, format)
        with atomic_path(folder.file(name)) as temporary:
            temporary.write_bytes(content)
