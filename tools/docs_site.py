"""What `mkdocs` is told beside mkdocs.yml, so that the same files read well on GitHub and as a site.

Pages of the navigation that do not lie in docs/ are taken from their places in the repository. Links are followed by
where files lie there. What Python-Markdown reads otherwise than GitHub is warned of: an error with `--strict`.
"""

import logging
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File
from pymdownx.slugs import slugify

ROOT = Path(__file__).resolve().parents[1]
DOCS = "docs/"
_FENCE = re.compile(r"^([ ]*)(```+).*?^\1\2[ ]*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[([^\[\]]*)\]\(([^)\s]+)\)")
_IMAGE = re.compile(r'(<img src=")([^"]+)')
_CODE = re.compile(r"<(pre|code)\b.*?</\1>", re.DOTALL)
# Of what a reader sees, code left out: a table, a fence, an item or a link that was not understood.
_NOT_READ = re.compile(r"\|\s*:?---|```|^\s*(?:[-*] |\d+\. )\S.*|\]\([^)]*\)", re.MULTILINE)

log = logging.getLogger("mkdocs.hooks")


def on_config(config):
    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")  # anchors as GitHub's
    return config


def on_files(files, config):
    for name in pages(config.nav):
        if files.get_file_from_path(name) is None and (ROOT / name).is_file():
            files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def pages(nav):
    """The files that a navigation names, at any depth."""
    for entry in nav:
        for below in entry.values() if isinstance(entry, dict) else [entry]:
            yield from [below] if isinstance(below, str) else pages(below)


def on_page_markdown(markdown, page, config, files):
    """Links as the site has them; what GitHub folds away is Markdown for Python-Markdown only if it is told so."""
    name = page.file.src_uri
    lies = DOCS + name if page.file.generated_by is None else name

    def from_here(target):
        """The link to a file of the repository, and that file's place in it; no link where the site lacks it."""
        place = posixpath.normpath(posixpath.join(posixpath.dirname(lies), target))
        there = place.removeprefix(DOCS)
        if files.get_file_from_path(there) is None:
            return None, place
        return posixpath.relpath(there, posixpath.dirname(name) or "."), place

    def link(found):
        text, target = found.groups()
        if target.startswith("#") or re.match(r"[a-z]+:", target):
            return found[0]
        path, hash_sign, anchor = target.partition("#")
        there, place = from_here(path)
        return f"{text} (`{place}`)" if there is None else f"[{text}]({there}{hash_sign}{anchor})"

    def image(found):  # HTML, at which mkdocs does not look
        there, place = from_here(found[2])
        if there is None:
            log.warning("%s: there is no picture %s in the site", name, place)
        return f"{found[1]}{there}"

    def mended(text):
        text = text.replace("<details>", '<details markdown="1">')
        return _LINK.sub(link, _IMAGE.sub(image, text))

    return outside_of_fences(mended, markdown)


def outside_of_fences(change, markdown):
    parts, end = [], 0
    for fence in _FENCE.finditer(markdown):
        parts += [change(markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, change(markdown[end:])])


def on_page_content(html, page, config, files):
    """Lists right below a paragraph, tables in a list and the like, which GitHub shows as what they are."""
    for found in _NOT_READ.finditer(re.sub(r"<[^>]*>", "", _CODE.sub("", html))):
        log.warning("%s: Python-Markdown takes this for text: %s", page.file.src_uri, found[0].strip()[:80])
    return html
