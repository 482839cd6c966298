"""matplotlib's SVG made fit for a page: colours of the page, ids that do not clash, system fonts, no dead weight."""

from __future__ import annotations

import hashlib
import re
from html import escape

# The colours figures are drawn in. Ink becomes the page's text colour; the others CSS variables, which a page may set
# for its background, with the colour itself as the fallback. Okabe and Ito's palette: told apart by the colour-blind.
INK = "#010203"
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

_STANDALONE_STYLE = (
    "<style>svg{color:#1c2128;color-scheme:light dark}@media(prefers-color-scheme:dark){svg{color:#e3e6ea}}</style>"
)


def inline(svg: str, *, prefix: str, label: str) -> str:
    """An SVG document as an element to be put into a page.

    Args:
        svg: what matplotlib wrote, with `svg.fonttype` none. prefix: goes before every id, unique in the page.
        label: what the figure shows, for those who cannot see it.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    # A style element inside an inline SVG would hold for the whole page: said once on the root instead.
    svg = re.sub(r"<defs>\s*<style[^>]*>.*?</style>\s*</defs>\s*", "", svg, flags=re.DOTALL)
    svg = _prefix_ids(svg, prefix)
    svg = svg.replace(INK, "currentColor")
    for i, colour in enumerate(PALETTE):
        svg = svg.replace(colour, f"var(--series-{i},{colour})")
    svg = re.sub(r"font-family: [^;\"]*|font: (\S+) [^;\"]*", _system_font, svg)
    # matplotlib writes six decimals; a hundredth of a pixel is enough. Only in geometry, never in text.
    svg = re.sub(r' (?:d|x|y|width|height|transform)="[^"]*"', _shorten, svg)
    svg = re.sub(r' transform="rotate\(-?0 [^"]*"', "", svg)
    svg = re.sub(r"\n\s*", "\n", _without_bare_groups(svg))
    svg = re.sub(r'(<g clip-path="[^"]*")>((?:\n<use [^>]*/>)+\n)</g>', _style_of_markers, svg)
    head = svg[: svg.index(">")]
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None, "matplotlib writes a viewBox"
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" {box[0]}'
    opening += ' stroke-linejoin="round" stroke-linecap="butt"'
    return f'{opening} role="img" aria-label="{escape(label)}">{svg[len(head) + 1 :].strip()}'


def standalone(element: str) -> str:
    """An element of `inline` as a file of its own, which follows the viewer's light or dark scheme."""
    opening, rest = element.split(">", 1)
    width, height = opening.split('viewBox="0 0 ')[1].split('"')[0].split()
    # Editors and converters do not know a page's variables.
    rest = re.sub(r"var\(--series-\d,(#\w+)\)", r"\1", rest)
    return f'{opening} width="{width}" height="{height}" font-family="{escape(FONT)}">{_STANDALONE_STYLE}{rest}\n'


def _without_bare_groups(svg: str) -> str:
    """Without `<g>` elements that say nothing: matplotlib wraps every artist in several."""
    kept: list[bool] = []

    def keep(match: re.Match[str]) -> str:
        if match[0] == "</g>":
            return match[0] if kept.pop() else ""
        kept.append(match[0] != "<g>")
        return match[0] if kept[-1] else ""

    # Text and attributes hold `&lt;`, never `<`.
    return re.sub(r"<g(?: [^>]*)?>|</g>", keep, svg)


def _prefix_ids(svg: str, prefix: str) -> str:
    """Ids that are unique in a page: `prefix` before those of series, short ones for what is referred to."""
    referenced = dict.fromkeys(a or b for a, b in re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', svg))
    short = hashlib.sha256(prefix.encode()).hexdigest()[:6]
    names = {name: f"i{short}{i}" for i, name in enumerate(referenced)}

    def rename(match: re.Match[str]) -> str:
        name = match[1]
        if name.startswith("series-"):
            return f' id="{prefix}-{name}"'
        return f' id="{names[name]}"' if name in names else ""

    svg = re.sub(r' id="([^"]+)"', rename, svg)
    svg = re.sub(r"url\(#([^)]+)\)", lambda m: f"url(#{names[m[1]]})", svg)
    return re.sub(r'xlink:href="#([^"]+)"', lambda m: f'href="#{names[m[1]]}"', svg)


def _style_of_markers(match: re.Match[str]) -> str:
    """A group of markers of one style: said once on the group."""
    styles = set(re.findall(r' style="[^"]*"', match[2]))
    if len(styles) != 1:
        return match[0]
    (style,) = styles
    return f"{match[1]}{style}>{match[2].replace(style, '')}</g>"


def _system_font(match: re.Match[str]) -> str:
    return f"font-size: {match[1]}" if match[1] else "font-family: inherit"


def _shorten(match: re.Match[str]) -> str:
    shorter = re.sub(r"-?\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), match[0])
    return re.sub(r" ?\n(?!\")", " ", shorter)
