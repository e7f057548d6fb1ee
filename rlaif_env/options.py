"""What a command line gives as text and the program holds as a mapping."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tyro.constructors import PrimitiveConstructorSpec

from rlaif_env.data.jsonl import json_object

__all__ = ["JSON_MAPPING"]

JSON_MAPPING = PrimitiveConstructorSpec[Mapping[str, Any]](
    nargs=1,
    metavar="JSON",
    instance_from_str=lambda texts: json_object(texts[0]),
    is_instance=lambda value: isinstance(value, Mapping),
    str_from_instance=lambda value: [json.dumps(value)],
)
"""For ``Annotated[Mapping[str, Any], JSON_MAPPING]``: a JSON object on the command line."""
