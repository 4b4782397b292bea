"""What `mkdocs` is told beside mkdocs.yml, so that the same files read well on GitHub and as a site.

The README and what lies beside the code become pages, too; links are followed by where files lie in the repository; and
what Python-Markdown reads otherwise than GitHub is warned of, which `--strict` makes an error.
"""

import logging
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File
from pymdownx.slugs import slugify

ROOT = Path(__file__).resolve().parents[1]
DOCS = "docs/"
# Pages that do not lie in docs/, by their places in the repository, which are those in the site as well.
BESIDE = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "benchmarks/README.md",
    "benchmarks/quality/README.md",
    "deploy/README.md",
    "deploy/space/README.md",
    "tools/demo_model/README.md",
)
_FENCE = re.compile(r"^([ ]*)(```+).*?^\1\2[ ]*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r'\[(?P<text>[^\[\]]*)\]\((?P<target>[^)\s]+)\)|(?P<image><img src=")(?P<source>[^"]+)')
_CODE = re.compile(r"<(pre|code|svg)\b.*?</\1>", re.DOTALL)
_NOT_READ = re.compile(r"\|\s*:?---|```|^\s*(?:[-*] |\d+\. )\S.*|\]\([^)]*\)", re.MULTILINE)

log = logging.getLogger("mkdocs.hooks")


def on_config(config):
    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")  # anchors as GitHub's
    return config


def on_files(files, config):
    for name in BESIDE:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links as the site has them; what GitHub folds away is Markdown for Python-Markdown only if it is told so."""
    name = page.file.src_uri
    folder = posixpath.dirname(name if name in BESIDE else DOCS + name)

    def mended(found):
        target = found["source"] or found["target"]
        if target.startswith("#") or re.match(r"[a-z]+:", target):
            return found[0]
        path, _, anchor = target.partition("#")
        place = in_site(posixpath.normpath(posixpath.join(folder, path)))
        if place is None:
            return f"{found['text']} (`{posixpath.normpath(posixpath.join(folder, path))}`)"
        link = posixpath.relpath(place, posixpath.dirname(name) or ".") + (f"#{anchor}" if anchor else "")
        return found["image"] + link if found["image"] else f"[{found['text']}]({link})"

    return outside_of_fences(lambda text: _LINK.sub(mended, text.replace("<details>", '<details markdown="1">')), markdown)


def in_site(path):
    """Where a file of the repository is in the site; None: it is no part of it."""
    if path.startswith(DOCS):
        return path.removeprefix(DOCS)
    return path if path in BESIDE else None


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
