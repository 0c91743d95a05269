"""The chat template that a config asks for: a text, the name of one of mergekit's, or ``auto``."""

from __future__ import annotations

import mergekit.merge
from mergekit.config import MergeConfiguration


class _Tokenizer:
    chat_template: str | None = None


def text_of(config: MergeConfiguration) -> str | None:
    """Return the template's text as mergekit finds it.

    Returns:
        ``None`` if the config asks for none, or for ``auto`` and no model has one.

    Raises:
        Exception: whatever mergekit raises: it is neither a text nor a name that it knows.

    """
    # It is private, but all that it does to a tokenizer is to set this attribute.
    set_template = getattr(mergekit.merge, "_set_chat_template", None)
    tokenizer = _Tokenizer()
    if set_template is not None:
        set_template(tokenizer, config)
    return tokenizer.chat_template
