"""The naming rule of model ids and vmodel ids. Every surface of mesh and runtime applies it.

ModelMesh's own ids stay valid: slashes, dots, colons, spaces and letters of any script are allowed.
"""

MAX_ID_LENGTH = 512
_SHOWN = 40


class InvalidModelId(ValueError):
    """An id that could forge log lines, break a protocol's framing or fill messages. The text shows its beginning, escaped."""


def check_model_id(model_id: str, what: str = "model id") -> None:
    """Raise InvalidModelId unless the id is printable and of 1 to `MAX_ID_LENGTH` characters. `what` names it in the error."""
    if not model_id:
        raise InvalidModelId(f"{what} is empty: name the model")
    if len(model_id) > MAX_ID_LENGTH:
        raise InvalidModelId(
            f"{what} {shown_id(model_id)} is {len(model_id)} characters long; the limit is {MAX_ID_LENGTH}"
        )
    if not model_id.isprintable():
        bad = next(character for character in model_id if not character.isprintable())
        raise InvalidModelId(f"{what} {shown_id(model_id)} may not contain {bad!a}: use printable characters")


def shown_id(model_id: str) -> str:
    """Return an id as messages show it: quoted, control characters escaped, cut after 40 characters."""
    return repr(model_id) if len(model_id) <= _SHOWN else f"{model_id[:_SHOWN]!r}…"
