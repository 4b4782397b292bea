"""Sections of pages that programs write: what stands between two markers."""


def write(path, text, markers):
    """Put `text` between the two markers of the page at `path`, which is there whole at any moment."""
    page = path.read_text(encoding="utf-8")
    begin, end = (page.index(marker) for marker in markers)
    partial = path.with_suffix(".partial")
    partial.write_text(f"{page[: begin + len(markers[0])]}\n{text}\n{page[end:]}", encoding="utf-8")
    partial.replace(path)
