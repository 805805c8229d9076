"""Equations as MathML, which browsers draw by themselves: no script, no font, no network."""

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.util import logging

logger = logging.getLogger(__name__)


def mathml(node, display):
    tex = node.astext()
    if "&" in tex or r"\\" in tex:
        tex = rf"\begin{{split}}{tex}\end{{split}}"
    try:
        found = convert(tex, display=display)
    except Exception as error:  # the converter has a class for each fault
        found = f"\\ {error!r}"
    if "\\" in found or ">&<" in found:  # also what it does not know and lets through
        logger.warning("no MathML for %s: %s", tex, found, location=node)
    return found


def visit_inline(writer, node):
    writer.body.append(f'<span class="math">{mathml(node, "inline")}</span>')
    raise nodes.SkipNode


def visit_block(writer, node):
    start = writer.starttag(node, "div", CLASS="math")
    writer.body.append(f"{start}{mathml(node, 'block')}</div>\n")
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
