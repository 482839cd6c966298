"""Records inside an HTML page: packed by column, so that what many records share is stored once.

A thousand records repeat the same configuration and environment a thousand times. A *column* is one of

    {"same": value}                   every record holds this value
    {"each": [value, ...]}            one value per record
    {"pick": [i, ...], "of": [...]}   record n holds of[i[n]]; -1 means that it has no such key
    {"object": {key: column, ...}}    an object, column by column
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from typing import Any

_ABSENT = object()
# A union of types would be made anew for each of a million values.
_NESTED = (dict, list, tuple)


def pack(rows: Sequence[Any]) -> dict[str, Any]:
    """The column that holds these JSON values, one per record."""
    present = [row for row in rows if row is not _ABSENT]
    if len(present) == len(rows) and all(isinstance(row, dict) for row in rows) and any(rows):
        keys = sorted({key for row in rows for key in row})
        return {"object": {key: pack([row.get(key, _ABSENT) for row in rows]) for key in keys}}
    texts = ["" if row is _ABSENT else _text(row) for row in rows]
    values = dict(zip(texts, rows, strict=True))
    if len(present) == len(rows):
        if len(values) == 1:
            return {"same": rows[0]}
        if 2 * len(values) > len(rows):
            return {"each": list(rows)}
    values.pop("", None)
    index = {text: i for i, text in enumerate(values)} | {"": -1}
    return {"pick": [index[text] for text in texts], "of": list(values.values())}


def _text(row: Any) -> str:
    """What tells 1, 1.0, true and "1" apart, which Python's equality does not."""
    return json.dumps(row, sort_keys=True) if isinstance(row, _NESTED) else repr(row)


def unpack(column: dict[str, Any], num_rows: int) -> list[Any]:
    """What `pack` was given, objects without their absent keys."""
    return [_cell(column, i) for i in range(num_rows)]


def _cell(column: dict[str, Any], i: int) -> Any:
    if "same" in column:
        return column["same"]
    if "each" in column:
        return column["each"][i]
    if "pick" in column:
        chosen = column["pick"][i]
        return _ABSENT if chosen < 0 else column["of"][chosen]
    cells = {key: _cell(child, i) for key, child in column["object"].items()}
    return {key: value for key, value in cells.items() if value is not _ABSENT}


def compressed(data: Any) -> str:
    """JSON, deflated (zlib's format, `DecompressionStream("deflate")` of browsers) and in base64.

    Base64 holds no character that could end a script element, whatever strings the data holds.
    """
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(zlib.compress(text.encode(), 7)).decode()


def script_json(data: Any) -> str:
    """JSON that may stand inside a script element, whatever strings it holds.

    HTML ends a script at `</script`, and `<!--` changes how the rest is read: no `<`, `>` or `&` is left.
    """
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
