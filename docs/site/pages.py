"""The pages of the documentation are files of the repository, under the paths that they have there.

So a link that works in the repository works in the built pages too. Studies need no entry in
mkdocs.yml: each README below studies/ becomes a page, and docs/results.md lists them with their
numbers, read from summary.json when the pages are built.
"""

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=[)#])")
LIST_HERE = "<!-- the studies -->"


def pages() -> list[Path]:
    """Every Markdown file of the documentation."""
    own = [ROOT / f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING")]
    return [*own, *sorted((ROOT / "docs").glob("*.md")), *studies()]


def studies() -> list[Path]:
    """Those with a README; a study's virtual environments, say, lie deeper or are hidden."""
    folder = ROOT / "studies"
    found = [*folder.glob("[!.]*/README.md"), *folder.glob("[!.]*/[!.]*/README.md")]
    return sorted(found, key=lambda path: (len(path.parts), path))  # benchmarks come last


def linked(page: Path) -> set[Path]:
    """The files of the repository that a page shows or links to, but for pages."""
    targets = {(page.parent / link).resolve() for link in LINK.findall(page.read_text())}
    return {t for t in targets if t.is_file() and t.suffix != ".md" and t.is_relative_to(ROOT)}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    [results] = [entry["Results"] for entry in config.nav or [] if "Results" in entry]
    results += [str(path.relative_to(ROOT)) for path in studies()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path in [*pages(), *sorted(set().union(*map(linked, pages())))]:
        files.append(
            File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path))
        )
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    source = page.file.abs_src_path
    if source is None:
        return markdown
    folder = Path(source).parent

    def to_page(match: re.Match[str]) -> str:
        """A link to a folder means its README, as on the repository's pages."""
        link = match[1]
        is_folder = (folder / link / "README.md").is_file()
        return f"{link.rstrip('/')}/README.md" if is_folder else link

    if LIST_HERE in markdown:
        markdown = markdown.replace(LIST_HERE, study_list())
    return LINK.sub(to_page, markdown)


def study_list() -> str:
    """Each study with numbers: its title, its first paragraph, and what its report claims."""
    measured = [path for path in studies() if path.with_name("summary.json").exists()]
    return "\n\n".join(map(_entry, measured))


def _entry(path: Path) -> str:
    title, _, rest = path.read_text().removeprefix("# ").partition("\n\n")
    numbers = json.loads(path.with_name("summary.json").read_text())
    rows = [f"    | `{name}` | {_shown(value)} |" for name, value in numbers.items()]
    return "\n\n".join(
        [
            f"## [{title}](../{path.relative_to(ROOT).as_posix()})",
            rest.partition("\n\n")[0],
            f'??? note "{len(rows)} numbers"',
            "\n".join(["    | number | value |", "    | --- | --- |", *rows]),
        ]
    )


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
