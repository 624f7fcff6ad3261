"""What the API reference makes of our docstrings, which are written for `help`."""

import re

from griffe import Extension, Object

# `jbn.init` and `jbn.tools.fold`, not `jbn.tools`, which is no object of the reference
PUBLIC = re.compile(r"`(jbn\.(?!(?:linen|nnx|tools)`)(?:(?:linen|nnx|tools)\.)?[A-Za-z]\w*)`")


class Docstrings(Extension):
    """Examples become code, titles among the arguments go, and names of the public doors become links."""

    def on_object(self, *, obj: Object, **_: object) -> None:
        if obj.docstring is None:
            return
        text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
        text = re.sub(r"\n\n  [A-Z][a-z ]+:\n", "\n", text)  # of groups of arguments, indented as those are
        head, example, tail = text.partition("\nExamples:")
        head = PUBLIC.sub(r"[`\1`][\1]", head)
        obj.docstring.value = head + example + tail
