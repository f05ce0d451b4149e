"""`PATH,size=160,workers=8`: where a task's data is, and its options."""

import re

IMAGE_TASKS = ("imagefolder", "webdataset", "cifar10")
"""Tasks on data at a path, with options behind it."""

OPTIONS = ("size", "batch", "workers")
_OPTION = re.compile(rf",({'|'.join(OPTIONS)})=([^,=]*)$")


def split_options(text: str) -> tuple[str, dict[str, str]]:
    """The path, and the options behind it; a comma that no option's name follows is the path's."""
    options: dict[str, str] = {}
    while (found := _OPTION.search(text)) and found[1] not in options:
        options = {found[1]: found[2], **options}
        text = text[: found.start()]
    return text, options
