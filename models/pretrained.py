"""Weights of other people's models, from a local folder or a hub name, with errors of one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

Model = TypeVar("Model")


def find_pretrained(argument: str, path: str) -> Path | str:
    """A folder that exists, or the hub name as it came.

    Raises:
        ValueError: path looks like one of a file system (it starts with / . or ~, or has more than one /), and there is
            no such folder.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if path.startswith(("/", ".", "~")) or path.count("/") > 1 or folder.exists() or not path.strip():
        raise ValueError(f"{argument}: {path!r} is neither a folder nor a hub name (owner/name)")
    return path


def load_pretrained(
    load: Callable[..., Model], argument: str, source: Path | str, *, whole: bool = True, **options: Any
) -> Model:
    """load(source, ...), a `from_pretrained` of diffusers or transformers; folders are read without any network.

    Args:
        argument: what errors name. whole: load a model whose weights must all be there, which the libraries only warn
            about and fill in at random.

    Raises:
        ValueError: the libraries find no such model, or a damaged, refused or incomplete one; says which and why.
    """
    from safetensors import SafetensorError

    if whole:
        options["output_loading_info"] = True
    try:
        loaded: Any = load(str(source), local_files_only=isinstance(source, Path), **options)
    # What the two libraries raise for missing or broken files, refused pickles, absent packages, other models.
    except (
        OSError,
        ValueError,
        RuntimeError,
        KeyError,
        TypeError,
        AttributeError,
        ImportError,
        SafetensorError,
    ) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{argument}: {source} cannot be loaded: {reason[:300]}") from error
    if not whole:
        return loaded
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{argument}: {source} lacks {len(missing)} weights of a {type(model).__name__}, the first: {missing[0]}"
        )
    return model
