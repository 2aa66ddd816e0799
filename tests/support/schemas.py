"""Random JSON schemas from a seed, whose documents are short."""

import random
from typing import Any


def random_schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    kind = rng.choice(("object", "array", "anyOf", *_SCALARS) if depth else _SCALARS)
    match kind:
        case "object":
            names = rng.sample(["a", "b", "long name", 'q"', "é"], rng.randint(1, 3))
            return {
                "type": "object",
                "properties": {name: random_schema(rng, depth - 1) for name in names},
                "required": names[: rng.randint(0, len(names))],
                "additionalProperties": False,
            }
        case "array":
            least = rng.randint(0, 2)
            items = random_schema(rng, depth - 1)
            return {"type": "array", "items": items, "minItems": least, "maxItems": least + rng.randint(0, 2)}
        case "anyOf":
            return {"anyOf": [random_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]}
        case "integer":
            low = rng.randint(-50, 50)
            return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 99)}
        case "string":
            low = rng.randint(0, 2)
            return {"type": "string", "minLength": low, "maxLength": low + rng.randint(0, 4)}
        case "pattern":
            return {"type": "string", "pattern": "^[a-f]{1,4}(-[0-9])?$"}
        case "enum":
            return {"enum": rng.sample([1, "two", None, True, {"k": [0.5]}, "ü\n"], 3)}
    return {"type": kind}


_SCALARS = ("integer", "string", "pattern", "enum", "null", "boolean")
